"""The simulated disk keeps its rules: without that, no crash test means anything."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random

import pytest
from simcache import SECTOR, ZERO
from simcrash import GARBAGE, coverage
from simdisk import PowerCut, SimDisk, SimStorage

from nbd_qcow2j.storage import Storage

SIZE = 8 * SECTOR


def sector(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (SECTOR * count)


def disk_of(letters: str) -> SimDisk:
    """One durable sector for each letter; a dot is zeros."""
    return SimDisk.of([(0, b"".join(ZERO if letter == "." else sector(letter) for letter in letters))])


def letters(disk: SimDisk, length: int | None = None) -> str:
    """The inverse of `disk_of`; '#' is garbage, '?' a sector that is torn inside."""
    data = disk.peek(0, disk.current_size if length is None else length)
    found = ""
    for at in range(0, len(data), SECTOR):
        piece = data[at : at + SECTOR]
        if piece == GARBAGE[: len(piece)]:
            found += "#"
        else:
            found += (chr(piece[0]) if piece[0] else ".") if len(set(piece)) == 1 else "?"
    return found


def states(disk: SimDisk, limit: int = 100_000, seed: int = 0) -> list[str]:
    return [letters(state) for state in disk.crash_states(limit, Random(seed))]


def test_it_is_a_storage() -> None:
    storage: Storage = SimStorage(SimDisk())
    assert storage.can_punch


def test_a_reader_sees_what_was_done_last_like_a_byte_array() -> None:
    rng = Random(1)
    disk = SimDisk()
    first, second = SimStorage(disk), SimStorage(disk)
    model = bytearray()

    def grow(offset: int, length: int) -> None:
        if length:
            model.extend(bytes(max(0, offset + length - len(model))))

    for _ in range(3000):
        storage = rng.choice((first, second))
        offset, length = rng.randrange(6000), rng.randrange(2000)
        kind = rng.choice(("write", "write_sync", "punch", "zero_range", "truncate", "allocate", "sync"))
        if kind in ("write", "write_sync"):
            data = rng.randbytes(length)
            getattr(storage, kind)(offset, [data[:7], memoryview(data)[7:]])
            grow(offset, length)
            if data:
                model[offset : offset + length] = data
        elif kind == "punch":
            storage.punch(offset, length)
            end = min(offset + length, len(model))
            model[offset:end] = bytes(max(0, end - offset))
        elif kind == "zero_range":
            storage.zero_range(offset, length)
            grow(offset, length)
            if length:
                model[offset : offset + length] = bytes(length)
        elif kind == "truncate":
            storage.truncate(offset)
            del model[offset:]
            grow(0, offset)
        elif kind == "allocate":
            storage.allocate(offset, length)
            grow(offset, length)
        else:
            storage.sync()
        assert storage.size() == len(model)
        buffer = bytearray(b"\xee" * 9000)
        storage.read_into(buffer, 3)
        assert buffer == model[3:9003].ljust(9000, b"\0")


def test_what_was_not_synced_is_kept_or_dropped_sector_by_sector() -> None:
    disk = disk_of("abcd")
    SimStorage(disk).write(0, [sector("X", 2)])
    assert letters(disk) == "XXcd"
    assert states(disk) == ["abcd", "XXcd", "aXcd", "Xbcd"]


def test_every_version_since_the_last_sync_may_be_the_one_that_reached_the_disk() -> None:
    disk = disk_of("a")
    for letter in "bcd":
        SimStorage(disk).write(0, [sector(letter)])
    assert sorted(states(disk)) == ["a", "b", "c", "d"]
    SimStorage(disk).sync()
    assert states(disk) == ["d"]


def test_a_synchronous_write_makes_only_itself_durable() -> None:
    disk = disk_of("abcd")
    storage = SimStorage(disk)
    storage.write(0, [sector("X", 4)])
    storage.write_sync(SECTOR, [sector("Y", 2)])
    assert sorted(states(disk)) == ["XYYX", "XYYd", "aYYX", "aYYd"]
    storage.write(SECTOR, [sector("Z")])
    assert {state[1] for state in states(disk)} == {"Y", "Z"}


def test_a_sync_by_any_description_covers_what_every_description_wrote() -> None:
    disk = disk_of("ab")
    SimStorage(disk).write(0, [sector("X")])
    SimStorage(disk).sync()
    assert states(disk) == ["Xb"]
    assert disk.log == []


@pytest.mark.parametrize("kind", ["punch", "zero_range"])
def test_punched_space_holds_the_old_content_or_zeros_until_it_is_durable(kind: str) -> None:
    disk = disk_of("abcd")
    storage = SimStorage(disk)
    getattr(storage, kind)(SECTOR, 2 * SECTOR)
    assert letters(disk) == "a..d"
    assert sorted(states(disk)) == ["a..d", "a.cd", "ab.d", "abcd"]
    storage.sync()
    assert states(disk) == ["a..d"]
    # A reused cluster reads what it held.
    storage.write(SECTOR, [sector("X")])
    assert sorted(states(disk)) == ["a..d", "aX.d"]


def test_growth_is_open_until_synced_and_comes_with_the_data_that_needs_it() -> None:
    disk = disk_of("a")
    storage = SimStorage(disk)
    storage.allocate(SECTOR, 3 * SECTOR)
    assert sorted(states(disk)) == ["a", "a..."]
    storage.write_sync(2 * SECTOR, [sector("X")])
    assert sorted(states(disk)) == ["a.X", "a.X."]
    storage.write(4 * SECTOR, [sector("Y")])
    # Y is there with the length that it needs, or the length without Y, or neither.
    assert sorted(states(disk)) == ["a.X", "a.X.", "a.X..", "a.X.Y"]
    storage.sync()
    assert states(disk) == ["a.X.Y"]


def test_space_beyond_the_old_end_may_be_stale_until_the_length_is_durable() -> None:
    disk = disk_of("a")
    disk.stale_growth = True
    storage = SimStorage(disk)
    storage.allocate(SECTOR, 2 * SECTOR)
    storage.write(2 * SECTOR, [sector("X")])
    assert letters(disk) == "a.X"
    # The written sector may be there or not; what was not written is zeros or garbage as long as the length is open.
    assert sorted(states(disk)) == ["a", "a##", "a#X", "a..", "a.X"]
    storage.sync()
    assert states(disk) == ["a.X"]
    # A synchronous write makes the length durable that is needed to read it, and zeros below it.
    storage.allocate(3 * SECTOR, 3 * SECTOR)
    storage.write_sync(4 * SECTOR, [sector("Y")])
    assert sorted(states(disk)) == ["a.X.Y", "a.X.Y#", "a.X.Y."]


def test_a_watcher_sees_every_moment_at_which_the_power_may_be_cut() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk)
    seen: list[tuple[bool, list[str]]] = []
    disk.watch = lambda during: seen.append((during, sorted(states(disk))))
    storage.write_sync(0, [sector("X")])
    storage.write(SECTOR, [sector("Y")])
    assert seen == [(True, ["Xb", "ab"]), (False, ["Xb"]), (True, ["XY", "Xb"]), (False, ["XY", "Xb"])]


def test_a_truncation_that_is_not_durable_may_not_have_happened_and_zeros_what_it_cut() -> None:
    disk = disk_of("abc")
    storage = SimStorage(disk)
    storage.truncate(SECTOR)
    assert set(states(disk)) >= {"abc", "a"}
    storage.truncate(3 * SECTOR)
    assert letters(disk) == "a.."
    assert {"a", "a..", "abc"} <= set(states(disk))
    assert set(states(disk)) <= {"a", "a..", "a.c", "ab.", "abc"}
    storage.write_sync(2 * SECTOR, [sector("X")])
    # The length never falls back below what was made durable.
    assert {len(state) for state in states(disk)} == {3}
    assert {state[2] for state in states(disk)} == {"X"}
    storage.sync()
    assert states(disk) == ["a.X"]


def test_a_kept_truncation_cuts_inside_a_sector() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk)
    storage.truncate(SECTOR + 100)
    cut = {state.durable_size: state.peek(SECTOR, SECTOR) for state in disk.crash_states(100, Random(0))}
    assert cut[SECTOR + 100] == b"b" * 100 + bytes(SECTOR - 100)
    for state in disk.crash_states(100, Random(0)):
        SimStorage(state).truncate(2 * SECTOR)
        assert state.peek(SECTOR, SECTOR) in (sector("b"), b"b" * 100 + bytes(SECTOR - 100))


def test_random_histories_leave_exactly_the_states_that_the_rule_allows() -> None:
    # An independent and simple account of the rule: for each sector the set of contents that a cut may
    # leave. A fixed length, so that lengths do not matter.
    rng = Random(20130905)
    for _ in range(150):
        disk = disk_of("abcdef")
        storages = [SimStorage(disk), SimStorage(disk)]
        allowed = [[letter] for letter in "abcdef"]
        for step in range(rng.randrange(1, 9)):
            storage = rng.choice(storages)
            at = rng.randrange(6)
            count = rng.randint(1, min(3, 6 - at))
            kind = rng.choice(("write", "write", "write", "write_sync", "punch", "sync"))
            if kind == "sync":
                storage.sync()
                allowed = [versions[-1:] for versions in allowed]
                continue
            letter = "." if kind == "punch" else "ABCDEFGHI"[step]
            if kind == "punch":
                storage.punch(at * SECTOR, count * SECTOR)
            else:
                getattr(storage, kind)(at * SECTOR, [sector(letter, count)])
            for index in range(at, at + count):
                allowed[index] = [letter] if kind == "write_sync" else [*allowed[index], letter]
        expected = {"".join(choice) for choice in product(*allowed)}
        found = states(disk)
        assert len(found) == len(set(found))
        assert set(found) == expected
        # The same disk, sampled: nothing but what is allowed, none and all first.
        sampled = states(disk, limit=max(2, len(expected) // 3))
        assert set(sampled) <= expected
        assert sampled[0] == "".join(versions[0] for versions in allowed)
        if len(expected) > 1:
            assert letters(disk) in sampled


def test_a_few_writes_of_many_sectors_are_enumerated_whole_and_then_torn() -> None:
    disk = SimDisk(64 * SECTOR)
    storage = SimStorage(disk)
    for index, letter in enumerate("ABCDE"):
        storage.write(index * 8 * SECTOR, [sector(letter, 8)])
    assert coverage(disk, 100) == ("writes", 5)
    found = states(disk, limit=100)
    assert len(found) == len(set(found)) == 100
    whole = {"".join(c * 8 for c in choice).ljust(64, ".") for choice in product(*((".", c) for c in "ABCDE"))}
    assert set(found[:32]) == whole
    assert not set(found[32:]) & whole


def test_many_writes_are_sampled_with_the_telling_states_first_and_replay_from_the_seed() -> None:
    disk = SimDisk(64 * SECTOR)
    storage = SimStorage(disk)
    for index in range(20):
        storage.write(index * SECTOR, [sector(chr(65 + index))])
    everything = letters(disk)
    assert coverage(disk, 500) == ("sampled", 20)
    found = states(disk, limit=500, seed=7)
    assert len(set(found)) == len(found) == 500
    assert found[0] == "." * 64
    assert found[1] == everything
    for index in range(20):
        alone = "." * index + everything[index]
        assert alone.ljust(64, ".") in found
        assert everything[:index] + "." + everything[index + 1 :] in found
    assert states(disk, limit=500, seed=7) == found
    assert states(disk, limit=500, seed=8) != found


def test_states_are_told_apart_by_content_and_counted_once() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk)
    storage.write(0, [sector("X")])
    storage.write(0, [sector("a")])
    storage.write(SECTOR, [sector("b")])
    assert states(disk) == ["ab", "Xb"]
    found = list(disk.crash_states(10, Random(0)))
    for state in found:
        assert state.digest() == disk_of(letters(state)).digest()
        assert state.digest() != disk.digest()
    assert disk_of("ab").digest() != disk_of("ba").digest()
    assert disk_of("a.").digest() != disk_of("a").digest()


def test_the_digest_follows_every_change_of_the_durable_content() -> None:
    rng = Random(3)
    disk = disk_of("abcdefgh")
    storage = SimStorage(disk)
    assert disk.digest()
    for _ in range(300):
        at = rng.randrange(8) * SECTOR
        rng.choice(
            (
                lambda at=at: storage.write_sync(at, [sector(rng.choice("abc"))]),
                lambda at=at: storage.punch(at, SECTOR),
                storage.sync,
            )
        )()
        fresh = SimDisk(disk.durable_size)
        fresh.durable = dict(disk.durable)
        fresh._digest = None
        assert disk.content_digest() == fresh.content_digest()


def test_crash_states_do_not_share_what_changes() -> None:
    disk = disk_of("abcd")
    SimStorage(disk).write(0, [sector("X", 4)])
    first, second, *_ = disk.crash_states(100, Random(0))
    SimStorage(first).write_sync(0, [sector("1")])
    SimStorage(second).write_sync(SECTOR, [sector("2")])
    SimStorage(disk).sync()
    assert (letters(first), letters(second), letters(disk)) == ("1bcd", "X2XX", "XXXX")


def test_a_cut_comes_after_or_during_the_operation_asked_for() -> None:
    expected = {
        (1, True): {"ab", "Xb"},
        (1, False): {"ab", "Xb"},
        (2, True): {"ab", "Xb", "aY", "XY"},
        (2, False): {"aY", "XY"},
        (3, True): {"aY", "XY"},
        (3, False): {"XY"},
    }
    for (number, during), outcome in expected.items():
        disk = disk_of("ab")
        storage = SimStorage(disk)
        (disk.cut_during if during else disk.cut_after)(number)
        with pytest.raises(PowerCut):
            storage.write(0, [sector("X")])
            storage.read_into(bytearray(10), 0)
            storage.write_sync(SECTOR, [sector("Y")])
            storage.sync()
        assert disk.operations == number
        assert [performed.kind for performed in disk.history] == ["write", "write_sync", "sync"][:number]
        assert set(states(disk)) == outcome
        # Whoever goes on after the cut meets it again.
        with pytest.raises(PowerCut):
            storage.sync()
        with pytest.raises(PowerCut):
            storage.read_into(bytearray(1), 0)


def test_a_killed_server_leaves_its_page_cache_and_a_power_cut_may_still_take_it() -> None:
    disk = disk_of("ab")
    old = SimStorage(disk)
    old.write(0, [sector("X")])
    disk.kill()
    with pytest.raises(PowerCut):
        old.sync()
    new = SimStorage(disk)
    assert letters(disk) == "Xb"
    assert set(states(disk)) == {"ab", "Xb"}
    new.sync()
    assert states(disk) == ["Xb"]


def test_a_write_in_flight_is_not_covered_by_a_sync_that_began_before_it_ended() -> None:
    disk = disk_of("abc")
    writer, syncer = SimStorage(disk), SimStorage(disk)
    writer.write(2 * SECTOR, [sector("Z")])
    write = writer.begin_write(0, [sector("X")])
    sync = syncer.begin_sync()
    writer.finish_write(write)
    syncer.finish_sync(sync)
    assert set(states(disk)) == {"abZ", "XbZ"}
    syncer.sync()
    assert states(disk) == ["XbZ"]


def test_a_synchronous_write_in_flight_is_open_and_a_kill_may_tear_it() -> None:
    disk = disk_of("abcd")
    SimStorage(disk).begin_write(0, [sector("X", 4)], kind="write_sync")
    assert len(states(disk)) == 16
    seen = set()
    for seed in range(60):
        copy = disk.copy()
        copy.kill(Random(seed))
        seen.add(letters(copy))
        SimStorage(copy).sync()
        assert states(copy) == [letters(copy)]
    assert seen == {"abcd", "Xbcd", "XXcd", "XXXd", "XXXX"}
    disk.kill()
    assert letters(disk) == "XXXX"


def error_of(call: Callable[[], object]) -> int:
    """The errno that the call fails with, 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_failed_sync_marks_pages_clean_and_the_next_one_lies() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk)
    storage.write(0, [sector("X")])
    disk.fail("sync")
    assert error_of(storage.sync) == errno.EIO
    assert error_of(storage.sync) == 0
    assert letters(disk) == "Xb"
    assert set(states(disk)) == {"ab", "Xb"}
    # Only to write it again makes it durable.
    storage.write(0, [sector("X")])
    storage.sync()
    assert states(disk) == ["Xb"]


