"""What torch's own attention modules compute, in steps that a trace can record; and its circular padding.

They live in torch.nn and choose between kernels by what they find in their inputs, so a trace takes each as one
operation. The functions here compute the same of a module's own parameters and submodules. They make no use of sizes:
inputs may have a batch dimension or none.
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.attention import mask_out, matmul


def multihead_attention(
    m: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward`.

    Raises:
        ValueError: `add_bias_kv`, `add_zero_attn`, or `is_causal` without a mask, which torch refuses too.
    """
    for setting, used in (("add_bias_kv", m.bias_k is not None), ("add_zero_attn", m.add_zero_attn)):
        if used:
            raise ValueError(
                f"nn.MultiheadAttention with {setting}=True cannot be recorded: it adds a key that no input has; make "
                f"it with {setting}=False, or leave it float"
            )
    if is_causal and attn_mask is None:
        raise ValueError("nn.MultiheadAttention: is_causal=True is only a hint about attn_mask; give attn_mask, too")
    q, k, v = (_heads(m, x) for x in _projected(m, query, key, value))
    scores = matmul(q, k.transpose(-2, -1)) * m.head_dim**-0.5
    if attn_mask is not None:
        scores = mask_out(scores, attn_mask)
    if key_padding_mask is not None:
        scores = mask_out(scores, key_padding_mask.unsqueeze(-2).unsqueeze(-2))
    shares = torch.softmax(scores, -1)
    if m.dropout:
        shares = F.dropout(shares, m.dropout, m.training)
    y = matmul(shares, v)
    y = y.transpose(-3, -2) if m.batch_first else y.movedim(-2, 0)
    y = m.out_proj(y.flatten(-2))
    if not need_weights:
        return y, None
    return y, shares.mean(-3) if average_attn_weights else shares


def _projected(m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values of all heads; of one input in one product."""
    bias = m.in_proj_bias
    if m._qkv_same_embed_dim and query is key and key is value:
        return _thirds(F.linear(query, m.in_proj_weight, bias), -1)
    own = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
    weights = _thirds(m.in_proj_weight, 0) if m._qkv_same_embed_dim else own
    biases = [None] * 3 if bias is None else _thirds(bias, 0)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _thirds(x: Tensor, dim: int) -> list[Any]:
    parts = x.chunk(3, dim)  # may be a symbol, which cannot be iterated over
    return [parts[0], parts[1], parts[2]]


def _heads(m: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """[..., heads, steps, size of a head]."""
    x = x.unflatten(-1, (m.num_heads, m.head_dim))
    return x.transpose(-3, -2) if m.batch_first else x.movedim(0, -2)


def encoder_layer(
    m: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerEncoderLayer.forward`."""
    masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}

    def attend(x: Tensor) -> Tensor:
        y: Tensor = m.dropout1(m.self_attn(x, x, x, need_weights=False, **masks)[0])
        return y

    def feed(x: Tensor) -> Tensor:
        y: Tensor = m.dropout2(m.linear2(m.dropout(m.activation(m.linear1(x)))))
        return y

    return _residual(src, m.norm_first, (attend, m.norm1), (feed, m.norm2))


def decoder_layer(
    m: nn.TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerDecoderLayer.forward`."""
    masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
    others = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}

    def attend(x: Tensor) -> Tensor:
        y: Tensor = m.dropout1(m.self_attn(x, x, x, need_weights=False, **masks)[0])
        return y

    def look(x: Tensor) -> Tensor:
        y: Tensor = m.dropout2(m.multihead_attn(x, memory, memory, need_weights=False, **others)[0])
        return y

    def feed(x: Tensor) -> Tensor:
        y: Tensor = m.dropout3(m.linear2(m.dropout(m.activation(m.linear1(x)))))
        return y

    return _residual(tgt, m.norm_first, (attend, m.norm1), (look, m.norm2), (feed, m.norm3))


def _residual(x: Tensor, norm_first: bool, *blocks: tuple[Callable[[Tensor], Tensor], nn.Module]) -> Tensor:
    for block, norm in blocks:
        x = x + block(norm(x)) if norm_first else norm(x + block(x))
    return x


def encoder(
    m: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """`nn.TransformerEncoder.forward`. Whether a mask is causal, which torch finds out, changes nothing here."""
    for layer in m.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
    return src if m.norm is None else m.norm(src)


def decoder(
    m: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerDecoder.forward`."""
    for layer in m.layers:
        tgt = layer(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )  # fmt: skip
    return tgt if m.norm is None else m.norm(tgt)


def transformer(
    m: nn.Transformer,
    src: Tensor,
    tgt: Tensor,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.Transformer.forward`."""
    memory = m.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    result: Tensor = m.decoder(
        tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )  # fmt: skip
    return result


def circular_pad(m: "CircularPad", input: Tensor) -> Tensor:
    """Its `forward`, which also checks the number of dimensions."""
    return F.pad(input, m.padding, "circular")


CircularPad = nn.CircularPad1d | nn.CircularPad2d | nn.CircularPad3d
INSIDE: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: multihead_attention,
    nn.TransformerEncoderLayer: encoder_layer,
    nn.TransformerDecoderLayer: decoder_layer,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoder: decoder,
    nn.Transformer: transformer,
    **dict.fromkeys(get_args(CircularPad), circular_pad),
}
"""Type of torch.nn -> what computes the same."""


def erase_unread(graph: fx.Graph) -> None:
    """Take out the mean over heads of attention whose weights nobody reads."""
    for node in list(graph.nodes):
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.target == "mean" and not node.users and stack and stack[-1][1] is nn.MultiheadAttention:
            graph.erase_node(node)
