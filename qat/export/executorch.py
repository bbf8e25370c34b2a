"""ExecuTorch's `.pte`, for XNNPACK: the network in reference quantized operations, handed to the delegate.

XNNPACK takes a grid for all of int8: it reads no bounds of a quantize operation, so that a ReLU, or a grid of fewer
bits, that is nothing but bounds would be lost. `reference.Grid` puts a clamp of real numbers in front, which XNNPACK
makes part of its kernel. A program takes one sample a call: where the batch was open, ExecuTorch 1.5 planned memory for
15 samples, and a ResNet-20 that was called with 8 and then with 15 gave wrong results. What XNNPACK does not take,
ExecuTorch's own kernels run (`executorch.kernels.quantized` registers them).
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.export.files import write_export
from qat.export.reference import program_of
from qat.export.sums import verify
from qat.runtime.network import IntegerNetwork


def save_pte(network: IntegerNetwork, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write a network as `.pte`, whole or not at all: int8 activations, one sample a call.

    Raises:
        ValueError: a layer that has no reference operations.
        OSError: the folder or disk refuses.
    """
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program, _ = program_of(network, tuple(torch.zeros_like(x) for x in example_inputs), torch.int8, one=True)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    content = io.BytesIO()
    lowered.write_to_file(content)
    write_export(path, content.getvalue())


class PteNetwork:
    """A `.pte`, read back and run by ExecuTorch, sample by sample.

    Args:
        path: of the file.
        target: not asked.

    Raises:
        ValueError: no `.pte`, or a damaged one.
    """

    def __init__(self, path: Path, target: str) -> None:
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime, Verification

        verify(path)
        try:
            program = Runtime.get().load_program(path.read_bytes(), verification=Verification.InternalConsistency)
            self.method = program.load_method("forward")
        except RuntimeError as error:
            raise ValueError(f"{path}: ExecuTorch cannot read it ({error}); export the network again") from error
        self.program = program  # holds the memory that the method reads

    def __call__(self, *inputs: Tensor) -> Any:
        """As the network that was exported."""
        made = [self._run(sample) for sample in zip(*(x.split(1) for x in inputs), strict=True)]
        joined = tuple(torch.cat(tensors) for tensors in zip(*made, strict=True))
        return joined[0] if len(joined) == 1 else joined

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = self.method.execute(tuple(x.contiguous() for x in inputs))
        return tuple(x.clone() for x in made)  # the runtime's memory is used again