def test_an_error_is_reported_once_by_each_description_and_to_no_later_one() -> None:
    disk = disk_of("ab")
    commit, checkpoint = SimStorage(disk), SimStorage(disk)
    disk.fail("sync", error=errno.ENOSPC)
    assert [error_of(commit.sync) for _ in range(2)] == [errno.ENOSPC, 0]
    assert [error_of(lambda: checkpoint.write_sync(0, [sector("X")])) for _ in range(2)] == [errno.ENOSPC, 0]
    disk.kill()
    assert error_of(SimStorage(disk).sync) == 0
    # One that nobody was told of waits for the next process.
    SimStorage(disk).write(0, [sector("Y")])
    disk.fail_writeback()
    disk.kill()
    next_one, another = SimStorage(disk), SimStorage(disk)
    assert [error_of(next_one.sync), error_of(next_one.sync)] == [errno.EIO, 0]
    assert error_of(another.sync) == errno.EIO
    assert error_of(SimStorage(disk).sync) == 0
    assert set(states(disk)) == {"Xb", "Yb"}


def test_a_write_back_that_failed_before_the_sync_is_not_settled_by_it() -> None:
    disk = disk_of("abc")
    storage = SimStorage(disk)
    storage.write(0, [sector("X", 2)])
    disk.fail_writeback()
    storage.write(2 * SECTOR, [sector("Y")])
    storage.write(SECTOR, [sector("Z")])
    assert error_of(storage.sync) == errno.EIO
    assert set(states(disk)) == {"aZY", "XZY"}


