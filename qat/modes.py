"""What is asked of, or told to, every quantizer of a network at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qat.fake_quant import FakeQuantize
from qat.mode import Mode


def quantizers(net: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Every FakeQuantize of a network with its module path."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, FakeQuantize))


def check_simulates(net: nn.Module) -> None:
    """Refuse a network that does not compute what it would compute in integers.

    Raises:
        RuntimeError: a quantizer has no range yet, or is in a mode that simulates nothing; names it.
    """
    missing = [name for name, quantizer in quantizers(net) if not quantizer.calibrated]
    if missing:
        raise RuntimeError(
            f"{without_range(missing)}; run qat.calibrate(net, batches) before lowering, with batches that reach them"
        )
    for name, quantizer in quantizers(net):
        if quantizer.mode in (Mode.float, Mode.observe):
            raise RuntimeError(
                f"quantizer '{name}': a network in mode 'float' or 'observe' cannot be lowered; "
                f"qat.set_mode(net, 'quantize') first"
            )


def without_range(names: list[str]) -> str:
    """Which quantizers have no range, in words.

    >>> without_range(["a"]), without_range(list("abcdef"))[:38]
    ("quantizer 'a' has no range yet", "6 quantizers have no range yet ('a', '")
    """
    if len(names) == 1:
        return f"quantizer '{names[0]}' has no range yet"
    listed = ", ".join(f"'{name}'" for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} quantizers have no range yet ({listed})"


def set_mode(net: nn.Module, mode: Mode | str) -> None:
    """Set the mode of every FakeQuantize in `net`.

    Args:
        net: a prepared network.
        mode: `float`, `observe`, `quantize` or `frozen`.

    Raises:
        ValueError: an unknown mode.
        RuntimeError: `quantize` or `frozen` before ranges are known; names the first such node.
    """
    try:
        mode = Mode(mode)
    except ValueError:
        raise ValueError(f"mode={mode!r} is not known (valid: {', '.join(m.value for m in Mode)})") from None
    if mode in (Mode.quantize, Mode.frozen):
        missing = [name for name, quantizer in quantizers(net) if not quantizer.calibrated]
        if missing:
            raise RuntimeError(
                f"{len(missing)} quantizers have no range yet, the first is '{missing[0]}'; "
                f"run qat.calibrate(net, batches) before mode '{mode.value}'"
            )
    for _, quantizer in quantizers(net):
        quantizer.mode = mode


def watch(net: nn.Module, on: bool = True) -> None:
    """Let the next forward of every FakeQuantize check its input: NaN or infinity raise a ValueError with its name.

    The check reads each tensor once, so it is made now and then: at every batch of calibration, at the first one of
    every epoch, and where the loss is not finite (`StopOnNonFinite`): NaN comes out at the other end. In between,
    infinity saturates without a word.
    """
    for _, quantizer in quantizers(net):
        quantizer.watched = on


def set_progress(net: nn.Module, share: float) -> None:
    """Tell gradients and penalties that change in the course of training how much of it has passed.

    Args:
        net: a prepared network.
        share: in [0, 1].
    """
    for _, quantizer in quantizers(net):
        if quantizer.anneals:
            quantizer.progress.fill_(share)


@contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in the mode it was in."""
    training = {module: module.training for net in nets for module in net.modules()}
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def get_mode(net: nn.Module) -> Mode:
    """The mode of a prepared network: of its first weight (activations may join later); `float` when it has none."""
    first: FakeQuantize | None = None
    for _, quantizer in quantizers(net):
        if quantizer.shape is not None:
            return quantizer.mode
        first = first or quantizer
    return Mode.float if first is None else first.mode
