"""One rule, one test: what runs drawn at random meet too seldom to be relied on.

Each is a rule of the engine that a mutation (mutations.py) breaks, or that was found broken.
"""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import pytest
from engine import Engine, Oracle, Shape, initial_contents, room_before_journal, settle
from invariants import NEVER, no_leaks, recover
from simdisk import SimDisk, SimStorage
from stage import BACKED, PAGES, SMALL, Stage, chain, drain_pool, image
from stepper import Stepper, Task
from test_stateful import Kind
from test_stateful import image as fresh
from windows import skip_room_before_journal

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import DeviceFailed, ImageError
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.format.journal import encode_transaction
from nbd_qcow2j.steps import Operation, Pause, Read, ReadInto, Step, Sync, Write, WriteSync, run_simply

ROOMY = Shape(PAGES.options, PAGES.size, journal=1 << 18)
"""Credits for several operations at once."""
LONG = Shape(PAGES.options, 1 << 20, journal=1 << 18)
"""An L2 table of which three sectors are used."""


def cut(stage: Stage) -> None:
    """The power is cut; nothing that was not durable is kept. What was flushed must be there."""
    recover(next(stage.sim.crash_states(1, Random(0))), stage.shape, stage.oracle, seed=1)


def killed(stage: Stage) -> Stage:
    """The server is killed and started again on the page cache it left."""
    stage.sim.mend()
    stage.sim.kill()
    return Stage(stage.shape, sim=stage.sim, oracle=stage.oracle, keeps_cache=True)