def test_dropping_the_caches_shows_what_the_failed_write_back_lost() -> None:
    seen = set()
    for seed in range(20):
        disk = disk_of("ab")
        storage = SimStorage(disk)
        storage.write(0, [sector("X", 2)])
        disk.fail("sync")
        assert error_of(storage.sync) == errno.EIO
        disk.drop_caches(Random(seed))
        assert states(disk) == [letters(disk)]
        seen.add(letters(disk))
    assert seen == {"ab", "aX", "Xb", "XX"}


def calls_of(storage: SimStorage) -> dict[str, Callable[[], object]]:
    """One call of each kind that can fail, and that changes `disk_of("abcd")` if it can."""
    return {
        "read": lambda: storage.read_into(bytearray(9), 0),
        "write": lambda: storage.write(0, [sector("X")]),
        "write_sync": lambda: storage.write_sync(0, [sector("X")]),
        "sync": storage.sync,
        "allocate": lambda: storage.allocate(0, 99 * SECTOR),
        "punch": lambda: storage.punch(0, SECTOR),
        "zero_range": lambda: storage.zero_range(0, SECTOR),
        "truncate": lambda: storage.truncate(0),
    }


@pytest.mark.parametrize("kind", [*calls_of(SimStorage(SimDisk())), "any"])
def test_every_kind_of_call_fails_at_the_nth_and_so_many_times(kind: str) -> None:
    disk = disk_of("abcd")
    calls = calls_of(SimStorage(disk))
    call = calls.get(kind, calls["punch"])
    disk.fail(kind, 2, errno.ENOSPC, times=2)
    assert [error_of(call) for _ in range(4)] == [0, errno.ENOSPC, errno.ENOSPC, 0]


