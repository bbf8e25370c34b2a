"""Language models of Hugging Face's transformers as they come, built small from a configuration, and their text.

Import it where transformers is installed: `pytest.importorskip("transformers")` first.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
VOCABULARY, MASK = 65, 65
"""Characters of the text; what stands for a masked one."""


def llama(**changes: Any) -> nn.Module:
    """A Llama (Touvron et al. 2023) of two layers: grouped queries, rotary positions, RMSNorm, SwiGLU."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(**changes: Any) -> nn.Module:
    """A BERT (Devlin et al. 2018) of two layers that predicts masked characters; its head is its embedding."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def characters() -> Tensor:
    """Tiny Shakespeare as indices of its 65 characters, in order of their code points."""
    text = FILE.read_text()
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text])


def batch(text: Tensor, masked: bool, n: int = 16, length: int = 32) -> dict[str, Tensor]:
    """Random windows of a text with labels: what transformers calls `input_ids` and `labels`.

    Args:
        text: indices of characters.
        masked: hide a seventh of them, and let only these count (as BERT); else the next one is to be predicted.
        n, length: windows, and characters of each.
    """
    starts = torch.randint(len(text) - length, (n,))
    ids = text[starts[:, None] + torch.arange(length)]
    if not masked:
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape) < 1 / 7
    return {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}


def train(net: nn.Module, text: Tensor, masked: bool, steps: int, lr: float = 3e-3) -> list[float]:
    """Train what requires a gradient with AdamW on random windows; returns the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr)
    losses = []
    net.train()
    for _ in range(steps):
        loss = net(**batch(text, masked)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    return losses