def fill_ring(stage: Stage) -> None:
    """Commit pages into half of the ring and send them home; the tail stays."""
    ring = stage.disk.log.ring
    for turn in range(ring.length // 2 // 8192):
        stage.do(stage.write(turn % 4 * 8, 4), stage.flush())
    for _ in range(4):
        stage.do(stage.round(least_bytes=NEVER), stage.flush())
    assert not stage.disk.pending.clusters


def test_a_header_slot_whose_write_failed_is_made_durable_before_the_next_is_written() -> None:
    # The slot's write fails, its bytes stay in the page cache: on the disk its place holds the slot before the last.
    # The server is killed; the next one believes what it reads, uses the ring, and writes the next slot over the only
    # good one. A power cut that tears this one leaves a tail whose transactions have long been written over.
    stage = Stage(ROOMY)
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


# ---- commit


def test_data_that_returned_while_a_sync_ran_is_synced_by_its_own_commit() -> None:
    stage = Stage(BACKED)
    stepper = Stepper()
    first = stepper.add(stage.write(0, 8, fua=True), "first")
    while not isinstance(first.step, Sync):
        stepper.move(first)
    stepper.move(first)
    run_simply(stage.write(8, 8))
    stepper.run(first)
    stage.do(stage.flush())
    cut(stage)


def test_a_commit_records_sectors_as_they_were_when_it_began() -> None:
    # While it syncs its data, another write is linked in the same sector; that one's data is not durable.
    stage = Stage(BACKED)
    stage.do(stage.write(16, 8))
    stage.home()
    stepper = Stepper()
    first = stepper.add(stage.write(0, 8, fua=True), "first")
    while not isinstance(first.step, Sync):
        stepper.move(first)
    stepper.move(first)
    run_simply(stage.write(8, 8))
    stepper.run(first)
    cut(stage)


def test_a_commit_of_data_may_be_cut_at_every_move() -> None:
    # The journal must not name the new cluster before what was written there is durable.
    stage = Stage(BACKED)
    stepper = Stepper()
    stepper.add(stage.write(0, 16, fua=True), "writer")
    while not stepper.run(limit=1):
        for state in stage.sim.crash_states(8, Random(1)):
            recover(state, stage.shape, stage.oracle, seed=1)


def test_a_table_that_a_snapshot_shares_is_copied_whole_before_the_copy_is_linked() -> None:
    # The journal holds the one sector of the copy in which an entry changes; the others are in the copy alone.
    kind = Kind(Shape("cluster_size=4096", 320 << 10), before=("write -P 17 0 8k", "write -P 18 264k 8k"))
    stage = Stage(kind.shape, sim=fresh(kind).copy())
    stage.do(stage.write(0, 8), stage.flush())
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    recover(next(stage.sim.crash_states(1, Random(0))), stage.shape, stage.oracle, seed=1, plain=False)


@pytest.mark.parametrize("kind", ["sync", "write_sync"])
def test_what_failed_once_is_not_tried_again_and_believed(kind: str) -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.sim.fail(kind)
    for _ in range(2):
        with pytest.raises(DeviceFailed):
            run_simply(stage.flush())
    assert stage.disk.log.failed is not None


def test_a_sync_of_the_checkpoint_that_fails_latches_the_device() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    stage.sim.fail("sync")
    with pytest.raises(DeviceFailed):
        run_simply(stage.round())
    with pytest.raises(DeviceFailed):
        run_simply(stage.write(8, 4))
    cut(stage)


def test_a_new_table_is_durable_before_a_commit_that_syncs_nothing_else() -> None:
    # Zeros over a backing file need a table, and no data. The table's cluster has held data: what is durable there
    # when the table is not would be read as entries.
    shape = Shape("cluster_size=4096", 4 << 20, backed=True)
    stage = Stage(shape)
    stage.do(stage.write(0, 8))
    stage.home()
    stage.do(stage.trim(0, 8), stage.flush(), stage.release())
    host = stage.disk.allocator.found[-1]
    drain_pool(stage)
    stage.disk.allocator.found.append(host)
    stage.do(stage.calls.zero(4096, 8), stage.flush())
    assert stage.disk.mapping.l2_offset(512) == host * 4096
    cut(stage)


@pytest.mark.parametrize("shape", [PAGES, BACKED, Shape("cluster_size=512", 64 << 10)], ids=str)
def test_a_ring_that_is_full_drains(shape: Shape) -> None:
    # Writers and flushes go on until they must wait; only then the checkpoint begins. What they have left must do.
    stage = Stage(shape)
    stepper = Stepper(whole_steps=True)
    for turn in range(100):
        writer = stepper.add(chain(stage.write(turn % 16 * 8, 4), stage.flush()), f"writer {turn}")
        while not writer.done and not writer.waits_for:
            stepper.move(writer)
        if writer.waits_for:
            break
    assert writer.waits_for
    for _ in range(60):
        task = stepper.add(chain(stage.round(tight=checkpoint.is_tight(stage.disk)), checkpoint.settle(stage.disk)))
        stepper.run(task, patience=500)
        assert task.error is None, task.error
        if writer.done:
            break
    assert writer.done and writer.error is None, stepper.describe()
    settle(stage.engine, detach(stage.disk))
    no_leaks(stage.sim, plain=True)


def test_a_commit_that_frees_nothing_leaves_the_reserve_alone() -> None:
    # What is noted without credits has filled the running transaction; its pages are none of the tail's.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    disk, ring = stage.disk, stage.disk.log.ring
    index = 1
    while disk.log.running.size + ring.used + ring.reserve <= ring.length:
        disk.put_page(index, bytes(4095) + b"x")
        index += 1
    assert ring.used + disk.log.running.size <= ring.length
    stepper = Stepper()
    flush = stepper.add(stage.flush(), "flush")
    while not flush.done and not flush.waits_for:
        stepper.move(flush)
    assert flush.waits_for == "ring room"


# ---- home elsewhere


def upto(stage: Stage, operation: Operation[Any], step: type[Step], *, begun: bool = False) -> tuple[Stepper, Task]:
    """Run an operation up to a step of this type, which is still to begin, or is in flight."""
    stepper = Stepper()
    task = stepper.add(operation)
    while type(task.step) is not step:
        stepper.move(task)
    if begun:
        stepper.move(task)
    stage.watch.check(stepper.tasks)
    return stepper, task


def finish(stage: Stage, stepper: Stepper) -> None:
    """What was kept waiting ends; the contents are right, also after a flush and a cut."""
    stepper.run(patience=500)
    assert all(task.error is None for task in stepper.tasks)
    stage.watch.check()
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    stage.do(stage.flush())
    cut(stage)


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
@pytest.mark.parametrize("how", ["direct", "trim"])
def test_a_record_is_void_when_its_page_is_written_or_trimmed_elsewhere(committed: bool, how: str) -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4))
    if committed:
        stage.do(stage.flush())
    stage.do(stage.write(0, 8) if how == "direct" else stage.trim(0, 8), stage.flush())
    cut(stage)


