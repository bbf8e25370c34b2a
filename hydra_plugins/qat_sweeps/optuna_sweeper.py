"""`hydra/sweeper=optuna`: a search with Optuna 4 or newer, whose study is in the sweep's directory."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf, open_dict

from hydra_plugins.qat_sweeps.grid import GridSweeper

log = logging.getLogger(__name__)

STUDY = "qat"
"""The name of the study in its storage."""


class OptunaSweeper(GridSweeper):
    """Asks Optuna for settings, launches jobs, tells it what their `summary.json` says.

    Directories of jobs have the numbers of their trials. A trial that fails does not end the search; one that was
    interrupted goes on; a configuration that has finished is not run again.

    Args:
        see conf/hydra/sweeper/optuna.yaml.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, optimize: Any, layers: Any, prune: bool, sampler: Any, pruner: Any,
        storage: str, max_batch_size: int | None, params: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(max_batch_size=max_batch_size, params=params)
        self.n_trials, self.n_jobs, self.layers, self.prune = n_trials, n_jobs, layers, prune
        self.sampler, self.pruner, self.storage = sampler, pruner, storage
        names = [optimize] if isinstance(optimize, str) else list(optimize or [])
        self.objectives: list[str] = names

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Search until there are `n_trials` results."""
        try:
            import optuna
        except ImportError:
            raise ImportError("hydra/sweeper=optuna needs Optuna: pip install 'qat[sweep]'") from None
        from optuna.trial import TrialState

        from qat.analysis.summary import pick_metric
        from qat.hydra_schema import searched_layers, task_metrics

        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        settings = parser.parse_overrides([*self._parse_config(), *arguments])
        fixed = [f"{s.get_key_element()}={s.get_value_element_as_str()}" for s in settings if not s.is_sweep_override()]
        space = {s.get_key_element(): Dimension(s) for s in settings if s.is_sweep_override()}
        composed = self._composed(fixed)
        metrics = task_metrics(composed)
        self.objectives = self.objectives or [pick_metric(metrics) or next(iter(metrics))]
        layers = searched_layers(composed, self.layers.match) if self.layers.bits else []
        if layers:
            log.info(f"{len(layers)} layers have bits of their own: {', '.join(layers)}")
        distributions = {key: dimension.distribution() for key, dimension in space.items()}
        distributions |= {_bits_of(name): optuna.distributions.CategoricalDistribution(list(self.layers.bits))
                          for name in layers}  # fmt: skip
        if not distributions:
            raise ValueError("hydra/sweeper=optuna has nothing to search: give a setting choice(a,b), or "
                             "hydra.sweeper.layers.bits=[2,4,8]")  # fmt: skip

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = self._study(metrics)
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        open_trials = study.get_trials(states=(TrialState.RUNNING,))
        if study.get_trials(deepcopy=False):
            log.info(f"The study in {folder} goes on: {len(finished)} of {self.n_trials} trials have finished"
                     + (f", {len(open_trials)} were interrupted" if open_trials else ""))  # fmt: skip
        left = self.n_trials - len(finished)
        returned = []
        while left > 0:
            trials: list[Any] = []
            while len(trials) < min(self.n_jobs, left):
                if open_trials:  # left behind by a process that was killed: it goes on in its directory
                    trial = open_trials.pop(0)
                    trials.append((trial.number, trial.params))
                else:
                    asked = study.ask(distributions)
                    trials.append((asked.number, asked.params))
            jobs = {number: [*fixed, *self._chosen(params, space, layers, fixed)] for number, params in trials}
            returned += self._run(study, folder, jobs)
            left -= len(trials)
        return returned

    def _study(self, metrics: Mapping[str, bool | None]) -> Any:
        """Make the study, or open the one that is there.

        Args:
            metrics: of the task: name -> whether higher is better.

        Raises:
            ValueError: it has other objectives.
        """
        import optuna
        from hydra.utils import get_class, instantiate

        from qat.analysis.search import is_down

        assert self.config is not None
        directions: list[Any] = ["minimize" if is_down(name, metrics) else "maximize" for name in self.objectives]
        pruner = instantiate(self.pruner) if self._prunes() else optuna.pruners.NopPruner()
        if self.prune and len(self.objectives) > 1:
            log.info("Optuna prunes searches with one objective only; every trial is trained to its end")
        study = optuna.create_study(storage=self.storage, study_name=STUDY, directions=directions, pruner=pruner,
                                    load_if_exists=True)  # fmt: skip
        names = study.user_attrs.get("objectives", self.objectives)
        if names != self.objectives:
            raise ValueError(f"hydra.sweeper.optimize={self.objectives}: the study in {self.storage} has {names}; "
                             "for another search, sweep=NAME")  # fmt: skip
        study.set_user_attr("objectives", self.objectives)
        more = {} if "seed" in self.sampler else {"seed": int(self.config.get("seed", 0)) + len(study.trials)}
        if "seed" not in inspect.signature(get_class(self.sampler._target_)).parameters:
            more = {}
        study.sampler = instantiate(self.sampler, **more)
        return study

    def _prunes(self) -> bool:
        from qat.analysis.leaderboard import COSTS

        return bool(self.prune) and len(self.objectives) == 1 and self.objectives[0] not in COSTS

    def _composed(self, settings: Sequence[str]) -> Any:
        assert self.hydra_context is not None
        assert self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(settings))
        with open_dict(config):
            del config["hydra"]
        return config

    def _chosen(self, params: Mapping[str, Any], space: Mapping[str, Any], layers: Sequence[str],
                fixed: Sequence[str]) -> list[str]:  # fmt: skip
        """A trial's values as overrides."""
        chosen = [f"{key}={dimension.text(params[key])}" for key, dimension in space.items()]
        if layers:
            rules: list[dict[str, Any]] = []
            both = bool(self.layers.activations)
            for name in layers:
                bits = {"bits": params[_bits_of(name)]}
                rules.append({"match": name, "weight": bits, **({"activation": bits} if both else {})})
            config = self._composed([*fixed, *chosen])
            given = OmegaConf.to_container(config.quant.rules, resolve=True, enum_to_str=True)
            assert isinstance(given, list)
            chosen.append(f"quant.rules={literal([*rules, *given])}")
        return chosen

    def _run(self, study: Any, folder: Path, jobs: Mapping[int, list[str]]) -> list[Any]:
        """Launch trials and tell the study what came of them."""
        from optuna.trial import TrialState

        from qat.analysis.runs import is_finished, runs_by_config
        from qat.analysis.search import objective_values

        earlier = runs_by_config(folder)
        places = {number: folder / str(number) for number in jobs}
        for number, job in jobs.items():
            equal = earlier.get(self._key(job))
            if equal is not None and is_finished(equal):
                log.info(f"Trial {number} is the same as {equal.name}, which has finished")
                places[number] = equal
        todo = [([*job, f"hydra.sweep.subdir='{number}'"], places[number]) for number, job in jobs.items()
                if places[number].name == str(number) and not is_finished(places[number])]  # fmt: skip
        returned = self._launch(todo, min(jobs)) if todo else []
        for number in jobs:
            values = objective_values(places[number], self.objectives)
            if values is not None:
                study.tell(number, values)
            elif (places[number] / "pruned.txt").is_file():
                study.tell(number, state=TrialState.PRUNED)
            else:
                study.tell(number, state=TrialState.FAIL)
            said = "failed" if values is None else ", ".join(
                f"{name} {value:.6g}" for name, value in zip(self.objectives, values, strict=True))  # fmt: skip
            state = study.get_trials(deepcopy=False)[number].state
            log.info(f"Trial {number}: {'pruned' if state is TrialState.PRUNED else said}")
        return returned


