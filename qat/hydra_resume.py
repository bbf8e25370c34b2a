"""`ckpt_path=last` and `ckpt_path=RUN_DIRECTORY`: a command goes on with an earlier run."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from qat.hydra_schema import USER_ERRORS
from qat.training.state import VOLATILE, read_state, running, runs
from qat.training.weights import differing


def origin(cfg: DictConfig) -> dict[str, Any]:
    """What Hydra made of a command line, as plain data: `config` with its interpolations, `overrides`, `choices`."""
    hydra = HydraConfig.get()
    return {
        "config": OmegaConf.to_container(cfg, enum_to_str=True),
        "overrides": [text for text in hydra.overrides.task if _key(text) != "ckpt_path"],
        "choices": OmegaConf.to_container(hydra.runtime.choices),
    }


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


class GoOn(Callback):
    """`ckpt_path=last` and `ckpt_path=RUN_DIRECTORY`: take the configuration, and the directory, of an earlier run.

    Before Hydra makes a run directory, the composed configuration becomes that of the earlier run. What the command
    line sets otherwise is refused. (`hydra.callbacks`)
    """

    def on_run_start(self, config: DictConfig, *, config_name: str | None = None, **kwargs: Any) -> None:
        """Find the run; ends the process with 1 where there is none to go on with."""
        asked = config.ckpt_path
        if asked is None or (asked != "last" and not Path(asked).is_dir()):
            return
        try:
            folder, state = self._find(config, config_name)
        except USER_ERRORS as error:  # Hydra makes a warning of what callbacks raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)
        with read_write(config), open_dict(config):
            for key, value in state["hydra"]["config"].items():
                config[key] = value
            config.ckpt_path = config.hydra.run.dir = str(folder)
            config.hydra.overrides.task = state["hydra"]["overrides"]
            config.hydra.runtime.choices = state["hydra"]["choices"]

    def _find(self, config: DictConfig, config_name: str | None) -> tuple[Path, dict[str, Any]]:
        asked, given = str(config.ckpt_path), [t for t in config.hydra.overrides.task if _key(t) != "ckpt_path"]
        here = Path(config.hydra.run.dir)
        if asked != "last":
            found, where = [Path(asked)], f"'{asked}'"
        elif any(_key(text) == "hydra.run.dir" for text in config.hydra.overrides.hydra):
            found, where = [here], f"'{here}'"
        else:
            found, where = runs(here.parents[1], depth=2), f"'{here.parents[1]}'"
        reasons = []
        for folder in found:
            state = read_state(folder)
            if state is None:
                reasons.append(f"{folder} is no directory of a run that has begun")
            elif (process := running(folder)) is not None and not _is_worker():
                reasons.append(f"{folder} is running, in process {process}")
            elif differ := self._contradictions(given, state["hydra"], config_name):
                reasons.append(f"{folder} is of another configuration: {'; '.join(differ)}")
            else:
                return folder, state
        more = f": {reasons[0]}" if reasons else ""
        raise ValueError(f"ckpt_path={asked}: there is no unfinished run to go on with in {where}{more}")

    def _contradictions(self, given: list[str], stored: dict[str, Any], config_name: str | None) -> list[str]:
        """What the command line sets otherwise than the run has it."""
        if not given:
            return []
        kept = [text for text in stored["overrides"] if _key(text) not in map(_key, given)]
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(config_name, [*kept, *given], run_mode=RunMode.RUN)
        with open_dict(config):
            del config["hydra"]
        now: Any = OmegaConf.to_container(config, enum_to_str=True)
        ours = [{key: value for key, value in part.items() if key not in VOLATILE} for part in (stored["config"], now)]
        return differing(*ours)


def _is_worker() -> bool:
    """Whether another process of the same distributed run has started this one, or stands beside it."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