def test_a_record_that_is_being_committed_is_void_as_well() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4))
    stepper, _ = upto(stage, stage.flush(), WriteSync, begun=True)
    run_simply(stage.write(0, 8))
    finish(stage, stepper)


def test_a_page_that_goes_home_before_its_commit_leaves_the_running_transaction() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.round(), stage.flush())
    cut(stage)


def test_a_page_that_is_replaced_on_its_way_home_keeps_its_place() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    stepper, _ = upto(stage, stage.round(), Sync)
    run_simply(stage.write(0, 3))
    finish(stage, stepper)
    stage.home()
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)


def test_a_trim_waits_for_a_write_in_place() -> None:
    stage = Stage(ROOMY)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(0, 8), Write)
    trim = stepper.add(stage.trim(0, 8), "trim")
    while not trim.done and not trim.waits_for:
        stepper.move(trim)
    stage.watch.check(stepper.tasks)
    finish(stage, stepper)


def test_a_cluster_that_moved_while_its_refcount_was_read_is_not_written_in_place() -> None:
    # A trim is reading the refcount block, and a small write waits for that read to learn that the cluster is ours.
    # Before it looks the trim is over, and the host cluster is another guest cluster's.
    stage = Stage(PAGES, in_place=True)
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    stage.forget_tables()
    stage.do(stage.read(0, 8))
    others = chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(8, 8), stage.flush())
    stepper, task = upto(stage, others, Read)
    write = stepper.add(stage.write(0, 4))
    while not write.waits_for:
        stepper.move(write)
    assert write.waits_for == "table load"
    home = stage.disk.mapping.find(0)
    while not task.done:
        stepper.move(task)
    assert stage.disk.mapping.find(1) == home and not write.done
    finish(stage, stepper)


def test_a_merge_reads_again_what_was_written_beneath_it() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(1, 2), ReadInto, begun=True)
    run_simply(stage.write(0, 8))
    finish(stage, stepper)


def test_a_merge_keeps_the_merge_that_came_between() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(1, 2), ReadInto, begun=True)
    run_simply(stage.write(5, 2))
    finish(stage, stepper)


def test_a_page_that_has_become_zero_returns_its_promise() -> None:
    stage = Stage(PAGES)
    run_simply(changes.write_pending(stage.disk, 0, memoryview(bytes(4096))))
    assert stage.disk.allocator.tokens
    stage.do(stage.flush(), stage.round(), stage.flush())
    assert stage.disk.allocator.tokens == len(stage.disk.table_tokens)


def test_what_goes_home_is_what_was_committed() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush(), stage.write(8, 8), stage.round())
    cut(stage)


def test_a_sector_that_is_committed_again_on_its_way_home_stays_in_the_set() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush())
    stepper, _ = upto(stage, stage.round(), Sync)
    for operation in (stage.write(8, 8), stage.flush()):
        run_simply(operation)
        stage.watch.check(stepper.tasks)
    finish(stage, stepper)


def test_a_load_that_is_overtaken_by_its_table_going_home_reads_again() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush())
    stage.forget_tables()
    stepper, _ = upto(stage, stage.read(0, 8), Read, begun=True)
    run_simply(stage.round())
    assert not stage.disk.log.home
    finish(stage, stepper)


def test_a_slow_reader_keeps_a_freed_cluster() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    stepper, _ = upto(stage, stage.read(0, 8), ReadInto)
    for operation in (stage.trim(0, 8), stage.flush(), stage.release(), stage.write(8, 16)):
        run_simply(operation)
        stage.watch.check(stepper.tasks)
    finish(stage, stepper)


# ---- metadata that goes home


