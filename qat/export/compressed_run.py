"""Folders of compressed-tensors, run by transformers and the package of that name, as vLLM runs them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.linear import made_by_layers
from qat.export.sums import verify


def open_compressed_tensors(path: str | Path, target: str = "vllm") -> Callable[[Tensor], Tensor]:
    """A language model from a folder that `save_compressed_tensors` wrote.

    The package simulates: it multiplies weights out and rounds inputs. In two places it does not do what vLLM does:

    * int8 inputs with a range a token: the package divides the largest magnitude by 127.5, vLLM's kernel (and training)
      by 127. The latter is done here;
    * packed zero points cannot be loaded packed (compressed-tensors 0.20): such weights are unpacked while they load.

    Args:
        path: of the folder.
        target: key of TARGETS; there is one way to run such a folder.

    Returns:
        Indices (N, T) -> logits (N, T, vocabulary), float32.

    Raises:
        ImportError: transformers or compressed-tensors is not installed.
        OSError, ValueError: the folder is not there, is damaged, or is no such model.
    """
    model = _model(Path(path))

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()

    return run


def compressed_layers(path: Path, target: str, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What linear layers of a folder make of what they are given: `qat.export.linear.made_by_layers`."""
    model = _model(path)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)  # weights are unpacked at its first call
    return made_by_layers(model, asked)


def _model(path: Path) -> Any:
    import transformers

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no folder of compressed-tensors at '{path}'")
    verify(path)
    about = transformers.AutoConfig.from_pretrained(path).quantization_config
    groups = about["config_groups"].values()
    settings: dict[str, Any] = {}
    if any(group["format"] == "pack-quantized" and not group["weights"]["symmetric"] for group in groups):
        if len(groups) > 1:
            raise ValueError(f"'{path}' has asymmetric packed weights beside others, which transformers does not load")
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **settings).eval()
    for module in model.modules():
        inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if inputs is not None and inputs.type == "int" and inputs.dynamic:
            module.quantization_enabled = False  # of its own rounding; weights are multiplied out all the same
            module.register_forward_pre_hook(_by_token)
    return model


def _by_token(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Inputs as vLLM's `dynamic_scaled_int8_quant` makes them."""
    largest = args[0].abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (torch.round(args[0] / scale) * scale,)
