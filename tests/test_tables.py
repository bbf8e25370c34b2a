"""Linear layers as table look-ups: the layer, its place in a network, and what it costs in accuracy on real data."""

import copy
import inspect

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qat.numerics.product import ProductCodebook, decode, encode, fit_product
from qat.ptq import tabulate
from qat.runtime.tables import TableLinear


def make_table(bias: bool = True) -> tuple[nn.Linear, ProductCodebook, TableLinear]:
    linear = nn.Linear(6, 5, bias=bias)
    codebook = fit_product(torch.randn(200, 6), 3, 8)
    return linear, codebook, TableLinear.from_linear(linear, codebook)


# ---- TableLinear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
def test_is_the_linear_layer_of_the_decoded_input(bias: bool, shape: tuple[int, ...]) -> None:
    linear, codebook, table = make_table(bias)
    x = torch.randn(shape)
    y = table(x)
    decoded = decode(encode(x.reshape(-1, 6), codebook), codebook).reshape(shape)
    torch.testing.assert_close(y, linear(decoded).detach(), rtol=1e-5, atol=1e-6)
    assert not y.requires_grad


def test_state_dict_deepcopy_and_dtype() -> None:
    _, _, table = make_table()
    x = torch.randn(4, 6)
    assert set(table.state_dict()) == {"prototypes", "tables", "bias"}
    assert list(table.parameters()) == []
    other = TableLinear(6, 5, width=2, entries=8)
    assert not other(x).any()
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(x), table(x))
    assert torch.equal(copy.deepcopy(table)(x), table(x))
    assert table(x.half()).dtype == torch.half
    assert repr(table) == "TableLinear(6 -> 5, 3 subspaces x 8 prototypes)"


# ---- tabulate --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Runs its layers in another order than it names them; one is shared, one idle."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4, bias=False)
        self.block = nn.ModuleDict({"first": nn.Linear(8, 8), "again": nn.Linear(8, 8)})
        self.block["alias"] = self.block["again"]
        self.idle = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        x = self.block["first"](x).relu_()
        x = self.block["alias"](self.block["again"](x)) * (1 if gain is None else gain)
        return self.last(self.attention(x, x, x)[0])


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(20, 5, 8) for _ in range(count)]


def test_replaces_what_ran_in_order_of_execution_and_leaves_the_original() -> None:
    net = Net().train()
    net.block.eval()
    before, data = copy.deepcopy(net.state_dict()), batches()
    tables, errors = tabulate(net, data)
    assert [error.layer for error in errors] == ["block.first", "block.again", "last"]
    kinds = {path: type(m) for path, m in tables.named_modules(remove_duplicate=False)}
    replaced = {path for path, kind in kinds.items() if kind is TableLinear}
    assert replaced == {"block.first", "block.again", "block.alias", "last"}
    assert kinds["idle"] is nn.Linear
    assert tables.block["again"] is tables.block["alias"]  # type: ignore[index]
    assert {path: m.training for path, m in tables.named_modules()} == {p: m.training for p, m in net.named_modules()}
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in [*net.modules(), *tables.modules()])
    assert tables(data[0]).shape == (20, 5, 4)


def test_errors_are_those_of_each_layer_on_the_batch_held_out() -> None:
    net, data = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), batches()
    tables, errors = tabulate(net, data, subspace_width=2, entries=8)
    x = data[-1]
    for index, error in zip((0, 2), errors, strict=True):
        arrives = tables[:index](x)  # type: ignore[index]
        exact, approximate = net[index](arrives).detach(), tables[index](arrives)  # type: ignore[index]
        relative = float((approximate - exact).norm() / exact.norm())
        assert error.layer == str(index)
        assert error.relative_error == pytest.approx(relative, rel=1e-4)
        assert error.sqnr_db == pytest.approx(10 * torch.tensor(relative**-2).log10().item(), rel=1e-4)
    assert (errors[0].multiply_adds, errors[0].look_ups, errors[0].encoding_multiply_adds) == (48, 24, 64)
    # Prototypes of the second layer come from what arrives through the tables of the first.
    arrives = torch.cat([tables[:2](batch) for batch in data[:-1]]).reshape(-1, 6)  # type: ignore[index]
    assert torch.equal(tables[2].prototypes, fit_product(arrives, 3, 8).prototypes)  # type: ignore[index]