@pytest.mark.parametrize("between", ["clean", "running", "committing"])
def test_what_lies_between_two_sectors_goes_home_with_them_unless_it_is_not_committed(between: str) -> None:
    # One L2 table: its first sector has entries 0 to 63, its second 64 to 127, its third 128 to 191.
    stage = Stage(LONG)
    stage.do(stage.write(0, 8), stage.write(128 * 8, 8))
    stage.home()
    home = stage.disk.mapping.l2_offset(0)
    stage.do(stage.trim(0, 8), stage.trim(128 * 8, 8), stage.flush())
    stepper = None
    if between != "clean":
        stage.do(stage.write(64 * 8, 8))
    if between == "committing":
        stepper, _ = upto(stage, stage.flush(), WriteSync)
    assert set(stage.disk.log.home) >= {home, home + 1024} and home + 512 not in stage.disk.log.home
    seen = len(stage.sim.history)
    run_simply(stage.round())
    assert not stage.disk.log.home
    written = [(each.offset, each.length) for each in stage.sim.history[seen:] if each.kind == "write"]
    if between == "clean":
        assert (home, 1536) in written
    else:
        assert {(home, 512), (home + 1024, 512)} <= set(written)
    cut(stage)
    if stepper is not None:
        finish(stage, stepper)
    stage.home()
    cut(stage)


@pytest.mark.parametrize("call", ["sync", "write_sync"])
def test_what_a_failed_commit_held_does_not_go_home(call: str) -> None:
    # A round has copied what is committed, and pauses. A commit fails: what it held is in no transaction any more, and
    # in the live table still. The round goes on, and meets the latch only after it has written.
    # A ring in whose rounds there is a pause.
    stage = Stage(Shape(PAGES.options, 1 << 20, journal=1 << 23))
    stage.do(stage.write(0, 8), stage.write(128 * 8, 8))
    stage.home()
    home = stage.disk.mapping.l2_offset(0)
    stage.do(stage.trim(0, 8), stage.trim(128 * 8, 8), stage.flush())
    stage.do(*(stage.write(cluster * 8, 4) for cluster in range(200, 220)), stage.flush(), stage.write(64 * 8, 8))
    assert home + 512 not in stage.disk.log.home
    stepper, round_ = upto(stage, stage.round(), Pause)
    flush = stepper.add(stage.flush())
    stage.sim.fail(call)
    while not flush.done:
        stepper.move(flush)
    seen = len(stage.sim.history)
    while not round_.done:
        stepper.move(round_)
    assert isinstance(flush.error, DeviceFailed) and isinstance(round_.error, DeviceFailed)
    for each in stage.sim.history[seen:]:
        assert not (each.kind == "write" and each.offset <= home + 512 < each.offset + each.length)
    for sim in stage.sim.crash_states(20, Random(0)):
        recover(sim, stage.shape, stage.oracle, seed=1)


# ---- freed metadata


@pytest.mark.parametrize("apart", [True, False], ids=["committed before", "in one transaction"])
def test_sectors_of_a_table_that_moved_are_not_written_over_what_came_after_it(apart: bool) -> None:
    # The refcount table gets an entry, then it is full and moves; its old cluster becomes a guest's.
    shape = Shape("cluster_size=512,refcount_bits=64", 64 << 10, journal=1 << 20)
    sim = image(shape).copy()
    capacity = 64 * 64 * 512
    storage = SimStorage(sim)
    storage.truncate(capacity - 65 * 512 - (shape.journal + 8192) - room_before_journal(512))
    storage.sync()
    stage = Stage(shape, sim=sim)
    disk = stage.disk
    skip_room_before_journal(disk)
    old = disk.allocator.reftable.host_offset
    number = count()
    while disk.allocator.reftable.host_offset == old:
        stage.do(stage.write(next(number) * 8 % 120, 8))
        if apart:
            stage.do(stage.flush())
    stage.do(stage.flush(), stage.release())
    assert old // 512 in disk.allocator.found
    for _ in range(12):
        if old // 512 not in disk.allocator.found and old // 512 not in disk.allocator.pool:
            break
        stage.do(stage.trim(0, 8), stage.flush(), stage.write(0, 8), stage.flush())
    assert old // 512 in stage.watch._named(live=True)
    cut(stage)
    for _ in range(3):
        stage.do(stage.round(), stage.flush())
        cut(stage)
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)