@pytest.mark.parametrize("kind", [*calls_of(SimStorage(SimDisk())), "any"])
def test_a_failing_call_changes_nothing_and_others_of_another_kind_go_on(kind: str) -> None:
    disk = disk_of("abcd")
    disk.fail(kind, error=errno.ENOSPC, times=0)
    for name, call in calls_of(SimStorage(disk)).items():
        if kind in (name, "any"):
            assert [error_of(call) for _ in range(3)] == [errno.ENOSPC] * 3
            assert states(disk) == ["abcd"]
    if kind != "any":
        for name, call in calls_of(SimStorage(disk)).items():
            assert error_of(call) == (errno.ENOSPC if name == kind else 0)
    disk.mend()
    assert [error_of(call) for call in calls_of(SimStorage(disk)).values()] == [0] * 8


def test_a_write_may_fail_half_way_and_a_failed_synchronous_one_may_be_there_or_not() -> None:
    disk = disk_of("abc")
    storage = SimStorage(disk)
    disk.fail("write", error=errno.ENOSPC, landed=SECTOR)
    assert error_of(lambda: storage.write(0, [sector("X", 3)])) == errno.ENOSPC
    assert letters(disk) == "Xbc"
    storage.sync()
    disk.fail("write_sync")
    assert error_of(lambda: storage.write_sync(SECTOR, [sector("Y")])) == errno.EIO
    assert error_of(storage.sync) == 0
    assert set(states(disk)) == {"Xbc", "XYc"}


