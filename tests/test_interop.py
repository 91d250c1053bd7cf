"""What other programs make of a served disk: qemu-io, qemu-img, nbdinfo, nbdcopy, fio, and libnbd on four connections.

The oracle is a raw file that got the same requests, or a bytearray; and, once the image is closed, qemu itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Server, is_attached, run

nbd = pytest.importorskip("nbd", reason="libnbd's Python binding: deploy/setup --test makes it visible")

CLUSTER = 1 << 16
MIB = 1 << 20
DATA, ZERO, HOLE = "data", "zero", "hole,zero"


def write_noise(path: Path, size: int, seed: int) -> Path:
    """A raw file of noise with holes of 64 KiB to 1 MiB in it."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        at = 0
        while at < size:
            length = min(size - at, rng.choice((1, 3, 16)) * CLUSTER)
            if rng.random() < 0.5:
                file.seek(at)
                file.write(rng.randbytes(length))
            at += length
        file.truncate(size)
    return path


def assert_closed_well(image: Path) -> None:
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


def same(one: object, other: object, *, one_format: str = "raw", other_format: str = "raw") -> None:
    run("qemu-img", "compare", "-q", "-f", one_format, "-F", other_format, one, other)


# ---- qemu-io ----------------------------------------------------------------------------------------

QEMU_IO_IMAGES: dict[str, dict[str, object]] = {
    "64K": {},
    "4K, 1-bit refcounts": {"cluster_size": 4096, "refcount_bits": 1},
    "2M": {"cluster_size": "2M"},
    "subclusters": {"extended_l2": "on"},
    "over a backing file": {"backing_file": "base", "backing_fmt": "raw"},
}


def qemu_io_commands(rng: random.Random, size: int, count: int) -> list[str]:
    """Requests at odd places, each followed now and then by a read that knows what it must find."""
    commands = []
    for _ in range(count):
        unit = rng.choice((1, 512, 4096, CLUSTER))
        # qemu-io takes patterns of one byte, so a request is told from its neighbours by that.
        pattern = rng.randrange(1, 256)
        offset = rng.randrange(size) // unit * unit
        length = max(1, min(size - offset, rng.choice((1, 2, 5, 40)) * unit))
        kind = rng.choices(("write", "write -f", "write -z", "write -z -u", "write -z -u -f", "discard", "flush"),
                           (8, 2, 2, 2, 1, 2, 2))[0]  # fmt: skip
        if kind == "flush":
            commands.append("flush")
            continue
        if kind == "discard":
            # What is smaller than a page may keep its content: a raw file and an image need not agree on it.
            offset -= offset % 4096
            length = max(4096, length - length % 4096)
            length = min(length, size - offset)
        if kind in ("write", "write -f"):
            kind += f" -P {pattern}"
        else:
            pattern = 0
        commands.append(f"{kind} {offset} {length}")
        if rng.random() < 0.3:
            commands.append(f"read -P {pattern} {offset} {length}")
    return commands


def qemu_io(target: object, commands: list[str]) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", "-d", "unmap", *words, target)
    assert "Pattern verification failed" not in done.stdout, done.stdout


