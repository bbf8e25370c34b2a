"""A vision transformer (Dosovitskiy et al. 2021), small, and an encoder-decoder of sequences (Vaswani et al. 2017)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention by scaled_dot_product_attention, its sizes read from the input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, steps, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)[:3]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(batch, steps, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions, blocks, and a head on the class token."""

    def __init__(
        self, *, size: int = 16, patch: int = 4, width: int = 24, heads: int = 3, depth: int = 2, classes: int = 10,
        dropout: float = 0.0, own_blocks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.1)
        self.blocks: nn.Module
        if own_blocks:
            self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        else:
            layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Translator(nn.Module):
    """Tokens in, scores of tokens out: nn.Transformer between an embedding and a head that share their weight."""

    def __init__(self, words: int = 17, steps: int = 6, width: int = 16, **settings: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(steps, width) * 0.1)
        self.transformer = nn.Transformer(
            width, 2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=24, dropout=0.0, batch_first=True,
            **settings,
        )  # fmt: skip
        mask = nn.Transformer.generate_square_subsequent_mask(steps)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = (self.words(tokens) + self.positions for tokens in (source, target))
        y = self.transformer(x, y, tgt_mask=self.mask, tgt_is_causal=True)
        return F.linear(y, self.words.weight)