def test_a_torn_block_of_4_kib_spoils_what_was_in_flight_or_also_its_neighbours() -> None:
    def disk(**how: bool) -> SimDisk:
        small = SimDisk.of([(0, sector("a", 16))])
        made = small.like(small.durable_size, dict(small.durable), None)
        made.physical_sector = 4096
        made.tear_neighbours = how.get("neighbours", False)
        SimStorage(made).write(9 * SECTOR, [sector("X")])
        return made

    assert sorted(state[9] for state in states(disk())) == ["#", "X", "a"]
    assert all(state.replace("#", "a").replace("X", "a") == "a" * 16 for state in states(disk()))
    spoilt = states(disk(neighbours=True), limit=3 * 2**7 + 1)
    assert len(spoilt) == 3 * 2**7
    assert {state[:8] for state in spoilt} == {"a" * 8}
    assert {state[8] for state in spoilt} == {"a", "#"}


def test_a_stall_or_any_other_thing_is_hooked_before_the_call() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk)
    seen: list[tuple[str, int, int]] = []
    disk.hook = lambda *call: seen.append(call)
    storage.write(5, [b"abc", b"d"])
    storage.read_into(bytearray(3), 1)
    storage.start_writeback(0, 100)
    storage.advise_needed(1, 2)
    storage.sync()
    assert seen == [
        ("write", 5, 4), ("read", 1, 3), ("start_writeback", 0, 100), ("advise_needed", 1, 2), ("sync", 0, 0)
    ]  # fmt: skip


