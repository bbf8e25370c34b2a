"""Integer networks: a readable reference and a fast path with the same results. Needs nothing of the training code."""

from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer
from qat.runtime.network import LAYERS, IntegerNetwork, Node

__all__ = ["LAYERS", "FloatConv", "IntegerConv", "IntegerNetwork", "Node", "Quantize", "RuntimeLayer"]
