"""How the learning rate falls after the warmup: one table."""

import math
from collections.abc import Callable, Mapping

SCHEDULES: Mapping[str, Callable[[float, float, float], float]] = {
    "constant": lambda high, low, done: high,
    "linear": lambda high, low, done: low + (high - low) * (1 - done),
    "wsd": lambda high, low, done: low + (high - low) * (1 - done),
    "cosine": lambda high, low, done: low + (high - low) * 0.5 * (1 + math.cos(math.pi * done)),
}
"""optimizer.schedule -> the rate between `high` and `low` after the share `done` of the fall."""
