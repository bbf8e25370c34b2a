"""What stopped a recording: the line of the user's code, and what to write there."""

import re
from pathlib import Path

import torch
from torch import fx

_TORCH, _QAT = Path(torch.__file__).parent, Path(__file__).parent


def _is_own(filename: str) -> bool:
    """Whether a file is the user's: not torch's, not what records and computes here; the zoo's networks are ones."""
    path = Path(filename)
    inner = path.is_relative_to(_QAT) and not path.is_relative_to(_QAT / "zoo")
    return not inner and not path.is_relative_to(_TORCH) and path.name != "contextlib.py"


_ADVICE: tuple[tuple[str, str], ...] = (
    ("iterated",
     "A recording does not know how many parts a tensor has; index them (x[0], x[1]) or write the loop as an operation "
     "of the whole tensor."),
    ("control flow|converted to bool",
     "Control flow that depends on the values of tensors cannot be recorded; move it out of forward, into a submodule "
     "of its own."),
    ("'len'", "A recording knows no lengths; write x.shape[0] for len(x)."),
    (r"^(int|float|complex)\(\)|as an integer|must be real number",
     "A recording has symbols in place of numbers: a size needs no int() (x.shape[0] is one already), a value stays a "
     "tensor (x.sum() for float(x.sum())), and a loop cannot run over a size."),
    ("numpy|__array|array_interface",
     "NumPy and torch.tensor() copy values, which a recording does not have; use torch's functions of the tensor."),
    (r"^(zeros|ones|full|empty|rand|randn|arange)\(\)",
     "A recording cannot make a tensor of a computed size this way; write x.new_zeros(...), x.new_ones(...) or "
     "torch.zeros_like(x)."),
)  # fmt: skip
"""What an error of a recording says (a regular expression) -> what to do."""


def advice(error: Exception) -> str:
    """What to do about an error of the network's code under a recording; nothing for our own, which say it."""
    text, tb = str(error), error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is not None and Path(tb.tb_frame.f_code.co_filename).is_relative_to(_QAT):
        return ""
    known = (what for pattern, what in _ADVICE if re.search(pattern, text))
    return next(known, "What cannot be computed with symbols in place of tensors belongs into a submodule of its own.")


def last_user_line(error: BaseException) -> str:
    """The last line of the user's code that an error went through, as " at FILE:LINE"."""
    frames = []
    tb = error.__traceback__
    while tb is not None:
        filename = tb.tb_frame.f_code.co_filename
        if _is_own(filename):
            frames.append(f" at {filename}:{tb.tb_lineno}")
        tb = tb.tb_next
    return frames[-1] if frames else ""


def line_of(node: fx.Node | None) -> str:
    """The line of the network's code that made a call, as " at FILE:LINE"."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "") if node is not None else []
    lines = [f" at {file}:{line}" for file, line in found if _is_own(file)]
    return lines[-1] if lines else ""
