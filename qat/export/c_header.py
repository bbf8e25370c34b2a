"""A folder for firmware: the network as a C header, a C program and a NumPy program that run it.

`model.h` is the network: weights, biases, multipliers and shifts, the steps in order, and where each tensor lies in
memory. `model.c` (C99) and `run.py` (NumPy alone) read nothing else, and compute what the integer reference computes,
to the integer, on one sample at a time.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.files import replaced_folder
from qat.export.firmware.run import OPERATIONS, Model
from qat.export.header_steps import STEPS, Step, refused
from qat.export.sums import verify
from qat.refusals import Refusals
from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.operations import Dequantize, QuantizeInput
from qat.scheme import QuantConfig
from qat.targets import TARGETS

RUNNERS = Path(__file__).parent / "firmware"
C_TYPES = {torch.int8: "int8_t", torch.int32: "int32_t"}


def check_c_header(config: QuantConfig) -> None:
    """Refuse a target that scales in float. Raises a ValueError that says which targets do not."""
    if TARGETS[config.target].requantize != "fixed_point":
        fits = " or ".join(name for name, target in TARGETS.items() if target.requantize == "fixed_point")
        raise ValueError(
            f"export.formats=c_header: target={config.target} scales in float, and the header holds multipliers and "
            f"shifts; use target={fits}"
        )


@torch.no_grad()
def save_c_header(network: IntegerNetwork, folder: str | Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write `model.h`, `model.c` and `run.py`.

    Args:
        network: lowered for a target with fixed-point scales.
        folder: written whole or not at all.
        example_inputs: of one input; sizes are those of its first sample.

    Raises:
        ValueError: layers that the runners do not have; names each.
        OSError: the folder or the disk refuses.
    """
    text = Header(network, example_inputs).text()
    with replaced_folder(Path(folder), lambda path: (path / "model.h").exists()) as new:
        (new / "model.h").write_text(text, encoding="ascii")
        for name in ("model.c", "run.py"):
            (new / name).write_bytes((RUNNERS / name).read_bytes())


def open_c_header(folder: str | Path, target: str = "") -> Callable[[Tensor], Tensor]:
    """What `run.py` makes of a folder's `model.h`: float32 [samples, ...] -> float32.

    Raises:
        FileNotFoundError: there is no model.h.
        ValueError: it is truncated, edited, damaged, or of another program.
    """
    path = Path(folder) / "model.h"
    if not path.is_file():
        raise FileNotFoundError(f"no C header at '{path}'")
    verify(path.parent)
    try:
        if not path.read_text(encoding="ascii").rstrip().endswith("#endif"):
            raise ValueError("its last line is not #endif")
        model = Model(path)
        for kind, *names in model.steps:
            unknown = [name for name in names if name != "NULL" and name not in model.arrays]
            if kind not in OPERATIONS or len(names) != 5 or unknown:
                raise ValueError(f"its step {kind} of {', '.join(names)} is none")
    except (KeyError, ValueError) as error:
        raise ValueError(f"'{path}' is no header of ours, or is damaged ({error}); export again") from error
    return lambda x: torch.from_numpy(np.ascontiguousarray(model(x.numpy())))


