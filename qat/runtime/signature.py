"""What a network takes and returns, where that is more than tensors one after the other: dicts, nested results."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """Plain data, stored with the network.

    Attributes:
        parameters: names of the arguments.
        inputs: of each tensor, the parameter that it is in and then the keys, indices or attributes that lead to it.
        output: the number of an output, None, or `{"list" | "tuple": [...]}`, `{"dict": [[key, ...]]}` of such. A
            dataclass is returned as a dict of its fields.
        fixed: parameters that have a value built in: plain values, which a call may give, too.
    """

    parameters: list[str]
    inputs: list[list[Any]]
    output: Any
    fixed: dict[str, Any] = field(default_factory=dict)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors in the arguments of a call.

        Raises:
            ValueError: arguments that the network does not take, or too few.
        """
        given = self.fixed | dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        for name, value in self.fixed.items():
            if given[name] is not value and given[name] != value:
                raise ValueError(f"{name}={given[name]!r:.60}: the network has {name}={value!r} built in")
        if len(args) > len(self.parameters) or given.keys() != set(self.parameters):
            raise ValueError(f"the network takes {', '.join(self.parameters)}; got {', '.join(given) or 'nothing'}")
        return tuple(_within(given[path[0]], path[1:]) for path in self.inputs)

    def build(self, outputs: Sequence[Tensor]) -> Any:
        """What the network returns, of its output tensors."""
        return _built(self.output, outputs)

    def spec(self) -> dict[str, Any]:
        """Plain data; `Signature(**spec)` is the inverse."""
        return asdict(self)


def _within(value: Any, path: Sequence[Any]) -> Tensor:
    for key in path:
        value = getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
    assert isinstance(value, Tensor)
    return value


def _built(form: Any, outputs: Sequence[Tensor]) -> Any:
    if isinstance(form, int):
        return outputs[form]
    if form is None:
        return None
    (kind, parts), *_ = form.items()
    if kind == "dict":
        return {key: _built(part, outputs) for key, part in parts}
    items = [_built(part, outputs) for part in parts]
    return tuple(items) if kind == "tuple" else items
