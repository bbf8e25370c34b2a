"""LightningModules of others, prepared as they are: loading their checkpoints."""

from pathlib import Path
from typing import Any

import lightning as L

from qat.prepare import prepare
from qat.subclass import prepared_class


def load_from_checkpoint(module: type[L.LightningModule], path: str | Path, **kwargs: Any) -> Any:
    """Load a checkpoint of a prepared LightningModule where only the user's own class is known (a new process).

    Where a prepared module is at hand, `type(prepared).load_from_checkpoint(path)` does the same.

    Args:
        module: the user's class, which knows nothing of `qat`.
        path: a checkpoint that Lightning wrote while training `qat.prepare(module(...), ...)`.
        kwargs: as for Lightning's `load_from_checkpoint`: `map_location`, `strict`, and arguments of `module` that the
            checkpoint does not hold (without `save_hyperparameters`, all of them). Where `forward` takes objects of
            your own classes (dataclasses), the checkpoint holds examples of them: `weights_only=False`, if trusted.

    Returns:
        A module of the prepared class, its weights, ranges and mode as they were saved.

    Raises:
        ValueError: the checkpoint is of the float module.
    """
    return prepared_class(module, prepare).load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
