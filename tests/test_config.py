import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import qat
from qat import hydra_schema
from qat.scheme import Granularity, QuantConfig
from qat.targets import TARGETS
from tests.target_table import AROUND, RUNS

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("data", "model", "quant", "target", "trainer", "logger", "callbacks", "export", "optimizer")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides))


def quant(*overrides: str) -> QuantConfig:
    return hydra_schema.quant_config(composed(*overrides))


def options(group: str) -> list[str]:
    names = GlobalHydra.instance().config_loader().get_group_options(group)  # type: ignore[union-attr]
    return list(names)


def pairwise(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Rows, one option of each group, such that any two options of two groups meet in some row (greedy)."""
    open_pairs = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(groups, 2) for x in groups[a] for y in groups[b]
    }
    rows = []
    while open_pairs:
        row = dict(min(sorted(pair) for pair in open_pairs))
        for group in groups:
            if group not in row:
                met = {
                    option: sum(frozenset([(group, option), item]) in open_pairs for item in row.items())
                    for option in groups[group]
                }
                row[group] = max(met, key=met.__getitem__)
        open_pairs -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------- any group with any other


def test_the_groups_of_the_issue_have_their_options() -> None:
    assert set(options("data")) == {"digits", "mnist", "fashion_mnist", "cifar10", "tiny_shakespeare"}
    assert set(options("model")) == {"small_cnn", "resnet20", "mlp", "char_gpt", "llama"}
    assert set(options("task")) == {"classification", "language_model"}
    assert set(options("quant")) == set(qat.presets.PRESETS)
    assert set(options("quant")) >= {"off", "int8", "w8a8_asymmetric", "w4a8", "w4a4", "w4a4_lsq", "w2a2_lsq", "w4g32"}
    assert set(options("target")) == set(TARGETS)
    assert set(options("trainer")) == {"cpu", "gpu", "ddp", "fsdp"}
    assert set(options("logger")) == {"csv", "tensorboard", "wandb", "mlflow"}
    assert set(options("scheduler")) == {"constant", "cosine", "cosine_warmup", "linear"}
    assert set(options("recipe")) == {
        "batch_norm_reestimation", "delayed_activations", "distillation", "early_stopping", "ema", "gradual_bits",
        "oscillation_damping", "oscillation_freezing",
    }  # fmt: skip


IN_VLLM = ("off", "int8", "w4g32", "w4g128", "w4g32a8_dynamic", "w4g128a8_dynamic", "w8a8_dynamic", "fp8")
"""Presets that a folder of compressed-tensors holds, with weights of 4 or 8 bits."""


def fits(model: str, data: str) -> bool:
    """Whether a model reads what the data are: images or characters."""
    return (model in ("char_gpt", "llama")) == (data == "tiny_shakespeare")


def example(data: DictConfig, n: int) -> torch.Tensor:
    """An input of the shape that the data have."""
    if "context" in data:
        return torch.zeros(n, data.context, dtype=torch.int64)
    return torch.zeros(n, data.channels, data.image_size, data.image_size)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_every_option_composes_with_every_option_of_every_other_group(part: int) -> None:
    groups = {group: options(group) for group in GROUPS}
    rows = pairwise(groups)
    for a, b in itertools.combinations(GROUPS, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(groups[a], groups[b]))
    for row in rows[part::4]:
        overrides = [f"{group}={option}" for group, option in row.items()]
        cfg = composed(*overrides)
        if row["quant"] not in RUNS[row["target"]]:
            with pytest.raises(ValueError, match=rf"target={row['target']} .*or target=generic"):
                hydra_schema.quant_config(cfg)
            continue
        config = hydra_schema.quant_config(cfg)
        assert config == qat.preset(row["quant"], target=row["target"]), overrides
        data, trainer = cfg.data, cfg.trainer
        assert data.name == row["data"]
        processes = {"cpu": (1, "cpu"), "gpu": (1, "gpu"), "ddp": (2, "auto"), "fsdp": (2, "auto")}
        assert (trainer.devices, trainer.accelerator) == processes[row["trainer"]]
        assert {"csv", row["logger"]} <= set(cfg.logger)
        assert (cfg.callbacks.progress is None) == (row["callbacks"] == "quiet")
        fixed_point = TARGETS[row["target"]].requantize == "fixed_point"
        no_onnx = row["quant"] in ("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "apot4")  # its activations
        possible = {"int8"} | ({"c_header"} if fixed_point else set() if no_onnx else {"onnx"})
        zero_points = config.activation.range == "dynamic" and not config.activation.symmetric  # of XNNPACK's tokens
        in_vllm = row["quant"] in IN_VLLM and config.weight.bits != 7 and not zero_points
        possible |= {"compressed_tensors"} if in_vllm else set()
        possible |= {"executorch"} if importlib.util.find_spec("executorch") and not no_onnx else set()
        default = list(AROUND[row["target"]][-1])  # the target's own files
        wanted = {"default": default, "int8": ["int8"], "c_header": ["int8", "c_header"],
                  "compressed_tensors": ["compressed_tensors"]}[row["export"]]  # fmt: skip
        assert list(cfg.export.formats) == [name for name in wanted if name in possible]
        assert cfg.float.lr == cfg.optimizer.lr
        assert cfg.task.num_classes == data.num_classes
        if not fits(row["model"], row["data"]):
            with pytest.raises(ValueError, match=r"^model\.\w+: .* Choose data, model and task that go together"):
                hydra_schema.plain(cfg.model)
            continue
        assert cfg.model.num_classes == data.num_classes
        net = instantiate(cfg.model)
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        assert type(instantiate(cfg.optimizer, parameters)).__name__.lower() == row["optimizer"]
        with torch.no_grad():
            x = example(data, 1)
            outputs = net.eval()(x)
            instantiate(cfg.task).metrics().update(outputs, x if x.dim() == 2 else torch.tensor([0]))
        assert outputs.shape == (*(x.shape if x.dim() == 2 else [1]), data.num_classes)


@pytest.mark.slow
def test_every_preset_prepares_every_model() -> None:
    large = ("resnet20", "llama")  # a second each
    small = itertools.product(sorted({*options("model")} - {*large}), options("quant"))
    for model, preset in [*small, *itertools.product(large, ("w4a4_lsq", "w4g32"))]:
        data = "tiny_shakespeare" if model in ("char_gpt", "llama") else "digits"
        cfg = composed(f"data={data}", f"model={model}", f"quant={preset}")
        config = hydra_schema.quant_config(cfg)
        net = qat.prepare(instantiate(cfg.model), config, example(cfg.data, 2))
        weights = [q for name, q in qat.modes.quantizers(net) if name.endswith("weight_quantizer")]
        assert bool(weights) == config.weight.quantized, (model, preset)


def test_text_brings_its_model_and_its_task() -> None:
    cfg = composed("data=tiny_shakespeare")
    assert cfg.model._target_ == "qat.zoo.gpt.CharGPT"
    assert cfg.task._target_ == "qat.zoo.tasks.LanguageModel"
    cfg = composed("data=tiny_shakespeare", "model=mlp", "task=classification")  # what is asked for stands
    assert cfg.model._target_ == "qat.zoo.models.MLP"
    assert cfg.task._target_ == "qat.zoo.tasks.Classification"


def test_presets_in_python_equal_what_hydra_composes() -> None:
    for name in options("quant"):
        cfg = composed(f"quant={name}")
        for target in [target for target in options("target") if name in RUNS[target]]:
            cfg.target.name = target  # what is left open is decided when it is read
            assert hydra_schema.quant_config(cfg) == qat.preset(name, target=target), (name, target)


def test_a_composed_quant_config_survives_plain_data() -> None:
    for name in options("quant"):
        config = quant(f"quant={name}")
        assert QuantConfig.from_dict(config.to_dict()) == config


def test_the_experiment_sets_what_it_says() -> None:
    cfg = composed("experiment=cifar10_resnet20_w4a4")
    assert cfg.data.name == "cifar10"
    assert cfg.model.depth == 20
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert list(cfg.data.mean) == [0.485, 0.456, 0.406]
    assert hydra_schema.quant_config(cfg) == qat.preset("w4a4_lsq")
    assert (cfg.float.max_epochs, cfg.qat.max_epochs, cfg.qat.lr) == (3, 3, 0.01)


def test_the_experiment_can_be_overridden() -> None:
    cfg = composed("experiment=cifar10_resnet20_w4a4", "quant=int8", "qat.lr=0.1", "target=onnxruntime_x86")
    assert cfg.qat.lr == 0.1
    assert hydra_schema.quant_config(cfg) == qat.preset("int8", target="onnxruntime_x86")


# -------------------------------------------------------------------------------------------- the command line


def test_overrides_of_one_tensor() -> None:
    config = quant(
        "quant.weight.bits=4",
        "quant.weight.symmetric=false",
        "quant.weight.granularity=channel",
        "quant.weight.narrow_range=false",
        "quant.activation.bits=6",
        "quant.activation.range=learned",
        "quant.activation.observer=mse",
    )
    assert (config.weight.bits, config.weight.symmetric, config.weight.granularity) == (4, False, Granularity.channel)
    assert (config.activation.bits, config.activation.range) == (6, "learned")
    assert config.activation.observer == "mse"
    assert config.input == qat.preset("int8").input  # nothing else moved


def test_the_command_line_of_the_issue() -> None:
    config = quant(
        "quant.weight.bits=4",
        "quant.weight.symmetric=false",
        "quant.weight.granularity=channel",
        "quant.activation.bits=8",
        'quant.rules=[{match: first, weight: {bits: 8}}, {match: "*.conv2", weight: {bits: null}}]',
    )
    assert (config.weight.bits, config.weight.symmetric, config.activation.bits) == (4, False, 8)
    first, second = config.rules
    assert (first.match, first.weight, first.activation) == ("first", {"bits": 8}, {})
    assert (second.match, second.weight, second.activation) == ("*.conv2", {"bits": None}, {})


def test_rules_are_exceptions_to_the_schemes_of_the_configuration() -> None:
    cfg = composed(
        "quant=w4a4_lsq",
        'quant.rules=[{match: "conv2.*", weight: {bits: null}}, {match: "type:Linear", activation: {bits: 8}},'
        " {match: last, weight: {granularity: tensor, symmetric: false}}]",
    )
    net = qat.prepare(instantiate(cfg.model), hydra_schema.quant_config(cfg), torch.zeros(2, 1, 8, 8))
    schemes = {n: q.scheme for n, q in qat.modes.quantizers(net)}
    weights = {name: s for name, s in schemes.items() if name.endswith("weight_quantizer")}
    assert not any(name.startswith("conv2") for name in weights)
    assert {s.bits for s in weights.values()} == {4}
    assert len(weights) > 2
    linear = {name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(weights[f"{name}.weight_quantizer"].granularity is Granularity.channel for name in linear)
    assert 8 in {s.bits for name, s in schemes.items() if name not in weights and "input" not in name}


def test_one_rule_of_a_preset_can_be_indexed() -> None:
    config = quant("quant=w4a4", "quant.rules.0.weight.bits=6")
    assert config.rules[0].weight == {"bits": 6}
    assert config.rules[1] == qat.preset("w4a4").rules[1]


def test_bits_null_leaves_a_tensor_float() -> None:
    config = quant("quant.activation.bits=null", "quant.input.bits=null")
    assert not config.activation.quantized
    assert config.weight.quantized
    assert not quant("quant=off").enabled


# --------------------------------------------------------------------------------------------------- bad input

REFUSED: list[tuple[list[str], list[str]]] = [
    (["quant.weight.bits=0"], ["quant.weight.bits=0", "1 to 16", "null"]),
    (["quant.weight.bits=33"], ["quant.weight.bits=33", "1 to 16"]),
    (["quant.weight.bits=17"], ["quant.weight.bits=17", "1 to 16"]),
    (["quant.activation.bits=33"], ["quant.activation.bits=33", "1 to 16"]),
    (["quant.input.bits=-4"], ["quant.input.bits=-4", "1 to 16"]),
    (["quant.weight.rounding=nearset"], ["quant.weight.rounding='nearset'", "did you mean 'nearest'", "valid: "]),
    (
        ["quant.activation.observer=minmx"],
        ["quant.activation.observer='minmx'", "did you mean 'minmax'", "minmax, ema, percentile, mse"],
    ),
    (["quant.weight.format=uint"], ["quant.weight.format='uint'", "valid: int, e4m3fn"]),
    (["quant.activation.granularity=token"], ["quant.activation.granularity=token", "quant.activation.range=dynamic"]),
    (
        ["quant.activation.range=leaned"],
        ["quant.activation.range='leaned'", "did you mean 'learned'", "lsq_plus, pact"],
    ),
    (["quant.weight.format=mxfp4", "quant.weight.bits=4"], ["quant.weight.format=mxfp4", "quant.weight.group_size=32"]),
    (["quant.weight.granularity=group"], ["quant.weight.group_size=null", "quant.weight.group_size=32"]),
    (["quant.weight.group_size=32"], ["quant.weight.group_size=32", "granularity=channel", "granularity=group"]),
    (["quant.weight.percentiles=[99,1]"], ["quant.weight.percentiles=[99.0, 1.0]", "low < high"]),
    (["quant.weight.momentum=0"], ["quant.weight.momentum=0", "(0, 1]"]),
    (["quant.weight.signed=false"], ["quant.weight.signed=false", "symmetric=false"]),
    (["quant.target=tpu"], ["quant.target='tpu'", "generic, onnxruntime_x86"]),
    (["quant.rules=[{weight: {bits: 8}}]"], ["quant.rules[0].match is missing", "'first'"]),
    (["quant.rules=[{match: first, weight: {bit: 8}}]"], ["quant.rules[0].weight", "'bit'", "did you mean 'bits'"]),
    (["quant.rules=[{match: first, weight: {bits: 33}}]"], ["quant.rules[0].weight.bits=33", "1 to 16"]),
    (["quant.rules=[{match: first, weight: {bits: 1.5}}]"], ["quant.rules[0].weight.bits=1.5", "1 to 16"]),
    (["quant.rules=[{match: first, weight: {bits: many}}]"], ["quant.rules[0].weight.bits=", "many", "1 to 16"]),
    (
        ["quant.rules=[{match: first, weight: {granularity: chanel}}]"],
        ["quant.rules[0].weight.granularity='chanel'", "did you mean 'channel'", "tensor, channel, group"],
    ),
    (
        ["target=onnxruntime_x86", "quant.weight.bits=8"],
        ["quant.weight.bits=8", "onnxruntime_x86", "at most 7", "saturates", "quant.weight.bits=7", "target=generic"],
    ),
    (
        ["target=onnxruntime_x86", "quant=w4a4", "quant.rules.0.weight.bits=8"],
        ["quant.rules[0].weight.bits=8", "at most 7", "use quant.rules.0.weight.bits=7"],
    ),
    (
        ["target=onnxruntime_x86", "quant.activation.bits=16"],
        ["quant.activation.bits=16", "at most 8", "quant.activation.bits=8"],
    ),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_a_bad_value_is_refused_with_field_value_and_what_is_valid(overrides: list[str], said: list[str]) -> None:
    cfg = composed(*overrides)
    with pytest.raises(ValueError, match=re.escape(said[0])) as error:
        hydra_schema.quant_config(cfg)
    for words in said:
        assert words in str(error.value)


REFUSED_BY_HYDRA: list[tuple[str, list[str]]] = [
    ("quant.weight.bits=1.5", ["quant.weight.bits", "1.5", "Integer"]),
    ("quant.weight.bits=four", ["quant.weight.bits", "four", "Integer"]),
    ("quant.weight.granularity=chanel", ["quant.weight.granularity", "chanel", "tensor, channel, group"]),
    ("quant.activation.momentum=much", ["quant.activation.momentum", "much", "Float"]),
    ("quant.weight.bit=4", ["quant.weight.bit", "'bit' not in 'TensorScheme'"]),
    ("quant.wieght.bits=4", ["quant.wieght.bits", "'wieght' not in 'QuantConfig'"]),
    ("quant.rules=[{mach: first}]", ["mach", "LayerRule"]),
    ("quant=nosuch", ["quant/nosuch", *qat.presets.PRESETS]),
    ("model=resnet21", ["model/resnet21", "resnet20"]),
    ("trainer.max_epoch=3", ["trainer.max_epoch", "max_epoch"]),
]


@pytest.mark.parametrize(("override", "said"), REFUSED_BY_HYDRA, ids=[override for override, _ in REFUSED_BY_HYDRA])
def test_what_hydra_refuses_names_the_key_and_what_is_valid(override: str, said: list[str]) -> None:
    with pytest.raises(HydraException) as error:
        composed(override)
    message = str(error.value)
    cause: BaseException | None = error.value.__cause__  # what hydra.main prints too
    while cause is not None:
        message, cause = f"{message}\n{cause}", cause.__cause__
    for words in said:
        assert words in message


def test_int8_takes_as_many_bits_as_the_target_runs() -> None:
    assert quant("quant=int8", "target=onnxruntime_x86").weight.bits == 7
    assert quant("quant=int8").weight.bits == 8
    rules = quant("quant=w4a4", "target=onnxruntime_x86").rules
    assert [(rule.weight["bits"], rule.activation["bits"]) for rule in rules] == [(7, 8), (7, 8)]


def test_an_interpolation_that_leads_nowhere_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        quant("quant.weight.bits=${nowhere}")


def test_plain_resolves_interpolations() -> None:
    cfg = composed("data=cifar10")
    plain: dict[str, Any] = hydra_schema.plain(cfg.model)
    assert plain["in_channels"] == 3
    assert "${" in str(OmegaConf.to_container(cfg.model))
