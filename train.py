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
from qat.analysis.preparation import report
from qat.export import check_network
from qat.export.parity import ParityLimits
from qat.ptq import finalize, smooth
from qat.training import QATModule
from qat.training.recipes import teach
from qat.training.run import Run, close_loggers, float_weights_of, main_process_only, shows_progress
from qat.training.weights import checkpoint_phase, load_float_weights


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one job; in a sweep a job that fails is reported and does not stop the others."""
    return hydra_schema.guard(run, cfg)


def run(cfg: DictConfig) -> float:
    """The main job, step by step. Returns the last stage's first metric, for sweepers."""
    config, schedule = hydra_schema.quant_config(cfg), instantiate(cfg.qat.schedule)
    L.seed_everything(cfg.seed, verbose=False)
    data = instantiate(cfg.data)
    example = data.example_input()
    model, task, optimizer = (hydra_schema.plain(cfg[group]) for group in ("model", "task", "optimizer"))
    resume = checkpoint_phase(cfg.ckpt_path, model, config)
    module = QATModule(model, task, {**optimizer, "lr": cfg.float.lr}, scheduler=hydra_schema.plain(cfg.scheduler))
    if config.enabled:  # what does not fit the network fails now, not after the float phase
        check_network(qat.prepare(copy.deepcopy(module.net), config, example), list(cfg.export.formats))
    result = Run(Path(HydraConfig.get().runtime.output_dir), cfg.name, hydra_schema.plain(cfg), data, module.task)

    # 1. Float: trained here, or given
    if cfg.float_checkpoint or resume == "qat":
        load_float_weights(module.net, cfg.float_checkpoint or float_weights_of(cfg.ckpt_path))
    else:
        with result.timed("float"):
            close_loggers(fit(cfg, "float", module, data, cfg.ckpt_path).loggers)
    result.float_stage(module.net)
    if not config.enabled:
        main_process_only()
        return result.write({}, OmegaConf.to_yaml(cfg, resolve=True))

    # 2. The baseline: PTQ of the float weights
    ptq, calibration = instantiate(cfg.ptq), data.calibration_batches(cfg.ptq.calibration_batches)
    if ptq.smooth is not None:  # the network computes the same; from here on it is easier to quantize
        entries = smooth(module.net, calibration, ptq.smooth, multiply=False)
        result.write_text("smoothing.txt", "\n".join(map(str, entries)))
    baseline = qat.prepare(copy.deepcopy(module.net), config, example)
    finalize(baseline, calibration, ptq, trained=False)
    result.stage("ptq", baseline)

    # 3. Quantization-aware training. The structure changes here, before the Trainer sees the module
    changes = {"optimizer": {**optimizer, "lr": cfg.qat.lr}, "scale_lr": cfg.qat.scale_lr,
               "input_dtype": str(example.dtype).removeprefix("torch.")}  # fmt: skip
    recipes = teach((instantiate(recipe) for recipe in cfg.recipe.values() if recipe), module.net)
    module = module.quantized(config, list(example.shape[1:]), **changes)
    result.write_text("report.txt", report(module.prepared))
    with result.timed("qat"):
        qat.calibrate(module.prepared, calibration)
        trainer = fit(cfg, "qat", module, data, cfg.ckpt_path if resume == "qat" else None, schedule, *recipes)
    main_process_only()

    # 4. The PTQ step on the trained weights, lowering, export; every file as reloaded from disk on the same test set
    with result.timed("export"):
        net = module.prepared
        finalize(net, calibration, ptq, trained=True)
        lowered = result.lowered(net, model, data, Path(__file__).parent)
        limits = ParityLimits(**cfg.export.parity)
        paths = result.exports(net, lowered, example, list(cfg.export.formats), limits)

    # 5. What people look at
    evidence = result.evidence(net, lowered, data, schedule.phases(trainer))
    metric = result.write(evidence, OmegaConf.to_yaml(cfg, resolve=True))
    close_loggers(trainer.loggers, paths)
    result.check()
    return metric


def fit(cfg: DictConfig, phase: str, module: QATModule, data: L.LightningDataModule, ckpt_path: str | None,
        *extra: L.Callback) -> L.Trainer:  # fmt: skip
    """Train one phase (`float` or `qat`) with the configured Trainer, callbacks and loggers."""
    cfg.phase = phase
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger]
    for logger in loggers:
        logger.log_hyperparams(hydra_schema.plain(cfg))
    callbacks = [*(instantiate(callback) for callback in cfg.callbacks.values() if callback), *extra]
    trainer = instantiate(cfg.trainer, max_epochs=cfg[phase].max_epochs, logger=loggers, callbacks=callbacks,
                          enable_progress_bar=shows_progress(callbacks))  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    main()
