"""Recurrent networks on real data: spoken digits and the temperature of a transformer, from float to 8-bit integers."""

import copy
import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

import qat
from tests.networks.recurrent import Forecaster, KeywordGRU
from tests.whole_way import assert_files_agree, assert_sixteen_bits_are_float, config

SHARED = Path(os.environ.get("QAT_SHARED", Path(__file__).parents[2] / "shared"))
Inputs = tuple[Tensor, ...]


def recordings(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log power in 16 bands, [n, 40, 16]; lengths in frames; digits) of spoken digits."""
    path = SHARED / "data" / "fsdd" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here (set QAT_SHARED)")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(path, columns=["audio", "label"]).slice(0, count).to_pydict()
    window, frames = torch.hann_window(256), []
    for audio in rows["audio"]:
        wave = torch.frombuffer(bytearray(audio), dtype=torch.int16).float() / 2**15
        power = torch.stft(wave, 256, 200, window=window, return_complex=True).abs().square()[1:]
        frames.append((power.reshape(16, 8, -1).mean(1) + 1e-6).log().T[:40] / 4 + 2)
    lengths = torch.tensor([len(f) for f in frames])
    padded = F.pad(rnn.pad_sequence(frames, batch_first=True), (0, 0, 0, 40))[:, :40]
    return padded, lengths, torch.tensor(rows["label"])


def fit(net: nn.Module, data: Inputs, steps: int, lr: float, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    *inputs, target = data
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    net.train()
    for _ in range(steps):
        chosen = torch.randint(len(target), (64,))
        optimizer.zero_grad()
        loss(net(*(x[chosen] for x in inputs)), target[chosen]).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def test_a_gru_hears_digits_in_eight_bits(tmp_path: Path) -> None:
    train, test = recordings("train.parquet", 1800), recordings("test.parquet", 300)

    @torch.no_grad()
    def accuracy(net: nn.Module) -> float:
        return float((net(*test[:2]).argmax(1) == test[2]).float().mean())

    net = KeywordGRU(16, 48, 10)
    fit(net, train, 300, 1e-2, F.cross_entropy)
    before = accuracy(net)
    assert before > 0.8
    assert_sixteen_bits_are_float(copy.deepcopy(net), (test[0][:64], test[1][:64]))
    prepared = qat.prepare(copy.deepcopy(net), config(8), (train[0][:4], train[1][:4]))
    qat.calibrate(prepared, [train[:2]])
    fit(prepared, train, 40, 1e-3, F.cross_entropy)
    assert accuracy(prepared) > before - 0.02
    network = assert_files_agree(prepared, test[:2], tmp_path, onnx=False)
    assert accuracy(network) == accuracy(prepared)


def test_an_lstm_forecasts_in_eight_bits(tmp_path: Path) -> None:
    path = SHARED / "data" / "ett" / "ETTh1.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set QAT_SHARED)")
    with path.open() as file:
        rows = [[float(v) for v in row[1:]] for row in list(csv.reader(file))[1:6001]]
    series = torch.tensor(rows)
    series = (series - series[:4500].mean(0)) / series[:4500].std(0)
    windows = series.unfold(0, 30, 1).transpose(1, 2)  # 24 hours, and the 6 that follow
    x, y = windows[:, :24].contiguous(), windows[:, 24:, -1].contiguous()
    test = x[4500::3], y[4500::3]

    @torch.no_grad()
    def error(net: nn.Module) -> float:
        return float((net(test[0]) - test[1]).square().mean())

    net = Forecaster(7, 24, 6)
    fit(net, (x[:4470], y[:4470]), 200, 5e-3, F.mse_loss)
    stays = float((test[0][:, -1, -1:] - test[1]).square().mean())
    before = error(net)
    assert before < stays  # it has learned something
    assert_sixteen_bits_are_float(copy.deepcopy(net), (test[0][:64],))
    prepared = qat.prepare(copy.deepcopy(net), config(8), x[:4])
    qat.calibrate(prepared, [(x[:512],)])
    fit(prepared, (x[:4470], y[:4470]), 40, 1e-3, F.mse_loss)
    assert error(prepared) < 1.1 * before
    network = assert_files_agree(prepared, test[:1], tmp_path, onnx=False)
    assert abs(error(network) - error(prepared)) < 1e-2 * before