@pytest.mark.parametrize("options", QEMU_IO_IMAGES.values(), ids=QEMU_IO_IMAGES)
def test_qemu_io_does_to_us_what_it_does_to_a_raw_file(
    options: dict[str, object], make_image: Callable[..., Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    size, seed = 8 * MIB, 20
    base = write_noise(tmp_path / "base", size, seed)
    raw = tmp_path / "raw"
    if "backing_file" in options:
        shutil.copyfile(base, raw)
    else:
        raw.touch()
        with raw.open("r+b") as file:
            file.truncate(size)
    rng = random.Random(seed)
    image = make_image(size=str(size), **options)
    server = serve(image, "--journal-size", "1M")
    for _ in range(2):
        commands = qemu_io_commands(rng, size, 60)
        qemu_io(server.uri, commands)
        qemu_io(raw, commands)
        same(server.uri, raw)
    server.stop()
    assert_closed_well(image)
    same(image, raw, one_format="qcow2")


# ---- Block status -----------------------------------------------------------------------------------


def nbd_map(uri: str) -> list[tuple[int, int, str]]:
    """(offset, length, description) of each extent that nbdinfo is told of, neighbours that are alike as one."""
    found: list[tuple[int, int, str]] = []
    for extent in json.loads(run("nbdinfo", "--map", "--json", uri).stdout):
        if found and found[-1][2] == extent["description"]:
            found[-1] = (found[-1][0], found[-1][1] + extent["length"], found[-1][2])
        else:
            found.append((extent["offset"], extent["length"], extent["description"]))
    return found


def by_cluster(extents: list[tuple[int, int, str]], size: int) -> list[str]:
    assert sum(length for _, length, _ in extents) == size
    return [
        next(kind for start, length, kind in extents if start <= at < start + length) for at in range(0, size, CLUSTER)
    ]


def qemu_kinds(*words: object) -> list[tuple[int, int, str]]:
    """What `qemu-img map` says, in the words of nbdinfo, without "allocated": a file says that otherwise."""
    extents = json.loads(run("qemu-img", "map", "--output=json", *words).stdout)
    return [(each["start"], each["length"], "zero" if each["zero"] else "data") for each in extents]


@pytest.fixture
def chain(make_image: Callable[..., Path], tmp_path: Path) -> Path:
    """Three layers of 2 MiB: raw with data in clusters 0 to 7, qcow2 with 8 and a zero in 3, and an empty one."""
    (tmp_path / "base").write_bytes(random.Random(1).randbytes(8 * CLUSTER))
    with (tmp_path / "base").open("r+b") as file:
        file.truncate(2 * MIB)
    middle = make_image(size="2M", name="middle", backing_file="base", backing_fmt="raw")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 8 {8 * CLUSTER} 64k", "-c", f"write -z {3 * CLUSTER} 64k", middle)
    return make_image(size="2M", backing_file="middle", backing_fmt="qcow2")


def test_the_map_tells_data_and_zeros_across_the_backing_chain(
    chain: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(chain)
    handle = server.connect()
    handle.pwrite(b"t" * CLUSTER, 10 * CLUSTER)
    handle.pwrite(b"p" * 4096, 12 * CLUSTER)
    handle.zero(CLUSTER, 1 * CLUSTER)
    handle.trim(CLUSTER, 2 * CLUSTER)
    handle.zero(CLUSTER, 10 * CLUSTER, nbd.CMD_FLAG_NO_HOLE)
    handle.pwrite(b"t" * CLUSTER, 11 * CLUSTER)
    handle.flush()
    kinds = by_cluster(nbd_map(server.uri), 2 * MIB)
    # Data is data in whatever layer it lies: a client that takes it for a hole would not copy it.
    assert kinds[:13] == [DATA, HOLE, HOLE, HOLE, DATA, DATA, DATA, DATA, DATA, HOLE, ZERO, DATA, DATA]
    assert set(kinds[13:]) == {HOLE}
    served = by_cluster(qemu_kinds("-f", "raw", server.uri), 2 * MIB)
    server.stop()
    assert_closed_well(chain)
    assert served == by_cluster(qemu_kinds("-f", "qcow2", chain), 2 * MIB)


def test_qemu_copies_what_lies_in_the_backing_file_onto_another_one(
    chain: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    # With a backing file of its own, the target lets holes that do not read as zeros show what lies beneath.
    other = write_noise(tmp_path / "other", 2 * MIB, 3)
    server = serve(chain)
    server.connect().pwrite(b"t" * CLUSTER, 10 * CLUSTER)
    copy, plain = tmp_path / "copy.qcow2", tmp_path / "plain"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", other, "-F", "raw", server.uri, copy)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, plain)
    expected = bytes(server.connect().pread(2 * MIB, 0))
    assert hashlib.sha256(plain.read_bytes()).digest() == hashlib.sha256(expected).digest()
    assert any(expected[: 8 * CLUSTER]), "or this test would prove nothing"


def test_four_connections_that_ask_for_extents_get_the_same_answer(
    chain: Path, serve: Callable[..., Server]
) -> None:
    # Three ask at odd places while a fourth makes data of one cluster after another behind what they ask for.
    server = serve(chain, "--commit-interval", "0.05", "--checkpoint-interval", "0.1")
    expected = nbd_map(server.uri)
    limit = MIB
    flags_of = {DATA: 0, HOLE: 3, ZERO: 2}

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        handle = server.connect("base:allocation")
        for _ in range(150):
            offset = rng.randrange(limit)
            length = rng.randrange(1, limit - offset + 1)
            answer: list[int] = []
            handle.block_status(length, offset, lambda context, at, entries, error: answer.extend(entries) or 0)  # noqa: B023
            at = offset
            for size, flags in zip(answer[::2], answer[1::2], strict=True):
                end = min(at + size, offset + length)
                for start, span, kind in expected:
                    if start < end and at < start + span:
                        assert flags == flags_of[kind], f"seed {seed}: {at} to {end}: {flags}, expected {kind}"
                at = end
            assert at > offset

    def write() -> None:
        handle = server.connect()
        for cluster in range(limit // CLUSTER, 2 * limit // CLUSTER):
            handle.pwrite(b"w" * CLUSTER, cluster * CLUSTER)
            handle.pwrite(b"w" * 100, cluster * CLUSTER + 1)
            handle.flush()

    at_once(*(lambda seed=seed: ask(seed) for seed in range(3)), write)
    assert set(by_cluster(nbd_map(server.uri), 2 * MIB)[limit // CLUSTER :]) == {DATA}


def at_once(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own; the first exception of any is raised when all have ended."""
    failures: list[BaseException] = []

    def run_one(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_one, args=(work,)) for work in works]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]


# ---- Copying ----------------------------------------------------------------------------------------


def test_nbdcopy_brings_a_disk_in_and_out_again(image: Path, serve: Callable[..., Server], tmp_path: Path) -> None:
    # nbdcopy sees multi-conn and opens four connections.
    source, back = write_noise(tmp_path / "source", 48 * MIB + 512, 4), tmp_path / "back"
    run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", image, str(48 * MIB + 512))
    server = serve(image)
    run("nbdcopy", "--flush", source, server.uri)
    run("nbdcopy", server.uri, back)
    run("cmp", source, back)
    # Flushed is flushed: also for a server that is killed at once.
    server.kill()
    server = serve(image)
    run("nbdcopy", server.uri, back)
    run("cmp", source, back)
    server.stop()
    assert_closed_well(image)
    same(image, source, one_format="qcow2")
    # What was a hole is none of the image's business.
    assert image.stat().st_blocks < 1.1 * source.stat().st_blocks


def test_nbdcopy_copies_from_one_served_disk_to_another(
    make_image: Callable[..., Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    source = write_noise(tmp_path / "source", 16 * MIB, 5)
    one = serve(make_image(size="16M", name="one.qcow2", backing_file="source", backing_fmt="raw"))
    one.connect().pwrite(b"changed" * 1000, 5 * MIB + 77)
    other_image = make_image(size="16M", name="other.qcow2", cluster_size=4096)
    other = serve(other_image)
    run("nbdcopy", "--flush", one.uri, other.uri)
    same(one.uri, other.uri)
    other.stop()
    assert_closed_well(other_image)
    same(one.uri, other_image, other_format="qcow2")
    assert source.exists()


def test_qemu_img_converts_to_and_from_the_uri(
    make_image: Callable[..., Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    noise = write_noise(tmp_path / "noise", 24 * MIB, 6)
    source = tmp_path / "source.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", noise, source)
    image = make_image(size="24M")
    server = serve(image)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", source, server.uri)
    same(server.uri, source, other_format="qcow2")
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, copy)
    same(copy, noise, one_format="qcow2")
    server.connect().pwrite(b"\x55", 12 * MIB)
    differs = run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, noise, check=False)
    assert differs.returncode == 1, "or the comparisons above would prove nothing"
    server.stop()
    assert_closed_well(image)


# ---- fio --------------------------------------------------------------------------------------------


def fio(uri: str, *options: str) -> dict[str, Any]:
    """Run fio's nbd engine; its JSON, which may come after a line of something else."""
    words = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *options]
    done = run(*words, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert [job["error"] for job in found["jobs"]] == [0], done.stdout
    return found


ODD = "--bsrange=512-100k --bs_unaligned=1"
WRITES = f"--name=writes --rw=randwrite {ODD} --iodepth=16 --size=16m --io_size=12m --fsync=16"
# A trim and the write of the same block may not be under way together: a server may do them in any order.
TRIMS_AND_WRITES = "--name=both --rw=randtrimwrite --bs=4k --iodepth=16 --serialize_overlap=1 --size=16m --io_size=12m"
UNALIGNED_BOTH = f"--name=odd --rw=randtrimwrite {ODD} --iodepth=1 --size=16m --io_size=8m"
VERIFY = "--verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --randseed=7"
TRIMS_BESIDE = f"--name=trims --rw=randtrim {ODD} --iodepth=4 --offset=16m --size=16m"


@pytest.mark.parametrize(
    "jobs",
    [f"{TRIMS_AND_WRITES} {VERIFY}", f"{UNALIGNED_BOTH} {VERIFY}", f"{TRIMS_BESIDE} {WRITES} {VERIFY}"],
    ids=["every block trimmed and written", "odd sizes", "trims on one connection, writes on another"],
)
def test_fio_verifies_what_it_wrote_with_trims_among_it(jobs: str, image: Path, serve: Callable[..., Server]) -> None:
    server = serve(image, "--journal-size", "4M")
    words = ["fio", "--ioengine=nbd", f"--uri={server.uri}", "--output-format=json", *jobs.split()]
    done = run(*words, timeout=300)
    # fio prints a line of its own before the JSON.
    found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert {job["error"] for job in found} == {0}, done.stdout
    for kind in ("read", "write", "trim"):
        assert sum(job[kind]["total_ios"] for job in found) > 100, f"{kind}: or this test would prove nothing"
    server.stop()
    assert_closed_well(image)


# ---- Several connections ----------------------------------------------------------------------------


def test_four_connections_are_one_disk_and_a_flush_on_any_is_for_all(
    image: Path, serve: Callable[..., Server]
) -> None:
    # Two write, the third flushes what both were answered, the fourth reads; then the server is killed.
    rng = random.Random(8)
    content = bytearray(64 * MIB)
    server = serve(image, "--commit-interval", "60", "--checkpoint-interval", "600")
    for _ in range(4):
        one, two, three, four = (server.connect() for _ in range(4))
        assert one.can_multi_conn()
        for _ in range(30):
            for handle in (one, two):
                length = rng.choice((1, 700, 4096, 4096, 100_000))
                offset = rng.randrange(len(content) - length)
                data = rng.randbytes(length)
                handle.pwrite(data, offset)
                content[offset : offset + length] = data
                assert four.pread(length, offset) == data
        three.flush()
        one.pwrite(b"\xff" * 10, 0)
        content_or_not = content[:10], b"\xff" * 10
        server.kill()
        server = serve(image, "--commit-interval", "60", "--checkpoint-interval", "600")
        handle = server.connect()
        found = b"".join(handle.pread(16 * MIB, at) for at in range(0, len(content), 16 * MIB))
        assert found[:10] in content_or_not
        content[:10] = found[:10]
        assert hashlib.sha256(found).digest() == hashlib.sha256(content).digest()
    server.stop()
    assert_closed_well(image)


def test_four_connections_at_once_with_requests_of_any_size(image: Path, serve: Callable[..., Server]) -> None:
    # Each has a quarter of the disk, odd at both ends, so that neighbours share pages and clusters.
    size = 64 * MIB
    server = serve(image, "--journal-size", "2M", "--checkpoint-interval", "0.1")
    edges = [0, size // 4 + 1, size // 2 + 4095, size * 3 // 4 - 513, size]
    contents: dict[int, bytearray] = {}

    def work(number: int) -> None:
        rng = random.Random(number)
        start, end = edges[number : number + 2]
        content = contents[number] = bytearray(end - start)
        handle = server.connect()
        for _ in range(80):
            length = min(len(content), int(2 ** rng.uniform(0, 20)))
            at = rng.choice((0, len(content) - length, rng.randrange(len(content) - length + 1)))
            if rng.random() < 0.6:
                data = rng.randbytes(length)
                handle.pwrite(data, start + at)
                content[at : at + length] = data
            elif rng.random() < 0.3:
                handle.zero(length, start + at)
                content[at : at + length] = bytes(length)
            else:
                assert handle.pread(length, start + at) == content[at : at + length], f"seed {number}"
            if rng.random() < 0.1:
                handle.flush()

    at_once(*(lambda number=number: work(number) for number in range(4)))
    server.stop()
    assert_closed_well(image)
    plain = image.with_name("plain")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, plain)
    expected = b"".join(contents[number] for number in range(4))
    assert hashlib.sha256(plain.read_bytes()).digest() == hashlib.sha256(expected).digest()


# ---- Offsets, lengths and sizes ---------------------------------------------------------------------


def test_requests_of_up_to_32_mib_at_any_offset(make_image: Callable[..., Path], serve: Callable[..., Server]) -> None:
    size, seed = 70 * MIB, 9
    rng = random.Random(seed)
    image = make_image(size=str(size))
    server = serve(image, "--journal-size", "4M")
    handle = server.connect()
    content = bytearray(size)
    lengths = [32 * MIB, 32 * MIB - 1, *(int(2 ** rng.uniform(12, 25)) for _ in range(10))]
    for number, length in enumerate(lengths):
        offset = rng.randrange(size - length)
        data = rng.randbytes(length)
        handle.pwrite(data, offset)
        content[offset : offset + length] = data
        if number % 3 == 0:
            start, span = rng.randrange(size // 2), int(2 ** rng.uniform(0, 25))
            handle.zero(span, start)
            content[start : start + span] = bytes(span)
        start = rng.randrange(size - 32 * MIB)
        assert handle.pread(32 * MIB, start) == content[start : start + 32 * MIB], f"seed {seed}, write {number}"
    handle.flush()
    server.stop()
    assert_closed_well(image)


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [(1, "64K"), (511, "512"), (4097, "64K"), (5 * CLUSTER + 512, "512"), (3 * MIB + 1234, "64K")],
    ids=str,
)
def test_a_disk_of_any_size_is_served_to_its_last_byte(
    size: int, cluster_size: str, tmp_path: Path, serve: Callable[..., Server]
) -> None:
    image = tmp_path / "disk.qcow2"
    # No tool makes images of half sectors, but the field in the header counts bytes.
    run(PROGRAM, "create", image, -(-size // 512) * 512, "--cluster-size", cluster_size)
    with image.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", size))
    data = random.Random(size).randbytes(size)
    server = serve(image)
    handle = server.connect("base:allocation")
    assert handle.get_size() == size
    handle.pwrite(data, 0)
    tail = min(size, 100)
    handle.pwrite(b"t" * tail, size - tail, nbd.CMD_FLAG_FUA)
    expected = data[: size - tail] + b"t" * tail
    assert handle.pread(size, 0) == expected
    with pytest.raises(nbd.Error):
        handle.set_strict_mode(0)
        handle.pread(2, size - 1)
    back = tmp_path / "back"
    run("nbdcopy", server.uri, back)
    assert back.read_bytes() == expected
    server.kill()
    server = serve(image)
    assert server.connect().pread(size, 0) == expected
    server.connect().zero(tail, size - tail)
    server.stop()
    run(PROGRAM, "check", "-q", image)
    assert_closed_well(image)
    server = serve(image, "--read-only")
    assert server.connect().pread(size, 0) == data[: size - tail] + bytes(tail)
    # Zeroing or trimming to the end covers the last cluster, which is not whole.
    server.stop()
    server = serve(image)
    server.connect().trim(size, 0)
    assert server.connect().pread(size, 0) == (bytes(size))


# ---- Reading a disk whose server was killed ---------------------------------------------------------


def test_a_read_only_server_shows_what_is_only_in_the_journal_and_writes_nothing(
    make_image: Callable[..., Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    noise = write_noise(tmp_path / "base", 8 * MIB, 10)
    image = make_image(size="8M", backing_file="base", backing_fmt="raw")
    rng = random.Random(10)
    content = bytearray(noise.read_bytes())
    server = serve(image, "--commit-interval", "60", "--checkpoint-interval", "600", "--journal-size", "8M")
    handle = server.connect()
    for number in range(200):
        length = rng.choice((1, 512, 4096, 4096, CLUSTER, 3 * CLUSTER))
        offset = rng.randrange(len(content) - length)
        offset -= offset % rng.choice((1, 4096, CLUSTER))
        data = rng.randbytes(length) if number % 10 else bytes(length)
        if number % 10:
            handle.pwrite(data, offset)
        else:
            handle.zero(length, offset)
        content[offset : offset + length] = data
    handle.flush()
    server.kill()
    assert is_attached(image)
    before, stat = image.read_bytes(), image.stat()
    # Two may read at once; qemu may not, it would see half of it.
    readers = [serve(image, "--read-only") for _ in range(2)]
    for reader in readers:
        assert reader.connect().pread(len(content), 0) == content
    assert "Unsupported qcow2 feature" in run("qemu-img", "info", "-U", image, check=False).stderr
    assert_map_covers(readers[0], content)
    for reader in readers:
        reader.stop()
    assert image.read_bytes() == before
    assert (image.stat().st_mtime_ns, image.stat().st_blocks) == (stat.st_mtime_ns, stat.st_blocks)
    run(PROGRAM, "recover", image)
    assert_closed_well(image)
    plain = tmp_path / "plain"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, plain)
    assert plain.read_bytes() == content


def assert_map_covers(server: Server, content: bytes | bytearray) -> None:
    """What the map calls zero is zero."""
    for offset, length, kind in nbd_map(server.uri):
        if kind != DATA:
            assert not any(content[offset : offset + length]), (offset, length, kind)


def test_a_read_only_disk_is_read_only_for_every_program(image: Path, serve: Callable[..., Server]) -> None:
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", image)
    before = image.read_bytes()
    server = serve(image, "--read-only")
    read = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 1M", server.uri)
    assert "Pattern verification failed" not in read.stdout
    zero = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.set_strict_mode(0); h.zero(4096, 0)"
    for words in (
        ("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri),
        ("nbdcopy", image, server.uri),
        (sys.executable, "-c", zero, server.uri),
    ):
        assert subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode != 0, words
    server.stop()
    assert image.read_bytes() == before
