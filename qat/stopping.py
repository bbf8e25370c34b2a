"""SIGINT and SIGTERM as requests: training stops between two steps, anything else at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_asked: int | None = None
_raised = _listening = False
_between_steps = 0


class Stopped(BaseException):
    """A signal asked this process to end. It is no error, so `except Exception` does not see it.

    Attributes:
        signum: the signal; `exit_code` is 128 more, as shells have it (130, 143).
        told: whether it was said already how to go on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_code, self.told = signum, 128 + signum, False


def asked() -> int | None:
    """The signal that asks to stop; None for none."""
    return _asked


def _handle(signum: int, frame: FrameType | None) -> None:
    global _asked, _raised
    again, _asked = _asked is not None, signum
    if _raised and signum == signal.SIGTERM:
        return  # it ends already
    if not _between_steps or (again and signum == signal.SIGINT):
        _raised = True
        raise Stopped(signum)
    if signum == signal.SIGINT:
        os.write(sys.stderr.fileno() if sys.stderr else 2, b"\nStopping after this step; Ctrl-C again: at once\n")


def listen() -> None:
    """Take the signals (again: a library may have put its own handlers in the place of ours)."""
    if _listening:
        for signum in SIGNALS:
            signal.signal(signum, _handle)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, a signal raises `Stopped`, or in `between_steps` waits to be asked for.

    Only the main thread of a process can take signals; in any other this does nothing.
    """
    global _asked, _raised, _listening
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _asked, _raised, _listening = None, False, True
    listen()
    try:
        yield
    finally:
        _asked, _raised, _listening = None, False, False
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def between_steps() -> Iterator[None]:
    """Inside, somebody asks `asked()` between steps and raises `Stopped`; only a second SIGINT stops at once."""
    global _between_steps
    _between_steps += 1
    try:
        yield
    finally:
        _between_steps -= 1