# ---- opening


def test_every_opening_for_writing_begins_with_a_sync() -> None:
    # Nothing that is believed may be in the page cache alone: bit 62 found or not.
    stage = Stage(PAGES)
    assert stage.sim.history[0].kind == "sync"
    stage.do(stage.write(0, 8), stage.flush())
    seen = len(stage.sim.history)
    killed(stage)
    assert stage.sim.history[seen].kind == "sync"


def test_a_log_that_looks_committed_is_durable_before_it_is_served() -> None:
    # The commit's write fails, its bytes stay in the page cache; the server is killed, and the next one replays them.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush(), stage.write(8, 4))
    stage.sim.fail("write_sync")
    with pytest.raises(DeviceFailed):
        run_simply(stage.flush())
    after = killed(stage)
    assert after.disk.replayed_transactions == 2
    cut(after)


@pytest.mark.parametrize("shape", [PAGES, BACKED, SMALL], ids=lambda shape: shape.options)
def test_attach_and_detach_may_be_cut_at_every_move(shape: Shape) -> None:
    sim = image(shape).copy()
    oracle = Oracle(initial_contents(shape))
    engine = Engine(sim, shape, Random(1))
    states = 0

    def watched(stepper: Stepper) -> int:
        seen = 0
        while not stepper.run(limit=1):
            for state in sim.crash_states(8, Random(seen)):
                recover(state, shape, oracle, seed=2)
                seen += 1
        return seen

    stepper = Stepper()
    opening = stepper.add(engine.opening(), "open")
    states += watched(stepper)
    assert opening.error is None
    run_simply(changes.write(opening.result, bytes(512), 0))
    oracle.end(oracle.begin(0, 1, 0))
    stepper.add(detach(opening.result), "detach")
    states += watched(stepper)
    print(f"{states} states")


# ---- replay


def append(stage: Stage, *, sequence: int = 0, uuid: bytes = b"", crc: int = 0, tear: bool = False) -> None:
    """Put a transaction behind the last: the next one, but for what is given."""
    ring = stage.disk.log.ring
    encoded = encode_transaction(
        sequence=sequence or ring.next_sequence, uuid=uuid or ring.uuid, previous_crc=crc or ring.head_crc,
        host_revokes=[], guest_revokes=[], sectors=[], pages=[(0, b"\x77" * 4096)],
    )  # fmt: skip
    data = bytearray(b"".join(encoded.buffers))
    if tear:
        data[1024] ^= 1
    ((offset, _),) = ring.place(ring.head, encoded.length)
    SimStorage(stage.sim).write_sync(offset, [data])


@pytest.mark.parametrize(
    ("how", "replayed"),
    [({}, 2), ({"uuid": bytes(16)}, 1), ({"tear": True}, 1)],
    ids=["the next one", "another journal's", "torn"],
)
def test_only_the_next_transaction_of_this_journal_is_replayed(how: dict[str, object], replayed: int) -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    append(stage, **how)  # type: ignore[arg-type]
    stage.sim.kill()
    disk = Engine(stage.sim, PAGES, Random(1)).open()
    assert disk.replayed_transactions == replayed


def test_a_transaction_that_follows_another_is_not_replayed() -> None:
    # It is whole, and ours, and was written after one that is not there: something was lost.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    append(stage, crc=1)
    stage.sim.kill()
    with pytest.raises(ImageError, match="hole"):
        Engine(stage.sim, PAGES, Random(1)).open()


