"""A small decoder-only transformer, free of quantization code, traceable by `torch.fx`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.zoo.models import _require_positive


class SelfAttention(nn.Module):
    """Causal attention of several heads: each position looks at itself and at those before it.

    Args:
        width: channels of the input and of the output.
        n_head: number of heads; divides `width`.
        dropout: share of the attention weights, and of the outputs, that training drops.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """

    def __init__(self, width: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (N, T, 3, heads, width of a head)
        q, k, v = heads.transpose(1, 3).unbind(2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention, then two linear layers with GELU between them, each behind a LayerNorm and added to its input.

    Args:
        width: channels of the input and of the output.
        n_head: number of heads.
        dropout: share of values that training drops.

    Source: Radford et al. 2019 (GPT-2), section 2.3 (LayerNorm at the input of each part).
    """

    def __init__(self, width: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, n_head, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharGPT(nn.Module):
    """Embedded characters plus learned positions, blocks of attention and MLP, LayerNorm, a linear head.

    Args:
        num_classes: size of the vocabulary.
        context: largest number of characters that it reads.
        n_layer: number of blocks.
        n_head: heads of each block; divides `width`.
        width: channels of every position.
        dropout: share of values that training drops, in [0, 1).
        tied_head: the head's weight is that of the embedding (Press and Wolf 2017, arXiv 1608.05859).

    Raises:
        ValueError: an argument is not valid.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, with its
    initialisation: normal, 0.02, and 0.02 / sqrt(2 n_layer) for what is added to the residual.
    """

    def __init__(
        self,
        num_classes: int,
        context: int = 64,
        n_layer: int = 2,
        n_head: int = 4,
        width: int = 64,
        dropout: float = 0.0,
        tied_head: bool = False,
    ) -> None:
        super().__init__()
        _require_positive(num_classes=num_classes, context=context, n_layer=n_layer, n_head=n_head, width=width)
        if width % n_head:
            raise ValueError(f"n_head={n_head} is not valid: it does not divide width={width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not valid: give a number in [0, 1)")
        self.context = context
        self.embedding = nn.Embedding(num_classes, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, n_head, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=not tied_head)
        nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("attention.out", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * n_layer) ** 0.5 if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map indices (N, T) int64, T at most `context`, to logits of each next character (N, T, num_classes)."""
        y = self.drop(self.embedding(x) + self.positions[: x.size(1)])
        return self.head(self.norm(self.blocks(y)))