def test_what_is_held_out_is_not_learned_from() -> None:
    net, data = nn.Sequential(nn.Linear(8, 3)), batches()
    far = [*data[:-1], data[-1] + 100]
    (near_net, near), (far_net, far_errors) = tabulate(net, data), tabulate(net, far)
    assert torch.equal(near_net[0].prototypes, far_net[0].prototypes)  # type: ignore[index]
    assert far_errors[0].relative_error > near[0].relative_error
    given_net, given = tabulate(net, data[:-1], holdout=data[-1])
    assert torch.equal(given_net[0].prototypes, near_net[0].prototypes)  # type: ignore[index]
    assert given == near
    (halves_net, halves), (split_net, split) = tabulate(net, [data[0]]), tabulate(net, [data[0][:10], data[0][10:]])
    assert torch.equal(halves_net[0].prototypes, split_net[0].prototypes)  # type: ignore[index]
    assert halves == split


def test_match_chooses_layers() -> None:
    _, errors = tabulate(Net(), iter(batches()), match="block.*")
    assert [error.layer for error in errors] == ["block.first", "block.again"]
    _, errors = tabulate(Net(), [(x, torch.ones(8)) for x in batches()], match="block.alias")
    assert [error.layer for error in errors] == ["block.again"]


def test_inputs_made_of_few_values_are_exact() -> None:
    data = [torch.randint(0, 2, (50, 8)).float() for _ in range(4)]
    _, errors = tabulate(nn.Sequential(nn.Linear(8, 3)), data, entries=16)
    assert errors[0].relative_error < 1e-6
    net = nn.Sequential(nn.Linear(8, 3, bias=False))
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    _, errors = tabulate(net, batches())
    assert (errors[0].relative_error, errors[0].sqnr_db) == (0.0, float("inf"))


def test_large_inputs_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fit(x: Tensor, *args: int, **kwargs: int) -> ProductCodebook:
        seen.append(len(x))
        return fit_product(x, *args, **kwargs)

    names = inspect.unwrap(tabulate).__globals__
    monkeypatch.setitem(names, "SAMPLE", 40)
    monkeypatch.setitem(names, "fit_product", fit)
    tabulate(nn.Sequential(nn.Linear(8, 3)), batches(5), entries=4)
    assert seen == [40]


def test_transformer_layer_of_torch() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tables, errors = tabulate(net, batches())
    assert [error.layer for error in errors] == ["linear1", "linear2"]
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert tables(batches()[0]).shape == (20, 5, 8)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"match='block.frist' matches no nn.Linear. Nearest module paths: block.first"
    ):
        tabulate(Net(), batches(), match="block.frist")
    with pytest.raises(ValueError, match=r"none, the network holds no nn.Linear"):
        tabulate(nn.Sequential(nn.ReLU()), batches())
    with pytest.raises(ValueError, match=r"'last' has 8 inputs, .* subspace_width=3"):
        tabulate(Net(), batches(), subspace_width=3)
    with pytest.raises(ValueError, match="at least one batch"):
        tabulate(Net(), [])
    with pytest.raises(ValueError, match="second sample"):
        tabulate(Net(), [torch.randn(1, 5, 8)])


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A trained network, its training images, and test images with labels."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()
    return net, x[:1200], x[1200:], y[1200:]


def test_digits_keep_their_accuracy_and_errors_fall_with_entries(
    digits: tuple[nn.Sequential, Tensor, Tensor, Tensor],
) -> None:
    net, train, test, labels = digits

    def accuracy(net: nn.Module) -> float:
        return float((net(test).argmax(dim=1) == labels).float().mean())

    results = {entries: tabulate(net, [train[:900], train[900:]], entries=entries) for entries in (4, 16, 64)}
    assert accuracy(net) > 0.94
    assert accuracy(results[16][0]) > accuracy(net) - 0.06
    assert accuracy(results[64][0]) > accuracy(net) - 0.02
    first = results[16][1][0]
    assert str(first) == (
        f"0: error {100 * first.relative_error:.1f} % of the output ({first.sqnr_db:.1f} dB); "
        "4,096 multiply-adds a vector become 1,024 look-ups and 1,024 multiply-adds"
    )
    for layer in range(3):
        few, some, many = (results[entries][1][layer].relative_error for entries in (4, 16, 64))
        assert 0 < many < some < few < 1
