"""What an opening for writing makes durable, and which transactions are replayed. One rule, one test.

Each is a rule of the engine that a mutation (mutations.py) breaks, or that was found broken.
"""

from __future__ import annotations

from random import Random

import pytest
from engine import Engine, Oracle, Shape, initial_contents
from invariants import recover
from simdisk import SimStorage
from stage import BACKED, PAGES, SMALL, Stage, cut, image, killed
from stepper import Stepper

from nbd_qcow2j import changes
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import DeviceFailed, ImageError
from nbd_qcow2j.format.journal import encode_transaction
from nbd_qcow2j.steps import run_simply

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
