"""One rule, one test: what runs drawn at random meet too seldom to be relied on.

Each is a rule of the engine that a mutation (mutations.py) breaks, or that was found broken.
"""

from __future__ import annotations

from random import Random

import pytest
from engine import Shape
from invariants import recover
from stepper import Stepper
from test_interleavings import PAGES, SMALL, Stage, chain

from nbd_qcow2j.errors import DeviceFailed
from nbd_qcow2j.steps import WriteSync


def cut(stage: Stage) -> None:
    """The power is cut; nothing that was not durable is kept. What was flushed must be there."""
    recover(next(stage.sim.crash_states(1, Random(0))), stage.shape, stage.oracle, seed=1)


def killed(stage: Stage) -> Stage:
    """The server is killed and started again on the page cache it left."""
    stage.sim.mend()
    stage.sim.kill()
    return Stage(stage.shape, sim=stage.sim, oracle=stage.oracle)


def fill_ring(stage: Stage) -> None:
    """Commit pages into half of the ring and send them home; the tail stays."""
    ring = stage.disk.log.ring
    for turn in range(ring.length // 2 // 8192):
        stage.do(stage.write(turn % 4 * 8, 4), stage.flush())
    for _ in range(4):
        stage.do(stage.round(move_tail=False), stage.flush())
    assert not stage.disk.pending.clusters


def test_a_header_slot_whose_write_failed_is_made_durable_before_the_next_is_written() -> None:
    # The slot's write fails, its bytes stay in the page cache: on the disk its place holds the slot before the last.
    # The server is killed; the next one believes what it reads, uses the ring, and writes the next slot over the only
    # good one. A power cut that tears this one leaves a tail whose transactions have long been written over.
    stage = Stage(Shape(PAGES.options, PAGES.size, journal=1 << 18))
    stage.sim.physical_sector = 4096
    for _ in range(2):
        fill_ring(stage)
        if stage.disk.log.ring.generation == 1:
            stage.do(stage.round())
    stage.sim.fail("write_sync")
    with pytest.raises(DeviceFailed):
        stage.do(stage.round())
    after = killed(stage)
    fill_ring(after)
    stepper = Stepper()
    sender = stepper.add(after.round(), "checkpoint")
    slots = after.disk.log.ring.location.offset
    while not (isinstance(sender.step, WriteSync) and sender.step.offset < slots + 8192):
        stepper.move(sender)
    stepper.move(sender)
    states = 0
    for state in after.sim.crash_states(64, Random(1)):
        recover(state, after.shape, after.oracle, seed=1)
        states += 1
    assert states > 2


def test_a_table_is_found_though_no_other_may_be_forgotten_for_it() -> None:
    # All other tables have changes that are not committed, and the cache is full: a reader that had its table
    # forgotten as soon as it was loaded would load it for ever, and the commit might wait for that reader.
    stage = Stage(SMALL)
    stage.do(stage.write(0, 8), stage.write(64, 8), stage.write(128, 8))
    stage.home()
    stage.forget_tables()
    stage.disk.cache.limit = 1
    stage.do(stage.write(8, 8))
    stepper = Stepper(Random(1))
    reader = stepper.add(chain(stage.read(64, 8), stage.read(128, 8)), "reader")
    stepper.run(reader, patience=100)
    assert reader.error is None
