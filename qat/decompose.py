"""Calls that do several steps in one, as the steps, so that what stands between them can be quantized."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat.attention import add_mask, causal
from qat.tracing import MODES, ByMode

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def decompose_attention(prepared: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> bool:
    """Replace F.scaled_dot_product_attention by matmul, mask, softmax, dropout and matmul.

    Args:
        prepared: a traced network; it is changed.
        shapes: of its tensors, for the default scale `1 / sqrt(size of a head)`.

    Returns:
        Whether there was one.

    Raises:
        ValueError: dropout that is applied in evaluation, too, or grouped queries.
    """
    calls = [node for node in prepared.graph.nodes if node.target is F.scaled_dot_product_attention]
    for node in calls:
        given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
        if given.get("enable_gqa"):
            raise ValueError(
                f"'{node.name}': attention with enable_gqa=True cannot be prepared; repeat keys and values to the "
                f"number of query heads first (torch.repeat_interleave)"
            )
        dropout = _dropout(prepared, node, given.get("dropout_p", 0.0))
        scale = given.get("scale")
        scale = 1 / math.sqrt(shapes[given["query"]][-1]) if scale is None else scale
        with prepared.graph.inserting_before(node):
            call = prepared.graph.call_function
            keys = prepared.graph.call_method("transpose", (given["key"], -2, -1))
            steps = [keys, call(torch.matmul, (given["query"], keys))]
            steps.append(call(torch.mul, (steps[-1], scale)))
            if given.get("is_causal"):
                steps.append(call(causal, (steps[-1],)))
            if given.get("attn_mask") is not None:
                steps.append(call(add_mask, (steps[-1], given["attn_mask"])))
            steps.append(call(torch.softmax, (steps[-1], -1)))
            if dropout is not None:
                steps.append(prepared.graph.call_module(dropout, (steps[-1],)))
            steps.append(call(torch.matmul, (steps[-1], given["value"])))
        for step in steps:
            step.meta = dict(node.meta)
        node.replace_all_uses_with(steps[-1])
        prepared.graph.erase_node(node)
        if isinstance(given.get("dropout_p"), fx.Node) and not given["dropout_p"].users:
            prepared.graph.erase_node(given["dropout_p"])
    prepared.recompile()
    return bool(calls)


def _dropout(prepared: fx.GraphModule, node: fx.Node, share: Any) -> str | None:
    """The path of a new nn.Dropout; None where nothing is ever dropped."""
    train = evaluation = share
    if isinstance(share, fx.Node):
        module = prepared.get_submodule(str(share.target)) if share.op == "call_module" else None
        if not isinstance(module, ByMode):
            raise ValueError(f"'{node.name}': dropout_p={share} is computed; give a number")
        train, evaluation = module.train_value, module.eval_value
    if evaluation:
        raise ValueError(
            f"'{node.name}': dropout_p={evaluation} drops values in evaluation, too; pass "
            f"dropout_p=p if self.training else 0.0"
        )
    if not train:
        return None
    prepared.add_submodule(f"{MODES}.{node.name}", nn.Dropout(float(train)))
    return f"{MODES}.{node.name}"
