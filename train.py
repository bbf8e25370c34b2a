"""Configuration -> float training -> quantization-aware training -> PTQ -> exported files -> report."""

import copy
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

import qat
from qat import hydra_resume, hydra_schema
from qat.analysis.preparation import report
from qat.export import check_network
from qat.export.parity import ParityLimits
from qat.ptq import finalize, smooth
from qat.training import QATModule, QATSchedule
from qat.training.recipes import teach
from qat.training.rehearsal import rehearse
from qat.training.run import Run, close_loggers, float_weights_of, main_process_only, shows_progress
from qat.training.state import RunState
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
    state = RunState(Path(HydraConfig.get().runtime.output_dir), hydra_schema.plain(cfg), hydra_resume.origin(cfg),
                     cfg.ckpt_path)  # fmt: skip
    given = checkpoint_phase(state.given, model, config)
    module = QATModule(model, task, {**optimizer, "lr": cfg.float.lr}, scheduler=hydra_schema.plain(cfg.scheduler))
    if config.enabled:  # what does not fit the network fails now, not after the float phase
        prepared = qat.prepare(copy.deepcopy(module.net), config, example)
        check_network(prepared, list(cfg.export.formats))
        if cfg.rehearse and not state.trained("qat").is_file():
            rehearse(prepared, example, list(cfg.export.formats), skip_impossible=cfg.export.skip_impossible)
    result = Run(state, cfg.name, hydra_schema.plain(cfg), data, module.task, Path(__file__).parent)
    if state.finished:
        return result.metric()

    # 1. Float: trained here, or given
    if cfg.float_checkpoint or given == "qat":
        load_float_weights(module.net, cfg.float_checkpoint or float_weights_of(str(state.given)))
    else:
        with result.timed("float"):
            module, loggers = fit(cfg, "float", module, data, state, given)
            close_loggers(loggers)
    result.float_stage(module.net)
    if not config.enabled:
        main_process_only()
        return result.write({}, OmegaConf.to_yaml(cfg, resolve=True))

    # 2. The baseline: PTQ of the float weights
    L.seed_everything(cfg.seed, verbose=False)  # each phase for itself: one that is done is not repeated
    ptq, calibration = instantiate(cfg.ptq), data.calibration_batches(cfg.ptq.calibration_batches)
    if ptq.smooth is not None:  # the network computes the same; from here on it is easier to quantize
        entries = smooth(module.net, calibration, ptq.smooth, multiply=False)
        result.write_text("smoothing.txt", "\n".join(map(str, entries)))
    if not result.done("ptq"):
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
        L.seed_everything(cfg.seed, verbose=False)
        qat.calibrate(module.prepared, calibration)
        module, loggers = fit(cfg, "qat", module, data, state, given, schedule, *recipes)
    main_process_only()

    # 4. The PTQ step on the trained weights, lowering, export; every file as reloaded from disk on the same test set
    with result.timed("export"):
        L.seed_everything(cfg.seed, verbose=False)
        net = module.prepared
        finalize(net, calibration, ptq, trained=True)
        lowered = result.lowered(net, model, data)
        limits = ParityLimits(**cfg.export.parity)
        paths = result.exports(net, lowered, example, list(cfg.export.formats), limits)

    # 5. What people look at
    evidence = result.evidence(net, lowered, data, state.phases)
    metric = result.write(evidence, OmegaConf.to_yaml(cfg, resolve=True))
    close_loggers(loggers, paths)
    result.check()
    return metric


def fit(cfg: DictConfig, phase: str, module: QATModule, data: L.LightningDataModule, state: RunState, given: str | None,
        schedule: QATSchedule | None = None, *recipes: L.Callback) -> tuple[QATModule, list[Logger]]:  # fmt: skip
    """Train one phase (`float` or `qat`) with the configured Trainer, callbacks and loggers; what is done is read."""
    if state.trained(phase).is_file():
        return QATModule.load_from_checkpoint(state.trained(phase), map_location="cpu"), []
    cfg.phase = phase
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger]
    for logger in loggers:
        logger.log_hyperparams(hydra_schema.plain(cfg))
    callbacks = [*(instantiate(callback) for callback in cfg.callbacks.values() if callback),
                 *([schedule] if schedule else []), *recipes]  # fmt: skip
    trainer = instantiate(cfg.trainer, max_epochs=cfg[phase].max_epochs, logger=loggers, callbacks=callbacks,
                          enable_progress_bar=shows_progress(callbacks))  # fmt: skip
    ckpt_path = state.interrupted(phase) or (state.given if given == phase else None)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    state.keep(trainer, phase, schedule.phases(trainer) if schedule else [])
    return module.whole(state.trained(phase)), loggers


if __name__ == "__main__":
    main()