def test_a_guest_cannot_write_what_looks_like_a_lost_transaction() -> None:
    # Its pages lie in the ring; one that looks like a later transaction must not make the journal look damaged.
    stage = Stage(PAGES)
    forged = b"".join(
        bytes(each)
        for each in encode_transaction(
            sequence=1000, uuid=bytes(16), previous_crc=0, host_revokes=[], guest_revokes=[],
            sectors=[(512, bytes(512))], pages=[],
        ).buffers
    )  # fmt: skip
    # A transaction has one block before its pages: the second 4 KiB of the ring begin in the last block of a page.
    stream = bytes(3584) + forged + bytes(512)
    assert len(stream) == 8192
    for first, part in ((0, stream[:4096]), (4096, stream[4096:])):
        run_simply(changes.write_pending(stage.disk, first, memoryview(part)))
    run_simply(stage.disk.flush())
    location = stage.disk.log.ring.location
    assert stage.sim.peek(location.ring_offset + 4096, 4096) == forged
    stage.sim.kill()
    engine = Engine(stage.sim, PAGES, Random(1))
    disk = engine.open()
    data = bytearray(8192)
    run_simply(disk.read_into(memoryview(data), 0))
    assert data == stream


def test_an_end_of_the_journal_that_was_lost_is_damage_and_refused() -> None:
    # The slot knows of a transaction that is not there any more: an empty journal would be a lie.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush(), stage.round(), stage.write(8, 4), stage.flush(), stage.round())
    ring = stage.disk.log.ring
    assert ring.generation > 1 and ring.transactions
    SimStorage(stage.sim).write_sync(ring.location.ring_offset, [bytes(ring.length)])
    stage.sim.kill()
    with pytest.raises(ImageError, match="lost"):
        Engine(stage.sim, PAGES, Random(1)).open()


def test_a_record_beside_a_revoke_in_one_transaction_is_the_newer_version() -> None:
    # Trimmed and written again between two commits: the revoke is meant for the version before.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush(), stage.trim(0, 8), stage.write(0, 3), stage.flush())
    assert stage.disk.log.ring.transactions[-1].pages
    cut(stage)


def test_a_round_that_cannot_take_all_takes_the_oldest() -> None:
    # Each flush has a page of its own, and the cluster that came first lies behind all others: it is the one that holds
    # the tail.
    stage = Stage(Shape(PAGES.options, 1 << 20, journal=1 << 19))
    ring = stage.disk.log.ring
    fits = ring.max_transaction // 2 // ring.home_cost
    stage.do(stage.write(255 * 8, 4), stage.flush())
    for cluster in range(fits + 10):
        stage.do(stage.write(cluster * 8, 4), stage.flush())
    assert not checkpoint.is_tight(stage.disk)
    stage.do(stage.round())
    assert 255 not in stage.disk.pending.clusters and len(stage.disk.pending.clusters) >= 10


@pytest.mark.parametrize("is_read", [True, False])
def test_a_table_read_from_where_another_lies_is_not_written_between_its_sectors(is_read: bool) -> None:
    # Scenario: an L1 entry names the L1 table; the guest reads below it, so the L1 table is in the cache as an L2
    # table, as it was then. Its first and third sector go home, and what is remembered of the second is old.
    cluster, piece = 2048, 512 << 10
    shape = Shape("cluster_size=2048", 128 << 20, journal=1 << 19)
    sim = SimDisk.of(*new_image(shape.size, cluster_size=cluster))
    data = bytearray(cluster)
    storage = SimStorage(sim, "damaged")
    storage.read_into(data, 0)
    l1 = parse_header(bytes(data), file_size=sim.current_size, name="image").l1_offset
    storage.write(l1 + 3 * 512, [bytes(504) + (l1 | 1 << 63).to_bytes(8, "big")])
    storage.sync()
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    # Or it would be met first.
    disk.allocator.counted = None
    sector = bytearray(512)
    if is_read:
        run_simply(disk.read_into(memoryview(sector), 255 * piece))
    for entries in ((64,), (0, 128)):
        for entry in entries:
            run_simply(changes.guarded(disk, changes.write(disk, bytes([1 + entry]) * 512, entry * piece), "write"))
            run_simply(disk.flush())
        for _ in range(3):
            run_simply(checkpoint.round_(disk))
            run_simply(disk.flush())
    settle(engine, detach(disk))
    disk = Engine(sim, shape, Random(1), read_only=True).open()
    for entry in (64, 0, 128):
        run_simply(disk.read_into(memoryview(sector), entry * piece))
        assert bytes(sector) == bytes([1 + entry]) * 512
