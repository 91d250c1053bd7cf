"""How much the sweeps do. As it is, `deploy/test --all` takes less than an hour on two slow cores."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("SWEEP_SCALE", "1"))
"""SWEEP_SCALE=4 makes them four times as long: for a night, or for a change of the protocol."""


def scaled(count: int) -> int:
    """As many, times the scale; at least one."""
    return max(1, round(count * SCALE))
