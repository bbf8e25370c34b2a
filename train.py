"""Configuration -> float training -> quantization-aware training -> PTQ -> exported files -> report."""

import copy
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import qat
from qat import hydra_schema
from qat.analysis.layers import layer_table, report
from qat.export import parity
from qat.export.onnxruntime import OnnxNetwork
from qat.ptq import finalize
from qat.training import QATModule
from qat.training.run import Run, close_loggers, float_weights_of, main_process_only
from qat.training.weights import checkpoint_phase, load_float_weights


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one job; in a sweep a job that fails is reported and does not stop the others."""
    return hydra_schema.guard(run, cfg)


def run(cfg: DictConfig) -> float:
    """The main job, step by step. Returns the last stage's first metric, for sweepers."""
    config = hydra_schema.quant_config(cfg)
    resume = checkpoint_phase(cfg.ckpt_path)
    L.seed_everything(cfg.seed, verbose=False)
    data = instantiate(cfg.data)
    data.setup()
    example = data.example_input()
    model, task, optimizer = (hydra_schema.plain(cfg[group]) for group in ("model", "task", "optimizer"))
    module = QATModule(model, task, {**optimizer, "lr": cfg.float.lr})
    qat.prepare(copy.deepcopy(module.net), config, example)  # a config that does not fit fails now, not after float
    result = Run(Path(HydraConfig.get().runtime.output_dir), cfg.name, hydra_schema.plain(cfg), data, module.task)

    # 1. Float: trained here, or given
    if cfg.float_checkpoint or resume == "qat":
        load_float_weights(module.net, cfg.float_checkpoint or float_weights_of(cfg.ckpt_path))
    else:
        with result.timed("float"):
            close_loggers(fit(cfg, "float", module, data, cfg.ckpt_path).loggers)
    result.float_stage(module.net)
    if not config.enabled:
        result.write([], OmegaConf.to_yaml(cfg, resolve=True))
        return result.metric()

    # 2. The baseline: PTQ of the float weights
    calibration = data.calibration_batches(cfg.ptq.calibration_batches)
    ptq = instantiate(cfg.ptq)
    baseline = qat.prepare(copy.deepcopy(module.net), config, example)
    finalize(baseline, calibration, ptq, trained=False)
    result.stage("ptq", baseline)

    # 3. Quantization-aware training. The structure changes here, before the Trainer sees the module
    optimizer = {**optimizer, "lr": cfg.qat.lr}
    module = module.quantized(config, list(example.shape[1:]), optimizer=optimizer, scale_lr=cfg.qat.scale_lr)
    result.write_text("report.txt", report(module.prepared))
    with result.timed("qat"):
        qat.calibrate(module.prepared, calibration)
        schedule = instantiate(cfg.qat.schedule)
        trainer = fit(cfg, "qat", module, data, cfg.ckpt_path if resume == "qat" else None, schedule)

    # 4. The PTQ step on the trained weights, lowering, export
    with result.timed("export"):
        net = module.prepared
        finalize(net, calibration, ptq, trained=True)
        integer = qat.lower(net)
        integer.info["data"] = data.describe()
        paths = qat.export(integer, result.folder / "export", example, list(cfg.export.formats))

    # 5. Every file as reloaded from disk, on the same test set
    result.stage("qat", net)
    int8 = qat.load(paths["int8"]) if "int8" in paths else None
    if int8 is not None:
        result.stage("int8", int8, paths["int8"])
    if "onnx" in paths:
        result.stage("onnx", OnnxNetwork(paths["onnx"], config.target), paths["onnx"])
    pairs = parity.measure(net, integer, int8, paths.get("onnx"), result.inputs, target=config.target,
                           layer_samples=cfg.export.layer_samples)  # fmt: skip
    result.summary["parity"] = {pair: measured.to_dict() for pair, measured in pairs.items()}

    # 6. What people look at
    result.write(layer_table(net), OmegaConf.to_yaml(cfg, resolve=True))
    close_loggers(trainer.loggers, paths)
    for pair, measured in pairs.items():
        measured.check(pair, parity.ParityLimits(**cfg.export.parity))
    return result.metric()


def fit(cfg: DictConfig, phase: str, module: QATModule, data: L.LightningDataModule, ckpt_path: str | None,
        *callbacks: L.Callback) -> L.Trainer:  # fmt: skip
    """Train one phase with the configured Trainer, callbacks and loggers."""
    trainer = hydra_schema.trainer(cfg, phase, *callbacks)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    main_process_only(trainer)
    module.cpu()
    return trainer


if __name__ == "__main__":
    main()
