"""What each step of a C header makes of given integers, as the NumPy program beside it computes them."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.export.firmware.run import OPERATIONS, Model
from qat.export.given import Inputs, Integers, Made
from qat.export.sums import verify
from qat.runtime.grid import Quantize

MADE_BY = re.compile(r"^  /\* (.+): \[[\d, ]*\] \*/$", re.MULTILINE)
"""The name, in the line above a step, of the tensor that it makes."""

MAKES_FIRST = ("MODEL_ADD", "MODEL_MULTIPLY", "MODEL_CONSTANT")
"""Steps whose first parameter is what they make; of others it is the second, behind what they read."""


def c_header_given(
    folder: Path, target: str, grids: Mapping[str, Quantize], inputs: Inputs, given: Integers
) -> Made:  # fmt: skip
    """What each step makes of `given` integers. A header says scale and zero point of its input and output only."""
    verify(folder)
    path = folder / "model.h"
    model, names = Model(path), MADE_BY.findall(path.read_text(encoding="ascii"))
    last = {name: i for i, name in enumerate(names)}  # a concatenation is made in several steps
    made = dict[str, Tensor]()
    levels = {}

    def cut(name: str, tensor: int) -> None:
        if tensor == model.output:
            levels[name] = (float(model.output_scale), model.output_zero)
        if name in given:
            kept = model.tensors[tensor]
            made[name] = torch.from_numpy(kept.copy()).reshape(given[name].shape)
            model.tensors[tensor] = given[name].numpy().astype(kept.dtype).reshape(kept.shape)

    model.tensors = {model.input: model.quantize(inputs[0].numpy())}
    unmade = [name for name in given if name not in last]
    if len(unmade) == 1:  # no step makes the input
        levels[unmade[0]] = (float(model.input_scale), model.input_zero)
        cut(unmade[0], model.input)
    for i, ((kind, key, *arrays), name) in enumerate(zip(model.steps, names, strict=True)):
        parameters = [int(p) for p in model.arrays[key]]
        OPERATIONS[kind](model, parameters, *(None if array == "NULL" else model.arrays[array] for array in arrays))
        if last[name] == i:
            cut(name, parameters[0 if kind in MAKES_FIRST else 1])
    integers = model.tensors[model.output].reshape(-1, *model.output_shape)
    output = (integers.astype(np.float32) - np.float32(model.output_zero)) * model.output_scale
    return Made(made, (torch.from_numpy(np.ascontiguousarray(output)),), levels)
