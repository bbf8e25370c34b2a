"""Look-ups: rows of a table by their index. Indices are integers already, and are not quantized."""

from collections.abc import Mapping
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.scheme import TensorScheme


def check_settings(kind: str, settings: Mapping[str, Any], name: str) -> None:
    """Refuse what cannot be quantized.

    Raises:
        ValueError: `max_norm` or `sparse`.
    """
    for setting, why in (
        ("max_norm", "rows that are scaled as they are looked up are not those that were quantized"),
        ("sparse", "a scale is shared by rows, so that gradients are dense"),
    ):
        if settings[setting]:
            raise ValueError(
                f"layer '{name}': {kind} with {setting}={settings[setting]} cannot be quantized: {why}; leave "
                f"{setting} out, or exempt the layer by a rule (weight.bits=null)"
            )


class _LookUp(QuantizedLayer):
    multiplies = False
    biased = False
    bias = None

    @classmethod
    def from_float(
        cls, module: nn.Module, scheme: TensorScheme, name: str, activation: TensorScheme | None = None
    ) -> Self:
        check_settings(type(module).__name__, vars(module), name)
        return super().from_float(module, scheme, name, activation)


class QuantEmbedding(_LookUp, nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding` with a fake-quantized table; a channel is a row."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.embedding(input, self.quantized_weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantEmbeddingBag(_LookUp, nn.EmbeddingBag):  # type: ignore[misc]
    """`nn.EmbeddingBag` with a fake-quantized table; a channel is a row."""

    def forward(  # noqa: D102
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return F.embedding_bag(
            input, self.quantized_weight(), offsets, mode=self.mode, scale_grad_by_freq=self.scale_grad_by_freq,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )  # fmt: skip
