"""Recurrent networks: a keyword classifier over recordings of any length, and a forecaster of a time series."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class KeywordGRU(nn.Module):
    """Frames of a recording -> class: a GRU, whose last state is classified.

    Args:
        bands: features of a frame.
        hidden: size of the state.
        classes: how many words.
    """

    def __init__(self, bands: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(bands, hidden, batch_first=True)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """[batch, frames, bands] and [batch] -> [batch, classes]."""
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.gru(packed)
        return self.classify(state[-1])


class Forecaster(nn.Module):
    """The hours before -> the hours to come, as changes from the last one: two layers of LSTM.

    Args:
        series: how many are read.
        hidden: size of the states.
        horizon: hours to forecast, of the last series.
    """

    def __init__(self, series: int, hidden: int, horizon: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.lstm = nn.LSTM(series, hidden, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, horizon))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, hours, series] -> [batch, horizon]."""
        zeros = torch.zeros(2, x.size(0), self.hidden).to(x.device)
        output, (_, _) = self.lstm(x, (zeros, zeros))
        return self.head(output[:, -1]) + x[:, -1, -1:]
