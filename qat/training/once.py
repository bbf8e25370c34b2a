"""Warnings, each once, as messages of the log."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def warnings_once() -> Iterator[None]:
    """Inside, a warning becomes one line of the log, and is not repeated: a run trains twice, with the same advice."""
    seen: set[tuple[type[Warning], str]] = set()

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if (category, str(message)) not in seen:
            seen.add((category, str(message)))
            log.warning("%s: %s", category.__name__, str(message).strip())

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
