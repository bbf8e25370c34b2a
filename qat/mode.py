"""What a FakeQuantize does with a tensor."""

from enum import Enum


class Mode(Enum):
    """What a FakeQuantize does. The mode is not a tensor: it is set from outside (`set_mode`), never by `forward`."""

    float = "float"
    """Pass through (an absorbed ReLU still applies)."""
    observe = "observe"
    """Pass through and record the range."""
    quantize = "quantize"
    """Fake-quantize; running ranges follow training batches, learned scales get gradients."""
    frozen = "frozen"
    """Fake-quantize with ranges as they are."""