def test_read_only_and_closed_storages_refuse() -> None:
    disk = disk_of("ab")
    storage = SimStorage(disk, read_only=True)
    assert error_of(lambda: storage.write(0, [b"x"])) == errno.EBADF
    assert error_of(lambda: storage.reopen().punch(0, 1)) == errno.EBADF
    assert error_of(lambda: storage.read_into(bytearray(1), 0)) == 0
    storage.close()
    assert error_of(lambda: storage.read_into(bytearray(1), 0)) == errno.EBADF


def test_a_qemu_image_survives_the_way_in_and_out(tmp_path: Path) -> None:
    # qemu-img is the referee: what went through the simulated disk is the image that went in.
    image, again = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "10M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", "-c", "write -P 9 9M 5k", image], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    disk = SimDisk.from_file(image)
    disk.to_file(again)
    assert again.read_bytes() == image.read_bytes()
    assert again.stat().st_blocks <= image.stat().st_blocks + 64
    # What is not durable is in the file too: it shows what a reader sees.
    SimStorage(disk).write(image.stat().st_size + 100, [b"tail"])
    disk.to_file(again)
    assert again.read_bytes() == image.read_bytes() + bytes(100) + b"tail"
    check = subprocess.run(["qemu-img", "check", "--output=json", again], capture_output=True, text=True, check=False)
    assert json.loads(check.stdout)["check-errors"] == 0
    assert SimDisk.from_file(image).digest() == SimDisk.of([(0, image.read_bytes())]).digest()
