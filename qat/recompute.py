"""Activation checkpointing runs a forward a second time, in the backward pass: state must not move again then."""

import torch


def recomputing() -> bool:
    """Whether this forward repeats one, inside a backward pass (a compiled step repeats what changes no state)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
