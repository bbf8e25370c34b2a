"""TableLinear: a linear layer as a sum of table look-ups, approximate in its inputs."""

from typing import Self

import torch
from torch import Tensor, nn

from qat.numerics.product import ProductCodebook, aggregate, build_tables, encode


class TableLinear(nn.Module):
    """A linear layer whose input is encoded as nearest prototypes, and whose output is a sum of their products.

        y = sum over subspaces s of tables[s, code[s]] + bias

    Exact for inputs made of prototypes. Made by `from_linear`; the constructor leaves the numbers at zero, for
    `load_state_dict` to fill. It does not train.

    Args:
        inputs, outputs: features; `inputs` is a multiple of `width`.
        width: inputs a subspace.
        entries: prototypes a subspace, 1 to 256.

    Source: Blalock & Guttag 2017, "Bolt", section 4 (the tables kept in float here).
    """

    prototypes: Tensor
    tables: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int, width: int, entries: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(inputs // width, entries, width))
        self.register_buffer("tables", torch.zeros(inputs // width, entries, outputs))
        self.register_buffer("bias", torch.zeros(outputs))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, codebook: ProductCodebook) -> Self:
        """The layer that equals `linear` on inputs that `codebook` holds exactly."""
        _, entries, width = codebook.prototypes.shape
        layer = cls(linear.in_features, linear.out_features, width, entries).to(linear.weight.device)
        layer.tables.copy_(build_tables(linear.weight, codebook))
        layer.prototypes.copy_(codebook.prototypes)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of `x`."""
        codes = encode(x.reshape(-1, x.shape[-1]), ProductCodebook(self.prototypes))
        return (aggregate(codes, self.tables) + self.bias).reshape(*x.shape[:-1], self.bias.numel()).to(x.dtype)

    def extra_repr(self) -> str:  # noqa: D102
        subspaces, entries, width = self.prototypes.shape
        return f"{subspaces * width} -> {self.bias.numel()}, {subspaces} subspaces x {entries} prototypes"