@dataclass
class Header:
    """The text of `model.h`, as it is put together."""

    network: IntegerNetwork
    inputs: tuple[Tensor, ...]
    ids: dict[str, int] = field(default_factory=dict)  # tensor of the network -> number of the tensor in memory
    sizes: list[tuple[int, int]] = field(default_factory=list)  # values, bytes of a value
    alive: list[list[int]] = field(default_factory=list)  # first and last step
    arrays: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def text(self) -> str:
        """The whole file."""
        network = self.network
        if len(network.inputs) != 1 or len(network.outputs) != 1:
            raise ValueError(
                f"c_header: one input and one output; the network has {', '.join(network.inputs)} -> "
                f"{', '.join(network.outputs)}"
            )
        tensors = network.run(*(x[:1] for x in self.inputs))
        first = [node for node in network.nodes if isinstance(network.layer(node.name), QuantizeInput)]
        if len(first) != 1 or not isinstance(network.layer(network.outputs[0]), Dequantize):
            raise ValueError("c_header: the network takes real numbers and returns them, quantized once; this one does "
                             "not; lower it with target=cmsis_nn or integer_only")  # fmt: skip
        refusals = Refusals()
        for node in network.nodes:
            with refusals.noted():
                self._append(node, network.layer(node.name), tensors)
            self.ids.setdefault(node.name, -1)  # of a refused layer; nothing is written
        refusals.raise_any()
        output = self.ids[network.outputs[0]]
        self.alive[output][1] = len(self.steps)
        source = network.nodes[[node.name for node in network.nodes].index(network.outputs[0])].inputs[0]
        return self._file(first[0].name, source, [int(n) for n in tensors[source].shape[1:]])

    def _append(self, node: Node, layer: RuntimeLayer, tensors: dict[str, Tensor]) -> None:
        """A layer's steps, arrays and place in memory."""
        if isinstance(layer, QuantizeInput):
            self.tensor(node.name, tensors[node.name])
        elif isinstance(layer, Dequantize) and node.name == self.network.outputs[0]:
            self.ids[node.name] = self.ids[node.inputs[0]]
        elif type(layer) in STEPS:
            for step in STEPS[type(layer)](self, node.name, layer, list(node.inputs), tensors):
                self.add(node.name, step, tensors)
        else:
            raise refused(node.name, layer)

    def tensor(self, name: str, value: Tensor) -> int:
        """A place in memory for a tensor of one sample."""
        if value.dtype not in C_TYPES:
            raise ValueError(f"c_header: '{name}' holds {value.dtype}, and the runners int8 and int32; use 8 bits")
        self.ids[name] = len(self.sizes)
        self.sizes.append((value.numel(), value.element_size()))
        self.alive.append([len(self.steps), len(self.steps)])
        return self.ids[name]

    def add(self, name: str, step: Step, tensors: dict[str, Tensor]) -> None:
        """Append a step and its arrays."""
        for i in step.reads:
            self.alive[i][1] = len(self.steps)
        self.alive[step.makes][1] = max(self.alive[step.makes][1], len(self.steps))
        fields = [self.array(f"{name}.parameters", torch.tensor(step.parameters, dtype=torch.int32))]
        for key in ("weight", "bias", "multiplier", "shift"):
            value = getattr(step, key)
            fields.append("NULL" if value is None else self.array(f"{name}.{key}", value.flatten()))
        shape = list(tensors[name].shape[1:])
        self.steps.append(f"  /* {name}: {shape} */\n  {{MODEL_{step.kind}, {', '.join(fields)}}},")

    def array(self, name: str, values: Tensor) -> str:
        """Append an array; returns its name in C."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        base = f"n{base}" if base[0].isdigit() else base
        unique, i = base, 2
        while unique in self.named:
            unique, i = f"{base}_{i}", i + 1
        self.named.add(unique)
        self.arrays.append(f"static const {C_TYPES[values.dtype]} {unique}[{values.numel()}] = {_braces(values)};")
        return unique

    def _arena(self) -> tuple[list[int], int]:
        """An offset for every tensor, such that no two that live at the same time overlap; and the end of the last."""
        places: list[tuple[int, int]] = []
        for i, (count, width) in enumerate(self.sizes):
            others = sorted(
                places[j] for j in range(i)
                if self.alive[j][0] <= self.alive[i][1] and self.alive[i][0] <= self.alive[j][1]
            )  # fmt: skip
            start = 0
            for low, high in others:
                if start + count * width <= low:
                    break
                start = max(start, -(-high // 4) * 4)
            places.append((start, start + count * width))
        return [low for low, _ in places], max(high for _, high in places)

    def _file(self, first: str, last: str, shape: list[int]) -> str:
        offsets, end = self._arena()
        grids: list[Any] = [self.network.grid(name) for name in (first, last)]
        source, target = grids
        assert isinstance(source, Quantize)
        assert isinstance(target, Quantize)
        output = self.ids[last]
        kind = {1: "int8_t", 4: "int32_t"}[self.sizes[output][1]]
        table = torch.tensor(
            [[offset, *size] for offset, size in zip(offsets, self.sizes, strict=True)], dtype=torch.int32
        )  # fmt: skip
        weights = sum(len(a.split(",")) for a in self.arrays if "int8_t" in a)
        defines = {
            "ARENA": end, "INPUT": self.ids[first], "INPUT_SCALE": _float(source.scale),
            "INPUT_ZERO": int(source.zero_point), "INPUT_MIN": source.quant_min, "INPUT_MAX": source.quant_max,
            "OUTPUT": output, "OUTPUT_SCALE": _float(target.scale), "OUTPUT_ZERO": int(target.zero_point),
            "OUTPUT_TYPE": kind,
        }  # fmt: skip
        return "\n".join([
            f"/* {weights} bytes of weights and tables, {end} bytes of memory for tensors, {len(self.steps)} steps.",
            " *",
            " * Real numbers are scale * (integer - zero). A layer multiplies its sums by multiplier * 2^(shift - 31),",
            " * rounded once (CMSIS_NN_USE_SINGLE_ROUNDING). model.c and run.py explain the parameters. */",
            "#ifndef MODEL_H", "#define MODEL_H", "#include <stddef.h>", "#include <stdint.h>", "",
            *(f"#define MODEL_{name} {value}" for name, value in defines.items()), "",
            "enum { " + ", ".join(f"MODEL_{name}" for name in KINDS) + " };",
            "typedef struct {", "  int32_t operation;", "  const int32_t *parameters;", "  const int8_t *weight;",
            "  const int32_t *bias, *multiplier, *shift;", "} model_step;", "",
            "int8_t *model_input(void);", "void model_run(void);", "const void *model_output(void);", "",
            f"static const int32_t MODEL_OUTPUT_SHAPE[{max(len(shape), 1)}] = {_braces(shape or [1])};",
            "/* offset in the arena, values, bytes of a value */",
            f"static const int32_t MODEL_TENSORS[{table.numel()}] = {_braces(table.flatten())};", "",
            *self.arrays, "", "static const model_step MODEL_STEPS[] = {", *self.steps, "};", "", "#endif", "",
        ])  # fmt: skip


KINDS = ("CONV", "LINEAR", "ADD", "MULTIPLY", "MEAN", "AVERAGE", "MAX", "CLAMP", "TABLE", "CONSTANT", "COPY")


def _float(value: Tensor) -> str:
    """A float32 to the bit."""
    text = f"{float(value):.9g}"
    return f"{text if 'e' in text or '.' in text else text + '.0'}"


def _braces(values: Tensor | Sequence[int]) -> str:
    numbers = [str(int(v)) for v in (values.tolist() if isinstance(values, Tensor) else values)]
    rows = [", ".join(numbers[i : i + 20]) for i in range(0, len(numbers), 20)]
    return "{" + rows[0] + "}" if len(rows) == 1 else "{\n  " + ",\n  ".join(rows) + "\n}"
