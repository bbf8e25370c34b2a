"""Observers that try clips and keep the one whose quantize-dequantize error is smallest."""

import torch
from torch import Tensor

from qat.numerics.affine import choose_qparams, dequantize, quantize
from qat.observers.base import row_range
from qat.observers.histogram import Histogram


class Lp(Histogram):
    """The clip that minimises `sum |x_dq - x| ** norm`, over 100 shrunken copies of the full range.

    A larger norm clips less. 2.4 weighs large errors a little more than the squared error does.

    Source: Nahshan et al. 2021, "Loss Aware Post-training Quantization", section 3.2 (L_p norm of the error); 2.4 is
    the norm of Wei et al. 2022, "QDrop", and of Li et al. 2021, "BRECQ" (their published code); the search is over
    candidates, as in Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1.
    """

    CANDIDATES = 100

    @property
    def norm(self) -> float:
        """The exponent of the error."""
        return self.options.norm

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        left, right = self._bounds(row)
        filled = self.counts[row] > 0
        centres = ((left + right) / 2)[filled].float().unsqueeze(0)
        low, high = self._search(centres, self.counts[row][filled].float().unsqueeze(0), left[filled][:1].float(),
                                 right[filled][-1:].float())  # fmt: skip
        return low[0], high[0]

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = x.float()
        low, high = row_range(x)
        return self._search(x, torch.ones(1, 1, device=x.device), low, high)

    def _search(self, x: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.options
        best = (low, high)
        best_error = torch.full_like(low, torch.inf)
        for i in range(self.CANDIDATES, 0, -1):
            shrink = i / self.CANDIDATES
            scale, zero_point = choose_qparams(
                low * shrink, high * shrink, grid.quant_min, grid.quant_max, grid.symmetric
            )
            scale, zero_point = scale.unsqueeze(1), zero_point.unsqueeze(1)
            x_dq = dequantize(quantize(x, scale, zero_point, grid.quant_min, grid.quant_max), scale, zero_point)
            error = x_dq - x
            error = error.square() if self.norm == 2 else error.abs().pow(self.norm)
            error = (error * weight).sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (torch.where(better, low * shrink, best[0]), torch.where(better, high * shrink, best[1]))
        return best


class Mse(Lp):
    """`Lp` of norm 2: the clip that minimises the squared error of quantize-dequantize.

    Source: Banner et al. 2019, "Post training 4-bit quantization", section 3; the search is `Lp`'s.
    """

    @property
    def norm(self) -> float:
        """The exponent of the error."""
        return 2.0