class Dimension:
    """A setting to search, from its override."""

    def __init__(self, override: Override) -> None:
        self.override, self.sweep = override, override.value()
        texts = list(override.sweep_string_iterator()) if isinstance(self.sweep, ChoiceSweep) else []
        self.texts: dict[Any, str] = {_plain(text): text for text in texts}

    def distribution(self) -> Any:
        """Optuna's form of it.

        Raises:
            ValueError: what Optuna has no form for.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        sweep, log_scale = self.sweep, "log" in getattr(self.sweep, "tags", ())
        if isinstance(sweep, ChoiceSweep):
            return CategoricalDistribution(list(self.texts))
        if isinstance(sweep, RangeSweep):
            values = list(sweep.range())
            if all(isinstance(value, int) for value in values):
                return IntDistribution(values[0], values[-1], log=log_scale, step=1 if log_scale else int(sweep.step))
            return FloatDistribution(float(values[0]), float(values[-1]), step=float(sweep.step))
        if isinstance(sweep, IntervalSweep):
            assert sweep.start is not None
            assert sweep.end is not None
            if isinstance(sweep.start, int):
                return IntDistribution(sweep.start, int(sweep.end), log=log_scale)
            return FloatDistribution(sweep.start, sweep.end, log=log_scale)
        raise ValueError(f"{self.override.input_line}: Optuna searches choice(), range() and interval()")

    def text(self, value: Any) -> str:
        """A value as in an override."""
        return self.texts.get(value, str(value))


def _plain(text: str) -> Any:
    """A choice as Optuna keeps it: a number where it is one."""
    from qat.analysis.summary import number

    return number(text)


def _bits_of(layer: str) -> str:
    return f"{layer} bits"


def literal(value: Any) -> str:
    """Plain data in Hydra's grammar of overrides.

    >>> literal([{"match": "a.*", "weight": {"bits": None}}])
    "[{match: 'a.*', weight: {bits: null}}]"
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
