"""What range a tensor takes. Observers know nothing of layers; they see rows, one per scale: shape [rows, values].

An observer answers two questions: `measure(x)`, the range of this one tensor (weights, whose values are all there), and
`update(x)` then `range()`, the range of a stream of batches (activations, calibrated). `a.merge(b)` is the observer of
what both saw, and `reduce` says how each state takes part in that. OBSERVERS is the table that configurations choose
from; a new one is a class in this folder and a line there.
"""

from qat.observers.base import Observer, ObserverOptions
from qat.observers.entropy import Entropy
from qat.observers.extremes import AbsMax, Ema, Extremes, MinMax
from qat.observers.histogram import BINS, Histogram, Percentile
from qat.observers.moments import Sigma
from qat.observers.search import Lp, Mse

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "ema": Ema,
    "percentile": Percentile,
    "mse": Mse,
    "absmax": AbsMax,
    "lp": Lp,
    "sigma": Sigma,
    "entropy": Entropy,
}

__all__ = [
    "BINS",
    "OBSERVERS",
    "AbsMax",
    "Ema",
    "Entropy",
    "Extremes",
    "Histogram",
    "Lp",
    "MinMax",
    "Mse",
    "Observer",
    "ObserverOptions",
    "Percentile",
    "Sigma",
]
