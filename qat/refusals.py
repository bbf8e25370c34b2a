"""What cannot be done with single layers, told at once: nobody wants to hear of the next one after the next attempt."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refusals:
    """Collects the messages of ValueErrors.

    >>> refusals = Refusals()
    >>> for name in ("a", "b"):
    ...     with refusals.noted():
    ...         raise ValueError(f"layer '{name}' is not possible")
    >>> refusals.raise_any()
    Traceback (most recent call last):
    ValueError: layer 'a' is not possible
    layer 'b' is not possible
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, a ValueError is noted and ends the block."""
        try:
            yield
        except ValueError as error:
            self.messages.append(str(error))

    def raise_any(self) -> None:
        """Raise one ValueError with what was noted, a line each, if anything was."""
        if self.messages:
            raise ValueError("\n".join(dict.fromkeys(self.messages)))
