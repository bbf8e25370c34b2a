"""Print what a configuration would quantize, how and why; or what an exported file holds.

Settings are those of train.py: the network is built, run on two inputs and prepared, and nothing is trained.

  python -m qat inspect model=resnet20 quant=w4a4_lsq
  python -m qat inspect quant=int8 'quant.rules=[{match: "block.*", weight: {bits: 4}}]' quant.graph=layers

Of an int8 checkpoint: layers, bits, shapes, ranges and bytes. Its checksum is verified; nothing in it is executed.
Of an ONNX file: the same, and the kernels that ONNX Runtime runs of it on this machine.

  python -m qat inspect outputs/DATE/TIME/export/model.safetensors
  python -m qat inspect outputs/DATE/TIME/export/model.onnx
"""

import argparse
from pathlib import Path

from qat.analysis.checkpoint import describe
from qat.analysis.onnx_file import describe_onnx
from qat.analysis.preparation import report
from qat.prepare import prepare

REPOSITORY = Path(__file__).parents[1] / "conf"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `inspect` takes on the command line."""
    parser.add_argument("settings", nargs="*", metavar="GROUP=OPTION | PATH=VALUE | FILE",
                        help="settings as for train.py, or one exported file (.safetensors, .onnx)")  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", type=Path, default=None,
                        help="the folder with config.yaml (default: ./conf, or that of the repository)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the report.

    Raises:
        ValueError: a setting that is not valid, a file that is none of ours.
        OSError: no such file, or no configuration.
    """
    files = [setting for setting in args.settings if "=" not in setting]
    if not files:
        print(prepared_report(args.settings, args.config_dir), end="")
        return
    if len(args.settings) > 1:
        raise ValueError(f"'{files[0]}' is not a setting (PATH=VALUE); a file is inspected alone")
    print((describe_onnx if files[0].endswith(".onnx") else describe)(files[0]), end="")


def prepared_report(settings: list[str], folder: Path | None = None) -> str:
    """The preparation report of the network that a composed configuration describes.

    Args:
        settings: overrides, as for train.py.
        folder: with config.yaml; None for ./conf, or the repository's.

    Raises:
        ValueError: a setting, or what does not fit the network.
        OSError: files that are not there.
    """
    from qat import hydra_schema  # not above: `python -m qat` starts without hydra and lightning
    from qat.training.module import build

    cfg = hydra_schema.composed(settings, configuration(folder))
    config = hydra_schema.quant_config(cfg)
    net = build(hydra_schema.plain(cfg.model))
    return report(prepare(net.eval(), config, hydra_schema.example_input(cfg)))


def configuration(folder: Path | None) -> Path:
    """The folder with config.yaml: the one that was named, ./conf, or the repository's."""
    here = Path("conf")
    return folder or (here if (here / "config.yaml").is_file() else REPOSITORY)
