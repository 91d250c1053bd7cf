"""One test for each hole that a review of the design found: the rule that closes it, and what breaks without it.

Each test names under `Breakage:` a change of the package that removes the rule, as a diff (`-` old lines, `+` new
ones, in a file of the package); the test was seen to fail with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import images
import pytest
from engine import SECTOR, Oracle, Shape, fill, number_of
from simdisk import PowerCut, SimStorage
from stepper import Stepper, Task, every_order
from test_windows import PAGE, SMALL, TABLE, use_all_below
from windows import QUICK, Explorer, Life, numbers, run

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.errors import DeviceFailed, ImageError
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.format.tables import OFFSET_MASK
from nbd_qcow2j.journal.transaction import BASE_COST
from nbd_qcow2j.steps import Operation


class Case:
    """An image, the server on it, and what recovers every disk that a cut now may leave."""

    def __init__(self, kind: str, shape: Shape, directory: Path, *, discard: bool = True) -> None:
        self.image, self.shape, self.discard = images.make(kind, shape, directory), shape, discard
        self.explorer = Explorer(self.image, shape, replace(QUICK, subsets=200))
        reader = Life(self.image.copy(), shape, Oracle([]))
        reader.open(read_only=True)
        self.initial = numbers(reader.contents())

    def start(self) -> Life:
        life = Life(self.image.copy(), self.shape, Oracle(list(self.initial)), discard=self.discard)
        life.open()
        return life

    def cut(self, life: Life) -> None:
        self.explorer.moment(life.sim, life.oracle)


def writing(life: Life, first: int, count: int, number: int) -> Operation[None]:
    started = life.oracle.begin(first, count, number)
    yield from changes.guarded(life.disk, changes.write(life.disk, fill(number) * count, first * SECTOR), "write")
    life.oracle.end(started)


def trimming(life: Life, first: int, count: int) -> Operation[None]:
    started = life.oracle.begin(first, count, 0)
    operation = changes.zero(life.disk, first * SECTOR, count * SECTOR, trim=True, may_trim=True)
    yield from changes.guarded(life.disk, operation, "trim")
    life.oracle.end(started)


def host_of(life: Life, sector: int) -> int:
    """Where the cluster of a sector lives; 0 for nowhere."""
    cluster = sector * SECTOR >> life.disk.geometry.cluster_bits
    run(life.disk.mapping.load_l2(cluster))
    return life.disk.mapping.find(cluster)[0] & OFFSET_MASK


def finish(stepper: Stepper, *tasks: Task) -> None:
    stepper.run(*tasks)
    for task in tasks:
        assert task.error is None, f"{task.name}: {task.error}"


def test_two_sub_page_writes_into_one_page_both_survive(tmp_path: Path) -> None:
    # Two callers write different sectors of one page that is not pending: both read it, both merge.
    # Breakage: changes.py
    # -             page = disk.pending.get(index)
    # -             if page is not None:
    # +             if page is not None:
    case = Case("plain", PAGE, tmp_path)
    orders = 0
    for order in every_order(500):
        life = case.start()
        life.write(8, 8)
        life.flush()
        stepper = Stepper(order, whole_steps=True)
        finish(stepper, stepper.add(writing(life, 9, 1, 70), "one"), stepper.add(writing(life, 13, 2, 71), "two"))
        found = numbers(life.contents())
        assert (found[9], found[13:15]) == (70, [71, 71]), f"order {order}"
        life.flush()
        case.cut(life)
        orders += 1
    assert 2 < orders < 500


def test_a_page_is_not_larger_than_its_cluster(tmp_path: Path) -> None:
    # Clusters of 512 bytes: one of eight neighbours is written directly, the others stay in the journal.
    # Breakage: geometry.py
    # - return min(MAX_PAGE, self.cluster_size)
    # + return MAX_PAGE
    case = Case("plain", replace(SMALL, journal=1 << 18), tmp_path)
    life = case.start()
    life.write(8, 7, pending=True)
    life.flush()
    life.disk.settings = replace(life.settings, direct_write=SECTOR)
    run(writing(life, 10, 1, 70))
    assert host_of(life, 10) and not host_of(life, 9)
    life.flush()
    case.cut(life)
    life.checkpoint(clusters=3)
    life.flush()
    case.cut(life)


def test_a_record_and_a_revoke_of_one_version_never_share_a_transaction(tmp_path: Path) -> None:
    # A page is in the journal, and again in the running transaction, when its cluster is written directly: the
    # revoke joins that transaction, and would not void a record in it.
    # Breakage: disk.py
    # -             running.forget_page(index)
    # +             pass
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 8, pending=True)
    life.flush()
    life.write(8, 8, pending=True)
    life.write(8, 8)
    life.flush()
    case.cut(life)
    life.go_home()
    case.cut(life)


def test_a_page_that_went_home_leaves_the_running_transaction_before_its_revoke_joins(tmp_path: Path) -> None:
    # The same by way of the checkpoint: the record that stayed would hold the tail for ever.
    # Breakage: going.py
    # -         if running.pages.get(index) is page:
    # +         if False:
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 8, pending=True)
    life.flush()
    life.write(8, 8, pending=True)
    life.checkpoint()
    life.flush()
    case.cut(life)
    assert not life.disk.log.records, "a page that is home has a record"
    life.checkpoint()
    assert not life.disk.log.ring.transactions


@pytest.mark.parametrize("discard", [True, False])
def test_an_in_place_write_never_lands_in_a_cluster_that_was_trimmed_and_reused(tmp_path: Path, discard: bool) -> None:
    # One caller writes a cluster in place while another trims it, flushes, and writes elsewhere, where the freed
    # cluster is the next to be used.
    # Breakage: changes.py
    # -         yield from disk.exclude(first, end, held.excluded)
    # -         table = yield from held.own_l2(first)
    # +         table = yield from held.own_l2(first)
    # A ring that is large enough for both: else one would wait for the other's credits.
    case = Case("plain", replace(PAGE, journal=1 << 20), tmp_path, discard=discard)

    def other(life: Life) -> Operation[None]:
        yield from trimming(life, 8, 8)
        yield from life.disk.flush()
        life.exhaust()
        yield from life.disk.allocator.release()
        for number, at in enumerate((24, 32, 40), 80):
            yield from writing(life, at, 8, number)

    for seed in range(120):
        life = case.start()
        life.write(8, 8)
        life.flush()
        stepper = Stepper(Random(seed))
        tasks = stepper.add(writing(life, 8, 8, 79), "in place"), stepper.add(other(life), "trim and reuse")
        finish(stepper, *tasks)
        life.flush()
        life.exhaust()
        life.release()
        life.write(48, 16)
        try:
            life.oracle.check(numbers(life.contents()), life.oracle.now)
            life.flush()
            case.explorer.recover(life.sim)
        except BaseException:
            print(f"seed {seed}: {stepper.history}")
            raise


def test_old_metadata_is_not_written_over_a_reused_cluster_live_or_at_replay(tmp_path: Path) -> None:
    # Sectors of the refcount table are in the journal when it moves; its old cluster is reused for data. Then the
    # power fails, or the checkpoint runs.
    # Breakage: image/allocator.py
    # -             log.running.note_host_revoke(old.host_offset, old.length)
    # +             pass
    case = Case("padded", replace(TABLE, size=128 << 10, journal=1 << 20), tmp_path)
    life = case.start()
    life.write(120, 8)
    at = use_all_below(life)
    old = life.disk.allocator.reftable.host_offset
    assert old in life.disk.log.home
    life.write(at, 8)
    life.flush()
    assert life.disk.allocator.reftable.host_offset != old
    life.exhaust()
    life.release()
    life.write(at + 8, 8)
    life.flush()
    assert old in [host_of(life, sector) for sector in range(at + 8, at + 16)]
    case.cut(life)
    life.checkpoint()
    life.oracle.check(numbers(life.contents()), life.oracle.now)
    case.cut(life)


def test_a_checkpoint_that_commits_first_does_not_write_home_what_that_commit_freed(tmp_path: Path) -> None:
    # A round has no credits, so it commits; that commit frees the old refcount table, whose cluster is given back and
    # reused before the round writes home what it has to.
    # Breakage: checkpoint.py
    # -     passable = ring.passable() if move_tail else 0
    # +     passable = ring.passable() if move_tail else 0
    # +     home = dict(log.home)
    # -     home = dict(log.home) if passable else {}
    # -     held = Prepared(disk, cost)
    # +     held = Prepared(disk, cost)
    shape = replace(TABLE, size=128 << 10, journal=1 << 20)
    case = Case("padded", shape, tmp_path)
    life = case.start()
    life.write(120, 8)
    at = use_all_below(life)
    disk, log = life.disk, life.disk.log
    life.write(0, 16, pending=True)
    life.flush()
    old = disk.allocator.reftable.host_offset
    assert old in log.home and log.ring.passable()
    while disk.allocator.reftable.host_offset == old:
        run(disk.allocator.ensure(disk.allocator.available + 1))
    assert log.running.host_revokes
    # Others have what the round's links want beside the running transaction; beside an empty one there is enough.
    ring = log.ring
    others = ring.max_transaction - BASE_COST - ring.max_transaction // 2 // ring.home_cost * ring.home_cost
    assert log.try_credits(others)
    stepper = Stepper(whole_steps=True)
    task = stepper.add(checkpoint.round_(disk), "checkpoint")
    number = log.running.number
    while log.committed < number:
        stepper.move(task)
    log.return_credits(others)
    life.exhaust()
    life.release()
    life.write(at, 8)
    assert old in [host_of(life, sector) for sector in range(at, at + 8)]
    finish(stepper, task)
    life.oracle.check(numbers(life.contents()), life.oracle.now)
    life.flush()
    case.cut(life)


def test_a_new_table_on_a_reused_cluster_does_not_show_its_old_bytes(tmp_path: Path) -> None:
    # Clusters of 1 KiB: an L2 table has two sectors, of which a change journals one. A table is copied into a
    # cluster that held data.
    # Breakage: image/mapping.py
    # - yield Write(storage, table.host_offset, [table.to_bytes()])
    # + yield Write(storage, table.host_offset, [])
    case = Case("foreign-l2", Shape("cluster_size=1024", 160 << 10), tmp_path, discard=False)
    life = case.start()
    freed = {life.disk.mapping.l2_offset(0), *(host_of(life, sector) for sector in range(0, 16, 2))}
    life.trim(0, 16)
    life.flush()
    life.exhaust()
    life.release()
    life.flush()
    life.write(300, 3)
    life.go_home()
    assert life.disk.mapping.l2_offset(150) in freed
    life.flush()
    case.cut(life)


def test_a_full_ring_drains_whoever_waits_for_it(tmp_path: Path) -> None:
    # The ring is full, and its tail holds a page of the cluster that a direct write wants: the write must not wait for
    # room while it keeps the checkpoint from that cluster.
    # Breakage: changes.py
    # -     yield from disk.log.take_credits(cost)
    # -     held = Prepared(disk, cost)
    # -     try:
    # -         tables =
    # +     held = Prepared(disk, cost)
    # +     try:
    # +         yield from disk.exclude(cluster, cluster + count, held.excluded)
    # +         yield from disk.log.take_credits(cost)
    # +         disk.excluded.difference_update(held.excluded)
    # +         tables =
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    ring = life.disk.log.ring
    at = 0
    while ring.has_room(running=life.disk.log.running.size, cost=ring.home_cost):
        life.write(at % 128, 3)
        life.flush()
        at += 8
    first = min(life.disk.pending.clusters) * 8
    assert life.disk.log.records[first // 8].record is ring.transactions[0]
    life.write(first, 8)
    life.flush()
    case.cut(life)


def test_a_header_that_is_torn_while_it_is_rewritten_keeps_its_backing_name(tmp_path: Path) -> None:
    # qemu's overlays have the backing name beyond the first sector, behind the extensions.
    # Breakage: format/header_rewrite.py
    # -     return HeaderPlan((*before, *first, ((0, plain),), ((0, bytes(sector)),)))
    # +     return HeaderPlan((*before, (*first[0], (0, plain)), ((0, bytes(sector)),)))
    case = Case("overlay", replace(PAGE, backed=True), tmp_path)
    original = parse_header(case.image.peek(0, 4096), file_size=1 << 20, name="image")
    assert original.backing_name == images.BACKING_NAME.encode()
    assert original.backing_offset + len(original.backing_name) > SECTOR
    sim = case.image.copy()
    states = 0

    def watch(_: bool) -> None:
        nonlocal states
        for state in sim.crash_states(600, Random(0)):
            header = parse_header(state.peek(0, 4096), file_size=1 << 20, name="image")
            assert (header.backing_name, header.backing_format) == (original.backing_name, "raw")
            states += 1

    life = Life(sim, case.shape, Oracle(list(case.initial)))
    sim.watch = watch
    life.open()
    life.close()
    assert states > 50


def test_a_lost_end_of_the_log_is_not_taken_for_an_empty_log(tmp_path: Path) -> None:
    # The tail has moved, so its slot knows of later transactions; the ring, or the first block after the tail, is lost.
    # Breakage: journal/replay.py
    # -     if sequence - 1 < slot.last_committed:
    # +     if False:
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    for at in (0, 8, 16):
        life.write(at, 3)
        life.flush()
    life.checkpoint(clusters=1)
    life.flush()
    life.checkpoint(clusters=1)
    ring = life.disk.log.ring
    assert ring.tail and len(ring.transactions) > 1
    offset = ring.location.ring_offset
    for start, length in ((offset, ring.length), (offset + ring.tail, SECTOR)):
        lost = life.sim.copy()
        storage = SimStorage(lost)
        storage.write(start, [bytes(length)])
        storage.sync()
        with pytest.raises(ImageError, match="lost committed transactions"):
            Life(lost, case.shape, Oracle([])).open()
    case.cut(life)


def test_half_of_an_old_torn_transaction_never_completes_a_new_one(tmp_path: Path) -> None:
    # Two commits of the same sequence number, size and place: the first is torn by a cut, then another is written over
    # what is left of it and torn as well.
    # Breakage: journal/replay.py
    # -         if len(data) != head.length or not crc_holds(head, data):
    # +         if len(data) != head.length:
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 8, pending=True)
    life.flush()
    before, *_ = life.sim.crash_states(2, Random(0))
    contents = numbers(life.contents())
    halves: list[dict[int, bytes]] = []
    for number in (90, 91):
        sim = before.copy()
        again = Life(sim, case.shape, Oracle(list(contents)))
        again.open()
        again.number = number
        again.write(8, 8, pending=True)
        sim.cut_during(sim.operations + 1)
        with pytest.raises(PowerCut):
            again.flush()
        halves.append(dict(sim.log[-1].sectors))
    old, new = halves
    assert old.keys() == new.keys()
    sectors = sorted(new)
    mixtures = [new.keys() - {sector} for sector in sectors] + [set(sectors[:at]) for at in range(1, len(sectors))]
    seen = 0
    for kept in mixtures:
        mixed = {sector: new[sector] if sector in kept else old[sector] for sector in sectors}
        if mixed in (old, new):
            continue
        sim = before.copy()
        sim.put(mixed.items())
        assert numbers(case.explorer.recover(sim)) == contents
        seen += 1
    assert seen > len(sectors)


def test_a_torn_new_transaction_never_completes_an_old_torn_one(tmp_path: Path) -> None:
    # A commit is torn: of two pages the second is missing. After recovery the next commit, at its place, has another
    # first page and the same second one, and is torn as well: only the second page reaches the disk.
    # Breakage: opening.py
    # -             yield WriteSync(file, ring.place(ring.head, ALIGNMENT)[0][0], [bytes(ALIGNMENT)])
    # +             pass
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(40, 8, pending=True)
    life.flush()
    sim, *_ = life.sim.crash_states(2, Random(0))
    contents = numbers(life.contents())
    same = fill(91)
    for first, second_arrives in ((90, False), (92, True)):
        again = Life(sim, case.shape, Oracle(list(contents)))
        again.open()
        assert numbers(again.contents()) == contents
        again.number = first - 1
        again.write(8, 8, pending=True)
        again.number = 90
        again.write(16, 8, pending=True)
        sim.cut_during(sim.operations + 1)
        with pytest.raises(PowerCut):
            again.flush()
        written = sim.log[-1].sectors
        # All other open effects are lengths; none of them is kept.
        torn = {sector: data for sector, data in written.items() if (data == same) == second_arrives}
        assert torn and len(torn) < len(written)
        sim = sim.like(sim.durable_size, {**sim.durable, **torn}, None)
    assert numbers(case.explorer.recover(sim)) == contents


def test_a_failed_sync_is_not_forgotten_by_the_next_flush(tmp_path: Path) -> None:
    # The kernel tells of a lost write once; the second sync would succeed and mean nothing.
    # Breakage: journal/log.py
    # -             raise self.latch(error, f"commit of transaction {transaction.number}") from error
    # +             raise DeviceFailed("commit") from error
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 8)
    life.sim.fail("sync")
    for _ in range(2):
        with pytest.raises(DeviceFailed):
            life.flush()
    with pytest.raises(DeviceFailed):
        life.write(16, 8)
    case.cut(life)


def test_a_failed_sync_of_the_checkpoint_fails_the_flushes_of_clients(tmp_path: Path) -> None:
    # Another thread was told, through a description of its own.
    # Breakage: checkpoint.py
    # -         raise log.latch(error, "checkpoint") from error
    # +         return False
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 3)
    life.flush()
    life.sim.fail("sync")
    with pytest.raises(DeviceFailed):
        life.checkpoint()
    with pytest.raises(DeviceFailed):
        life.write(16, 3)
        life.flush()
    case.cut(life)


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_failed_sync_of_the_start_is_not_forgotten_by_the_next_start(tmp_path: Path, nth: int) -> None:
    # The nth sync of an attach fails, and the server ends. The next one finds everything in the page cache, where it
    # is clean: what says "attached" may never have reached the disk, and no sync will bring it there.
    # Breakage: opening.py
    # -         yield WriteSync(file, 0, [first_sector])
    # +         pass
    case = Case("plain", PAGE, tmp_path)
    life = Life(case.image.copy(), case.shape, Oracle(list(case.initial)))
    life.sim.fail("sync", nth)
    try:
        life.open()
        failed = False
    except OSError:
        failed = True
    assert failed
    life.reborn()
    life.write(8, 3)
    life.flush()
    case.cut(life)


def test_a_failed_write_of_the_tail_is_not_forgotten_by_the_next_start(tmp_path: Path) -> None:
    # The write that moves the tail past a full ring fails, and the server ends. The next one finds the new slot in the
    # page cache; were that enough, it would write new transactions where the slot on the disk has its tail.
    # Breakage: opening.py
    # -         yield WriteSync(file, slot_offset, [plan.slot.to_block()])
    # +         pass
    case = Case("plain", replace(PAGE, journal=1 << 20), tmp_path)
    life = case.start()
    ring = life.disk.log.ring
    at = 0
    while ring.has_room(running=life.disk.log.running.size, cost=4 * ring.home_cost):
        life.write(at % 128, 3)
        life.commit()
        at += 8
    assert ring.passable() > len(ring.transactions) // 2
    life.sim.fail("write_sync")
    with pytest.raises(DeviceFailed):
        life.checkpoint()
    life.reborn()
    ring = life.disk.log.ring
    assert ring.used < ring.length // 2
    while ring.used + ring.reserve + 4 * ring.home_cost < ring.length:
        life.write(at % 128, 3)
        life.flush()
        at += 8
    case.cut(life)


def test_a_failed_write_of_a_commit_is_not_forgotten_by_the_next_start(tmp_path: Path) -> None:
    # The write of a transaction fails, and the server ends. The next one finds the transaction whole in the page cache
    # and goes on behind it: without it on the disk, what is flushed then could not be reached.
    # The kernel need not drop what it is asked to drop.
    # Breakage: opening.py
    # -         yield WriteSync(file, offset, [plan.log[at : at + length]])
    # +         pass
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.sim.keeps_cache = True
    life.write(8, 3)
    life.flush()
    life.write(8, 3)
    life.sim.fail("write_sync")
    with pytest.raises(DeviceFailed):
        life.flush()
    case.cut(life)
    life.reborn()
    assert len(life.disk.log.ring.transactions) == 2
    life.write(24, 3)
    life.flush()
    case.cut(life)


def test_a_freed_cluster_is_not_punched_before_its_freeing_is_committed(tmp_path: Path) -> None:
    # Compressed clusters are overwritten: what the journal and the disk still name is freed.
    # Breakage: image/allocator.py
    # -         self.log.running.freed.append(cluster)
    # +         self.log.epochs.releasable.append(cluster)
    case = Case("compressed", replace(PAGE, journal=1 << 20), tmp_path)
    life = case.start()
    life.write(0, 128)
    assert life.disk.allocator.freed and not life.disk.log.committed
    life.release()
    case.cut(life)
    life.flush()
    life.release()
    assert any(each.kind == "punch" for each in life.sim.history)
    case.cut(life)


def test_a_freed_cluster_is_not_punched_or_reused_under_a_reader(tmp_path: Path) -> None:
    # A reader knows where the cluster lies when it is trimmed, the trim committed, and the next write wants room.
    # Breakage: image/epochs.py
    # -         while self.retired and not self.retired[0].active:
    # +         while self.retired:
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.be_tight()
    number = life.write(8, 8)
    life.flush()
    life.go_home()
    stepper = Stepper(whole_steps=True)
    data = bytearray(8 * SECTOR)
    reader = stepper.add(life.disk.read_into(memoryview(data), 8 * SECTOR), "reader")
    stepper.move(reader)
    assert not reader.done
    life.trim(8, 8)
    life.flush()
    life.release()
    for at in range(16, 128, 8):
        life.write(at, 8)
    finish(stepper, reader)
    assert number_of(bytes(data[:SECTOR])) == number, "the reader began before the trim ended, and read another's data"
    life.flush()
    case.cut(life)


def test_a_flush_does_not_pay_for_the_data_of_the_checkpoint(tmp_path: Path) -> None:
    # The checkpoint's links are in the transaction that a flush commits, its data was synced by the checkpoint itself.
    # Breakage: checkpoint.py
    # -             log.synced_mark = max(log.synced_mark, mark)
    # +             pass
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 11, pending=True)
    life.flush()
    life.checkpoint()
    assert life.disk.log.running.sectors, "nothing was linked"
    life.write(40, 3)
    done = len(life.sim.history)
    life.flush()
    assert [each.kind for each in life.sim.history[done:]] == ["write_sync"]
    case.cut(life)


def test_a_freed_cluster_is_not_reused_before_its_freeing_is_committed(tmp_path: Path) -> None:
    # The only free cluster is the one that was trimmed: the next write would take it.
    # Breakage: image/allocator.py
    # -         self.log.running.freed.append(cluster)
    # +         self.found.append(cluster)
    case = Case("plain", PAGE, tmp_path)
    life = case.start()
    life.write(8, 8)
    life.flush()
    life.go_home()
    old, committed = host_of(life, 8), life.disk.log.committed
    life.exhaust()
    life.trim(8, 8)
    life.write(24, 8)
    assert life.disk.log.committed == committed
    assert host_of(life, 24) != old
    case.cut(life)
    life.flush()
    life.exhaust()
    life.release()
    life.write(32, 8)
    assert host_of(life, 32) == old
    case.cut(life)
