"""collector.py, in an interpreter of its own: what is loaded is not looked at, what comes in cycles still goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import gc
from nbd_qcow2j.collector import THRESHOLDS, calm

seen = []
gc.callbacks.append(lambda phase, information: seen.append(phase))
calm()
assert gc.isenabled() and gc.get_freeze_count() > 1000
# What is pending: objects that stay, and no garbage.
kept = [[] for _ in range(THRESHOLDS[0] // 2)]
assert not seen, "a collection where Python's own thresholds have them"

class Knot:
    alive = 0
    def __init__(self):
        self.itself = self
        Knot.alive += 1
    def __del__(self):
        Knot.alive -= 1

most = 0
for _ in range(10 * THRESHOLDS[0]):
    Knot()
    most = max(most, Knot.alive)
assert most <= THRESHOLDS[0] and "stop" in seen, most
"""


def test_a_collection_is_seldom_and_cycles_are_found() -> None:
    # Breakage: collector.py: gc.set_threshold(*THRESHOLDS) -> pass, and -> gc.disable()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
