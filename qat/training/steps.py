"""Steps of training: how many there are, and moments that are given as a step or as a share of them."""

import lightning as L

from qat.training.averaging import training_share


def total_steps(trainer: L.Trainer) -> int:
    """How many optimizer steps `fit` takes.

    Raises:
        ValueError: there is no end.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("QATSchedule needs to know how long training is: set trainer.max_epochs or trainer.max_steps")
    return max(round(total * training_share(trainer)), 1)


def step_of(at: float | int, total: int) -> float:
    """The step that a moment is: itself (int), or a share of all steps (float).

    >>> step_of(12, 100), step_of(0.5, 100)
    (12, 50.0)
    """
    return at * total if isinstance(at, float) else at


def reached(at: float | int | None, step: int, total: int) -> bool:
    """Whether a moment has come; None never does."""
    return at is not None and step >= step_of(at, total)


def check_moment(name: str, at: float | int | None) -> None:
    """Refuse what is neither a step nor a share of training.

    Raises:
        ValueError: names the field and its value.
    """
    if at is not None and (at < 0 or (isinstance(at, float) and at > 1)):
        raise ValueError(f"{name}={at}: give a step (int) or a share of training in [0.0, 1.0]")
