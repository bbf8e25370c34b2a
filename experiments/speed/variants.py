"""What is measured: each way to train with quantization, ours and the peers', as a function that builds it.

A builder gets the float network, its input and the name of the work, and returns the network to train: it has seen data
and simulates quantization. Peers are used as their documentation shows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[nn.Module, Tensor, str], nn.Module]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        title: for people.
        build: makes it.
        package: that has to be importable.
        work: what it can run.
    """

    title: str
    build: Build
    package: str = "qat"
    work: tuple[str, ...] = ("resnet20", "lm")


def _qat(preset: str, mode: str, **changes: Any) -> Build:
    def build(net: nn.Module, x: Tensor, work: str) -> nn.Module:
        import qat
        from qat.modes import set_mode

        prepared = qat.prepare(net, qat.preset(preset, **changes), x[:2])
        qat.calibrate(prepared, [x] * 8)
        set_mode(prepared, mode)
        return prepared.train()

    return build


def torch_ao_fx(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86").set_object_type(nn.Embedding, None)
    return prepare_qat_fx(net.train(), mapping, (x,))


def torch_ao_lsq(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def quantizer(low: int, high: int, dtype: torch.dtype, **more: Any) -> Any:
        return _LearnableFakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype, scale=1.0, zero_point=0.0,
            use_grad_scaling=True, **more,
        )  # fmt: skip

    config = QConfig(
        activation=quantizer(0, 255, torch.quint8),
        weight=quantizer(-128, 127, torch.qint8, qscheme=torch.per_tensor_symmetric),
    )
    mapping = QConfigMapping().set_global(config).set_object_type(nn.Embedding, None)
    prepared = prepare_qat_fx(net.train(), mapping, (x,))
    nodes = [module for module in prepared.modules() if isinstance(module, _LearnableFakeQuantize)]
    for node in nodes:
        node.enable_static_estimate()
    with torch.no_grad():
        prepared(x)
    for node in nodes:
        node.enable_param_learning()
    return prepared


def pt2e_x86(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(net.train(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    prepared = prepare_qat_pt2e(exported.module(), quantizer)
    move_exported_model_to_train(prepared)
    return prepared


def torchao_int8_int4(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(net, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return net.train()


def _brevitas(bits: int, collecting: bool, learned: bool = False) -> Build:
    def build(net: nn.Module, x: Tensor, work: str) -> nn.Module:
        import brevitas.nn as qnn
        from brevitas.graph.quantize import layerwise_quantize
        from brevitas.inject.enum import ScalingImplType
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

        weight: Any = Int8WeightPerChannelFloat
        if learned:
            weight = type("Learned", (weight,), {"scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS})
        layer: dict[str, Any] = {"weight_quant": weight, "weight_bit_width": bits, "return_quant_tensor": False}
        steps = {} if collecting else {"collect_stats_steps": 1}
        if work == "lm":
            given = {f"input_{name}": value for name, value in steps.items()}
            settings = layer | given | {"input_quant": Int8ActPerTensorFloat, "input_bit_width": bits}
            net = layerwise_quantize(net, compute_layer_map={nn.Linear: (qnn.QuantLinear, settings)}).train()
        else:
            del layer["return_quant_tensor"]
            _swap_for_brevitas(net, qnn, layer, {"bit_width": bits, **steps}, Uint8ActPerTensorFloat)
        if not collecting:
            with torch.no_grad():
                net(x)
                net(x)
        return net.train()

    return build


def _swap_for_brevitas(net: nn.Module, qnn: Any, weight: dict[str, Any], act: dict[str, Any], act_quant: Any) -> None:
    for name, child in net.named_children():
        new: nn.Module | None = None
        if isinstance(child, nn.Conv2d):
            new = qnn.QuantConv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, bias=False,
                **weight,
            )  # fmt: skip
        elif isinstance(child, nn.Linear):
            new = qnn.QuantLinear(child.in_features, child.out_features, bias=True, **weight)
        elif isinstance(child, nn.ReLU):
            new = qnn.QuantReLU(act_quant=act_quant, **act)
        if new is None:
            _swap_for_brevitas(child, qnn, weight, act, act_quant)
            continue
        new.load_state_dict(child.state_dict(), strict=False)
        setattr(net, name, new)


def modelopt_int8(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(net.train(), mtq.INT8_DEFAULT_CFG, forward_loop=lambda model: model(x)).train()


def nncf_int8(net: nn.Module, x: Tensor, work: str) -> nn.Module:
    import nncf

    settings = {"model_type": nncf.ModelType.TRANSFORMER} if work == "lm" else {}
    return nncf.quantize(net.eval(), nncf.Dataset([x]), subset_size=1, **settings).train()


VARIANTS: dict[str, Variant] = {
    "frozen": Variant("qat, W8A8, frozen ranges", _qat("int8", "frozen")),
    "ema": Variant("qat, W8A8, running ranges (EMA)", _qat("int8", "quantize")),
    "lsq": Variant("qat, W4A4, learned ranges (LSQ)", _qat("w4a4_lsq", "quantize")),
    "torch_ao_fx": Variant("torch.ao FX, x86 default", torch_ao_fx, "torch.ao.quantization.quantize_fx"),
    "torch_ao_lsq": Variant(
        "torch.ao FX, learned (LSQ)", torch_ao_lsq, "torch.ao.quantization._learnable_fake_quantize"
    ),
    "pt2e_x86": Variant("torchao PT2E, x86 Inductor", pt2e_x86, "torchao.quantization.pt2e.quantize_pt2e"),
    "torchao_8da4w": Variant(
        "torchao, W4 groups of 32, A8 tokens", torchao_int8_int4, "torchao.quantization.qat", ("lm",)
    ),
    "brevitas_int8": Variant("Brevitas, W8A8, after its statistics", _brevitas(8, False), "brevitas"),
    "brevitas_collecting": Variant("Brevitas, W8A8, its first 300 steps", _brevitas(8, True), "brevitas"),
    "brevitas_w4a4": Variant("Brevitas, W4A4, learned", _brevitas(4, False, True), "brevitas"),
    "modelopt_int8": Variant("ModelOpt, W8A8, frozen ranges", modelopt_int8, "modelopt.torch.quantization"),
    "nncf_int8": Variant("NNCF, W8A8", nncf_int8, "nncf"),
}
OURS = ("frozen", "ema", "lsq")
GROUPS: dict[int, Build] = {
    size: _qat("w4g32", "quantize", weight={"group_size": size}) for size in (16, 32, 64, 128, 256)
}
"""4-bit weights with a scale each so many of them; activations stay float."""


def built(name: str, net: nn.Module, x: Tensor, work: str) -> nn.Module:
    """A copy of `net` as the variant trains it; `float` is the copy itself, `groups of N` one of GROUPS."""
    net = copy.deepcopy(net)
    if name == "float":
        return net
    build = GROUPS[int(name.split()[-1])] if name.startswith("groups of") else VARIANTS[name].build
    return build(net, x, work)
