"""Look-ups in stored tables decode the rows that are asked for, and no others."""

from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.runtime.lookup import ProductLookUp, TableLookUp

FLOAT8 = {"bits": 8, "format": "e4m3fn", "range": "dynamic"}
SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": FLOAT8,
    "channel": {**FLOAT8, "granularity": "channel"},
    "other axis": {**FLOAT8, "granularity": "channel", "axis": 1},
    "groups": {**FLOAT8, "granularity": "group", "group_size": 4, "allow_padding": True},
    "blocks": {**FLOAT8, "granularity": "block", "block_size": [3, 4]},
    "blocks of all rows": {**FLOAT8, "granularity": "block", "block_size": [-1, 4]},
    "codebook": {"bits": 3, "format": "codebook", "range": "learned"},
    "codebooks": {"bits": 3, "format": "codebook", "granularity": "channel", "range": "learned"},
    "bf16": {"bits": 16, "format": "bf16", "range": "dynamic"},
    "product": {"bits": 3, "format": "product", "granularity": "group", "group_size": 2, "range": "learned",
                "allow_padding": True},
    "subspaces": {"bits": 3, "format": "product", "granularity": "group", "group_size": 2, "subspaces": 3,
                  "range": "learned", "allow_padding": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_those_of_the_simulated_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 7, 3], [3, 9, 10]])
    config = qat.QuantConfig.from_dict({"weight": SCHEMES[name]})
    prepared: Any = qat.prepare(nn.Sequential(nn.Embedding(11, 11)), config, ids)
    qat.calibrate(prepared, [ids])
    qat.set_mode(prepared, "quantize")
    expected = prepared.eval()[0].quantized_weight().detach()
    network: Any = qat.lower(prepared)
    kind = ProductLookUp if "product" in str(SCHEMES[name]) else TableLookUp
    assert [type(layer) for layer in network.layers.values()] == [kind]

    def whole(self: nn.Module) -> None:
        pytest.fail("the whole table was decoded")

    monkeypatch.setattr(kind, "float_weight", whole)
    assert torch.equal(network(ids), expected[ids])
    assert torch.equal(network(ids[:, :1]), expected[ids[:, :1]])
    assert network(ids[:, :0]).shape == (2, 0, 11)
