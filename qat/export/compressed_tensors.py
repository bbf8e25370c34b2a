"""A folder of compressed-tensors: a language model of transformers, quantized, for vLLM and transformers itself.

The folder holds what `from_pretrained` reads: `config.json` (with `quantization_config`), `model.safetensors`, and
`generation_config.json` where the model generates. Nothing but torch and safetensors is needed to write it. Weights are
the integers (or floats of 8 or 4 bits) that training simulated; a reader multiplies by the same scales.

Source of the layout: github.com/vllm-project/compressed-tensors, `compressors/` and `quantization/quant_args.py`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from qat.adapters import without_adapters
from qat.export.compressed_layer import FP4, settings_of, stored
from qat.export.files import replaced_folder
from qat.fake_quant import FakeQuantize
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.modes import check_simulates
from qat.scheme import TensorScheme
from qat.targets.compressed import stored_as

FLOAT_EMBEDDINGS = "{match: 'type:Embedding', weight: {bits: null}}"


def save_compressed_tensors(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a prepared language model of transformers as a folder of compressed-tensors.

    `transformers.AutoModelForCausalLM.from_pretrained(folder)` reads it where `compressed-tensors` is installed, and so
    does vLLM. With FP4 weights everything else is written as bfloat16, since the package unpacks them to that.

    Args:
        model: of `qat.prepare` with `graph="layers"`, finalized (`qat.ptq.finalize`); or a module that holds one.
            Adapters (LoRA) are merged into its weights, in a copy.
        folder: written whole or not at all; files of an earlier export that this one does not write stay in it.
        tokenizer: of transformers, to be saved beside the model.

    Raises:
        ValueError: no model of transformers, a layer that the format cannot hold (names it, and what to do), or a
            folder that holds something else.
        RuntimeError: a quantizer has no range yet, or simulates nothing.
        OSError: the folder or the disk refuses.
    """
    net: Any = language_model(without_adapters(model))
    check_simulates(net)
    layers = _layers(net)
    fp4 = any(form in FP4 for _, form in layers.values())
    dtype = torch.bfloat16 if fp4 else next(net.parameters()).dtype
    tensors = _float_tensors(net, layers, dtype)
    _check_names(net, tensors)
    for name, (layer, form) in layers.items():
        tensors |= {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in stored(layer, form).items()}
    config = copy.deepcopy(net.config)
    config.architectures, config.dtype = [type(net).__name__], dtype
    if {name.removesuffix(".weight") for name in getattr(net, "all_tied_weights_keys", {})} & layers.keys():
        config.tie_word_embeddings = False  # the head's integers are its own; the embedding is float
    settings = json.loads(config.to_json_string()) | {"quantization_config": quantization_config(net, layers)}
    with replaced_folder(Path(folder), _is_export) as new:
        (new / "model.safetensors").write_bytes(save(dict(sorted(tensors.items())), {"format": "pt"}))
        (new / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if getattr(net, "generation_config", None) is not None:
            (new / "generation_config.json").write_text(net.generation_config.to_json_string())
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def check_network(prepared: nn.Module) -> None:
    """Refuse a prepared network that no folder of compressed-tensors can hold, whatever its ranges will be.

    Raises:
        ValueError: names the layer, the reason and what to do.
    """
    net = language_model(without_adapters(prepared, merge=False))
    _check_names(net, _float_tensors(net, _layers(net), torch.float32))


@torch.no_grad()
def simulated_as(prepared: nn.Module, folder: Path) -> nn.Module:
    """What a prepared network simulates, in the dtype of a folder that was written of it: its weights, on their levels.

    Returns:
        `prepared` itself where the dtype is the same, else a copy.
    """
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    prepared = without_adapters(prepared)
    net = language_model(prepared)
    if next(net.parameters()).dtype == dtype:
        return prepared
    result = copy.deepcopy(prepared)
    for layer, _ in _layers(language_model(result)).values():
        layer.weight.copy_(layer.quantized_weight())
        layer.weight_quantizer.mode = Mode.float
    learned = {id(p) for m in result.modules() if isinstance(m, FakeQuantize) for p in m.parameters()}
    for parameter in result.parameters():
        if id(parameter) not in learned:
            parameter.data = parameter.data.to(dtype)
    return result


def stored_layers(prepared: nn.Module) -> dict[str, Any]:
    """Path of a layer in the folder -> the quantized layer of a prepared network that it is written of."""
    return {name: layer for name, (layer, _) in _layers(language_model(prepared)).items()}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an earlier export, which may be replaced."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "quantization_config" in config


def language_model(network: nn.Module) -> Any:
    """The model of transformers that `network` is, or holds.

    Raises:
        ValueError: there is none, or more than one.
    """
    pretrained = [m for m in network.modules() if hasattr(getattr(m, "config", None), "to_json_string")]
    pretrained = [m for m in pretrained if hasattr(m, "save_pretrained")]
    found = [m for m in pretrained if not any(m is not outer and m in outer.modules() for outer in pretrained)]
    if len(found) != 1:
        raise ValueError(
            f"compressed_tensors holds one model of transformers; {type(network).__name__} has "
            f"{len(found) or 'none'} in it. Prepare one with quant.graph=layers, which keeps its class; other networks "
            f"are exported as int8 or onnx"
        )
    return found[0]


def _layers(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Path -> quantized linear layer and its format; refuses everything else that is quantized."""
    layers, known = dict[str, tuple[Any, str]](), set[FakeQuantize]()
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLayer):
            continue
        weight, reads = module.weight_quantizer, module._modules.get("input_quantizer")
        known |= {q for q in (weight, reads) if isinstance(q, FakeQuantize)}
        if not isinstance(module, nn.Linear):
            rule = FLOAT_EMBEDDINGS if isinstance(module, nn.Embedding) else _exempt(name)
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) is quantized, and compressed-tensors is read for linear "
                f"layers only; leave it float: quant.rules=[{rule}]"
            )
        scheme = reads.scheme if isinstance(reads, FakeQuantize) else TensorScheme()
        form = stored_as(weight.scheme, scheme, f"layer '{name}': quant")
        assert form is not None
        size = weight.scheme.group_size
        if size and module.in_features % size:
            raise ValueError(
                f"layer '{name}': its {module.in_features} inputs are no multiple of quant.weight.group_size={size}, "
                f"and the format has no shorter groups; exempt it by a rule ({_exempt(name)}), or give a divisor"
            )
        layers[name] = module, form
    other = [name for name, m in model.named_modules() if isinstance(m, FakeQuantize) and m not in known]
    if other:
        raise ValueError(
            f"{len(other)} quantizers stand between layers (the first is '{other[0]}'); compressed-tensors has a place "
            f"for weights and inputs of linear layers only. Prepare with quant.graph=layers"
        )
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__} is quantized; nothing to write")
    return layers


def _exempt(name: str) -> str:
    return f"{{match: {name}, weight: {{bits: null}}}}"


def _float_tensors(model: Any, layers: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What is not quantized, and biases; of tensors that are tied, the one that the model's class ties others to."""
    quantized = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, FakeQuantize))
    quantized += tuple(f"{name}.weight" for name in layers)
    state = {name: t.detach() for name, t in model.state_dict().items() if not name.startswith(quantized)}
    tied = getattr(model, "all_tied_weights_keys", {})
    return {
        name: t.cpu().to(dtype if t.is_floating_point() else t.dtype, copy=True)
        for name, t in state.items()
        if not (tied.get(name) in state and state[tied[name]].data_ptr() == t.data_ptr())
    }


def _check_names(model: Any, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that a model built from the configuration alone would not have, and so would not load."""
    with torch.device("meta"):
        known = type(model)(copy.deepcopy(model.config)).state_dict()
    unknown = [name for name in tensors if name not in known]
    if unknown:
        bias = "; bias correction gives biases to layers without: use PTQConfig(bias_correction=False)"
        raise ValueError(
            f"{type(model).__name__} with this configuration has no {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}, and would drop what the file says of it"
            f"{bias if unknown[0].endswith('.bias') else ''}"
        )


def quantization_config(model: nn.Module, layers: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """What `config.json` says of the layers: one group for all that are stored and run alike."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, (layer, form) in layers.items():
        settings = settings_of(layer, form)
        alike = next((targets for known, targets in groups if known == settings), None)
        if alike is None:
            groups.append((settings, [name]))
        else:
            alike.append(name)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    formats = {settings["format"] for settings, _ in groups}
    one = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": settings | {"targets": ["Linear"] if one else targets}
            for i, (settings, targets) in enumerate(groups)
        },
        "ignore": [name for name in linear if name not in layers],
        "kv_cache_scheme": None,
    }
