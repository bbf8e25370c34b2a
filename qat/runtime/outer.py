"""Products of all pairs: what turns a bilinear layer into a linear one."""

from torch import Tensor

from qat.runtime.layers import RuntimeLayer


class Outer(RuntimeLayer):
    """`a[..., i] * b[..., j]` at position `i * len(b) + j` of the last dimension; real numbers."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[..., in1] and [..., in2] -> [..., in1 * in2]."""
        return self.emit((a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2))
