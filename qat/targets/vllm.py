"""vLLM, and compressed-tensors, whose files it reads: one table of what both take.

A file of that format says how the weights are stored (`Kernel.stored`) and how a runtime makes its activations, layer
by layer. The package of that name unpacks integers of 1 to 8 bits and groups of any size; vLLM has kernels for what is
here (`WNA16_SUPPORTED_BITS`, `MARLIN_SUPPORTED_GROUP_SIZES`, `_get_scheme_from_parts` in its source). A scale a tensor
is written as one a channel.
"""

from dataclasses import replace

from qat.targets.limits import ELEMENTWISE, FLOAT, IN_FLOAT, NORMS, Kernel, Limits, Target

FLOAT8 = {"e4m3fn": (8,)}
GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale, with integers."""


def _blocks(format: str, size: int) -> Limits:
    """4-bit floats in blocks."""
    return Limits(formats={format: (4,)}, granularities=("group",), group_sizes=(size,))


_TOKENS = Limits(formats={"int": (8,)}, symmetric=True, signed=True, narrow=False, granularities=("token",),
                 ranges="dynamic", why="ranges that are computed as values come are one a token")  # fmt: skip
_KEPT = Limits(formats={"int": (8,)}, narrow=False, ranges="static")
_INT8 = Limits(formats={"int": (8,)}, symmetric=True, granularities=("channel", "tensor"),
               why="integer inputs are multiplied by symmetric int8 weights with a scale a channel")  # fmt: skip
_INT4 = Limits(formats={"int": (4,)}, symmetric=True, granularities=("group", "channel"), group_sizes=GROUP_SIZES)
_PACKED = Limits(formats={"int": (4, 8)}, granularities=("channel", "tensor", "group"), group_sizes=GROUP_SIZES,
                 why="vLLM has kernels for a scale an output channel, or 32, 64 or 128 inputs of one")  # fmt: skip
_E4M3 = Limits(formats=FLOAT8, granularities=("channel", "tensor"), why="e4m3fn has a scale an output channel")


def _weight_only(format: str, size: int, why: str) -> Kernel:
    """Weights in blocks; `why` inputs in blocks are not taken."""
    return Kernel(name=f"{format.upper()}A16", weight=_blocks(format, size), activation=replace(FLOAT, why=why),
                  integers=False, stored=f"{format}-pack-quantized")  # fmt: skip


VLLM = Target(
    description="vLLM: the weight formats of compressed-tensors, in the linear layers of a language model.",
    layers={
        "default": (
            Kernel(name="W8A8 int8, dynamic", weight=_INT8, activation=_TOKENS, stored="int-quantized"),
            Kernel(name="W8A8 int8, static", weight=_INT8, activation=_KEPT, stored="int-quantized"),
            Kernel(name="W4A8 int8, dynamic", weight=_INT4, activation=_TOKENS, stored="int-quantized"),
            Kernel(name="W8A8 fp8, dynamic", weight=_E4M3, stored="float-quantized", activation=Limits(
                formats=FLOAT8, granularities=("token",), ranges="dynamic")),
            Kernel(name="W8A8 fp8, static", weight=_E4M3, stored="float-quantized", activation=Limits(
                formats=FLOAT8, ranges="static")),
            Kernel(name="W8A16 fp8", weight=_E4M3, activation=FLOAT, integers=False, stored="float-quantized"),
            Kernel(name="W4A16, W8A16", weight=_PACKED, activation=FLOAT, integers=False, stored="pack-quantized"),
            Kernel(name="NVFP4", weight=_blocks("nvfp4", 16), stored="nvfp4-pack-quantized", activation=replace(
                _blocks("nvfp4", 16), ranges="static",
                why="its file keeps one float32 scale for every input of a layer, and those of blocks are computed")),
            _weight_only("nvfp4", 16, "inputs are nvfp4, too, or float"),
            _weight_only("mxfp4", 32, "engines round the scale of a block of inputs up or down, the MX specification "
                                      "down only"),
            IN_FLOAT,
        ),
        **dict.fromkeys(("convolution", "transposed convolution", "bilinear", "embedding", "lstm", "recurrent"),
                        (IN_FLOAT,)),
    },
    prefers={"activation": {"signed": True}},
    operations=frozenset(),
    keeps_float=("add", "mul", "matmul", "attention", *sorted(ELEMENTWISE), *NORMS),
    float_layers=("type:Embedding*", "lm_head", "*.lm_head", "embed_out", "*.embed_out"),
    graph="layers",
    formats=("compressed_tensors",),
    source="docs.vllm.ai: llm-compressor, compression schemes; features/quantization",
)  # fmt: skip
