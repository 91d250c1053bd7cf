"""The promises of pool clusters: kept as long as somebody needs them, given back when nobody does.

Each is a hole of the protocol that an attack on it found. Where a comment names a `Breakage`, that change of the engine
opens the hole again, and the test fails.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from engine import Shape
from stage import PAGES, Stage, cut, drain_pool, full, pending, until
from stepper import Stepper

from nbd_qcow2j import changes
from nbd_qcow2j.errors import RequestError
from nbd_qcow2j.pending import Page
from nbd_qcow2j.steps import Step, Write, run_simply

PAIRS = Shape("cluster_size=8192", 64 << 10)
ROOMY = Shape("cluster_size=4096", 64 << 10, journal=1 << 19)
SMALL = Shape("cluster_size=512", 96 << 10, journal=1 << 21)
"""A ring whose transactions take the links of fifteen clusters."""


def test_a_table_that_nobody_needs_any_more_is_promised_no_cluster() -> None:
    # Zero pages over nothing go home without a table; what is trimmed before it goes home needs none either.
    # Breakage: disk.py: self.return_table_token(index)\n\n -> pass
    stage = Stage(Shape("cluster_size=4096", 16 << 20, journal=1 << 20))
    disk = stage.disk
    for at in range(0, 16 << 20, 2 << 20):
        # One page below each L1 entry.
        run_simply(changes.write_pending(disk, at, memoryview(bytes(4096))))
    assert len(disk.table_tokens) == 8
    stage.do(stage.flush(), stage.round(), stage.flush())
    assert not disk.pending.clusters and not any(disk.mapping.l1.entries)
    assert not disk.table_tokens and not disk.allocator.tokens
    for at in range(0, 16 << 20, 2 << 20):
        stage.do(pending(stage, at >> 9, 16))
    assert set(disk.table_tokens.values()) == {2}
    for at in range(0, 16 << 20, 2 << 20):
        stage.do(stage.trim(at >> 9, 8))
    assert set(disk.table_tokens.values()) == {1}
    stage.do(stage.trim(0, 16 << 11))
    assert not disk.table_tokens and not disk.allocator.tokens
    stage.home()



def test_the_last_page_that_needs_a_table_may_vanish_while_another_makes_it() -> None:
    # A direct write makes the table with the cluster that a pending page was promised for it; the page is trimmed
    # before the table is there.
    # Breakage: disk.py: and index not in self.owning -> (away)
    stage = Stage(PAGES)
    stage.do(pending(stage, 40, 8))
    assert stage.disk.table_tokens == {0: 1}
    stage.disk.settings = replace(stage.disk.settings, direct_write=4096)
    stepper = Stepper(whole_steps=True)
    writer = stepper.add(stage.write(0, 8))
    until(stepper, writer, Write)
    assert stage.disk.owning and not stage.disk.mapping.l1.entries[0], "the table is being written"
    trimmer = stepper.add(stage.trim(40, 8))
    while not trimmer.done:
        stepper.move(trimmer)
    assert not stage.disk.pending.clusters and stage.disk.table_tokens == {0: 0}
    stepper.run(writer)
    assert writer.error is None and not stage.disk.table_tokens and not stage.disk.allocator.tokens
    stage.do(stage.flush())
    cut(stage)
    stage.home()


def test_the_promise_of_a_table_that_could_not_be_made_is_given_back_where_nobody_needs_it_any_more() -> None:
    # As before, but the new table finds no room.
    # Breakage: prepared.py: disk.return_table_token(index) -> pass
    stage = Stage(PAGES)
    stage.do(pending(stage, 40, 8))
    stage.disk.settings = replace(stage.disk.settings, direct_write=4096)
    stepper = Stepper(whole_steps=True)
    writer = stepper.add(stage.write(0, 8))
    until(stepper, writer, Write)
    trimmer = stepper.add(stage.trim(40, 8))
    while not trimmer.done:
        stepper.move(trimmer)
    full(stage.sim, "write")
    stepper.run(writer)
    assert isinstance(writer.error, RequestError) and writer.error.errno == errno.ENOSPC
    stage.sim.mend()
    assert not stage.disk.table_tokens and not stage.disk.allocator.tokens
    stage.do(stage.flush())
    cut(stage)
    stage.home()


def test_a_promise_of_a_table_that_another_made_is_given_back() -> None:
    # A direct write makes the table with a token of its own; while it is written, a page becomes pending that needs
    # the table too.
    # Breakage: prepared.py: if index in disk.table_tokens: -> if used and promised:
    stage = Stage(SMALL)
    stepper = Stepper(whole_steps=True)
    direct = stepper.add(stage.write(0, 8))
    while not stage.disk.mapping.making:
        stepper.move(direct)
    stage.calls.disk.allocator.grow_step = 8
    run_simply(stage.disk.allocator.ensure(8))
    run_simply(stage.write(20, 1, fast=True))
    assert stage.disk.table_tokens.keys() == {0}
    stepper.run(direct)
    assert direct.error is None
    assert not stage.disk.table_tokens
    stage.watch.check()
    stage.home()
    assert not stage.disk.allocator.tokens


def test_a_trim_that_waited_for_a_table_has_the_room_that_it_found() -> None:
    # Two trims need the same table over a backing file. The first finds no room to write it, and the last free
    # cluster goes to somebody else before the second is awake.
    # Breakage: prepared.py: yield from disk.allocator.take_tokens(1)\n            self.tokens += 1\n        table
    # -> while disk.allocator.available < 1:\n                yield from disk.allocator.ensure(1)\n        table
    stage = Stage(replace(ROOMY, backed=True))
    allocator = stage.disk.allocator
    drain_pool(stage)
    stepper = Stepper(whole_steps=True)
    first = stepper.add(stage.trim(0, 8))
    while not stage.disk.mapping.making:
        stepper.move(first)
    second = stepper.add(stage.trim(8, 8))
    while second.waits_for != "L2 table":
        stepper.move(second)
    full(stage.sim, "write")
    stepper.run(first)
    assert isinstance(first.error, RequestError)
    stage.sim.mend()
    taken = allocator.available
    run_simply(allocator.take_tokens(taken))
    stepper.run(second)
    assert second.error is None
    allocator.tokens -= taken
    stage.watch.check()


def test_a_page_that_came_while_its_cluster_became_zero_still_has_a_home() -> None:
    # A cluster of ours is all zero pages, and on its way to be freed, when one of them is written: no token was taken
    # for it, since the cluster had a home.
    # Breakage: going.py: if going.to_zero and disk.pending -> if False and disk.pending
    stage = Stage(PAIRS)
    stage.do(stage.write(0, 16))
    stage.home()
    stage.do(stage.calls.zero(0, 8), stage.calls.zero(8, 8), stage.flush())
    assert len(stage.disk.pending.clusters[0]) == 2 and not stage.disk.cluster_tokens
    stepper = Stepper(whole_steps=True)
    sender = stepper.add(stage.round())
    until(stepper, sender, Step)
    assert 0 in stage.disk.excluded
    run_simply(pending(stage, 0, 8))
    stepper.run(sender)
    stage.do(stage.flush())
    drain_pool(stage)
    full(stage.sim)
    assert run_simply(stage.round())
    assert not stage.disk.pending.clusters
    stage.do(stage.flush())
    cut(stage)


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("length", [4096, 8192])
def test_a_write_for_which_there_is_no_memory_is_promised_nothing(
    monkeypatch: pytest.MonkeyPatch, has_table: bool, length: int
) -> None:
    # Breakage: disk.py: the line that begins with "pages = (Page(" moves behind "self.take_tokens(cluster)".
    stage = Stage(PAIRS)
    disk = stage.disk
    disk.settings = replace(disk.settings, direct_write=1 << 20)
    if has_table:
        stage.do(stage.write(0, 32))
        stage.home()
    before = disk.allocator.tokens

    def refuse(data: bytes) -> Page:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("nbd_qcow2j.disk.Page", refuse)
        disk.try_write(bytes(length), 24 << 10)
    assert disk.allocator.tokens == before and not disk.cluster_tokens and not disk.table_tokens
    stage.do(stage.write(48, length // 512, fast=True), stage.flush())
    stage.home()
    cut(stage)
