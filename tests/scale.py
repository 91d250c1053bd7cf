"""How much those sweeps do that draw at random; what is exhaustive, and the kills and the soak, are what they are."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("SWEEP_SCALE", "1"))
"""SWEEP_SCALE=4 lets them draw four times as much: for a night, or for a change of the protocol."""


def scaled(count: int) -> int:
    """As many, times the scale; at least one."""
    return max(1, round(count * SCALE))
