"""`check` says of an image what `qemu-img check` says: of every geometry, whole and damaged; and what bounds it.

Where we differ from qemu 7.2, and why, is `REASONS`: nothing else may differ.
"""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Server, is_attached, run
from damage import IMAGES, damaged, find_sites, make_images

from nbd_qcow2j.errors import Error, ImageError
from nbd_qcow2j.format.header import Header, parse_header
from nbd_qcow2j.image.check import MEMORY_BASE, check_image
from nbd_qcow2j.image.findings import CheckReport

DEFAULT_SEEDS = 120
SWEEP_SEEDS = range(1000, 1300)

REASONS = {
    "behind the end of the file": "the header names a table that the file does not hold: refused when it is opened, "
    "where qemu reads zeros and counts what they lack; both say with their exit code that the image is bad",
}
"""Part of the message of an ImageError, and why qemu counts where we refuse. qemu's exit code must not be 0."""


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length].ljust(length, b"\0")


def check_bytes(data: bytes, **options: Any) -> CheckReport:
    header = parse_header(data[:65536], file_size=len(data), name="image")
    return check_image(header, reader(data), file_size=len(data), name="image", **options)


def qemu_check(path: Path) -> tuple[int, dict[str, Any] | None]:
    """The exit code of `qemu-img check` and its JSON, None where it gave up."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)], capture_output=True, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_images(tmp_path_factory.mktemp("images"))


# ---- the same as qemu


@pytest.mark.parametrize("name", [recipe.name for recipe in IMAGES])
def test_a_whole_image_is_reported_as_by_qemu(images: dict[str, Path], name: str) -> None:
    path = images[name]
    code, expected = qemu_check(path)
    done = run(PROGRAM, "check", "--json", path)
    assert (done.returncode, json.loads(done.stdout)) == (0, expected)
    assert code == 0


def difference(data: bytes, path: Path) -> tuple[str, str]:
    """How we judge an image, and in what that differs from qemu: empty where it does not."""
    path.write_bytes(data)
    code, expected = qemu_check(path)
    try:
        report = check_bytes(data)
    except ImageError as error:
        reason = next((part for part in REASONS if part in str(error)), None)
        if code == 1 or (reason is not None and code != 0):
            return "refused", ""
        return "refused", f"qemu exits with {code}, we refuse: {error}"
    found = report.to_json(str(path))
    kind = {0: "well", 1: "not checked", 2: "corrupt", 3: "leaks"}[report.exit_code]
    if code != report.exit_code:
        return kind, f"qemu exits with {code}, we with {report.exit_code}: {report.messages[:3]}"
    if expected is not None and expected != found:
        return kind, f"qemu says {expected}, we say {found}: {report.messages[:3]}"
    return kind, ""


def compare_damaged(images: dict[str, Path], seeds: range) -> None:
    # Beside the others, where an overlay finds its backing file.
    path = images["overlay"].with_name("damaged.qcow2")
    whole = [images[recipe.name].read_bytes() for recipe in IMAGES]
    kinds: Counter[str] = Counter()
    differences = []
    for seed in seeds:
        data, done = damaged(whole[seed % len(whole)], seed)
        kind, text = difference(data, path)
        kinds[kind] += 1
        if text:
            differences.append(f"seed {seed}, {IMAGES[seed % len(whole)].name}, {done}: {text}")
    print(f"{len(seeds)} damaged images compared with qemu-img check: {dict(kinds)}")
    assert not differences, "\n".join(differences)
    # Damage that is never found would compare equal as well.
    assert kinds["corrupt"] > len(seeds) // 2
    assert kinds["leaks"] > 2


def test_damaged_images_are_judged_as_by_qemu(images: dict[str, Path]) -> None:
    compare_damaged(images, range(DEFAULT_SEEDS))


@pytest.mark.sweep
def test_300_more_damaged_images_are_judged_as_by_qemu(images: dict[str, Path]) -> None:
    compare_damaged(images, SWEEP_SEEDS)


# ---- what only an entry at the right place shows


def entry_at(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big")


def with_entry(data: bytes, at: int, entry: int) -> bytes:
    return data[:at] + entry.to_bytes(8, "big") + data[at + 8 :]


@pytest.mark.parametrize(
    ("change", "corruptions", "leaks"),
    [
        (lambda entry: 0, 0, 1),
        (lambda entry: entry & ~(1 << 63), 1, 0),
        (lambda entry: entry | 1 << 58, 1, 0),
        # On the header: one reference too many, a COPIED that is right for it, and a cluster nobody names.
        (lambda entry: 1 << 63 | 512, 3, 1),
        (lambda entry: 1 << 50, 1, 1),
    ],
    ids=["lost", "not-copied", "reserved-bit", "misaligned-on-the-header", "behind-the-end"],
)
def test_an_l2_entry_is_judged(
    images: dict[str, Path], change: Callable[[int], int], corruptions: int, leaks: int
) -> None:
    data = images["width-16"].read_bytes()
    _, sites = find_sites(data)
    at = sites.l2[0]
    report = check_bytes(with_entry(data, at, change(entry_at(data, at))))
    assert (report.corruptions, report.leaks, report.check_errors) == (corruptions, leaks, 0), report.messages
    assert report.exit_code == (2 if corruptions else 3)


def test_a_reference_into_the_ring_is_a_corruption_even_with_a_refcount(images: dict[str, Path]) -> None:
    # Scenario: refcounts and references agree, but the journal says that the cluster is its own.
    data = images["width-16"].read_bytes()
    _, sites = find_sites(data)
    cluster = entry_at(data, sites.l2[0]) & 0x00FF_FFFF_FFFF_FE00
    assert check_bytes(data).exit_code == 0
    report = check_bytes(data, journal=(cluster, 65536))
    assert report.corruptions == 1
    assert "belongs to the journal" in report.messages[0]


def test_the_image_ends_after_an_attached_ring(images: dict[str, Path]) -> None:
    data = images["width-16"].read_bytes()
    offset = -(-len(data) // 65536) * 65536
    report = check_bytes(data + bytes(offset - len(data) + (1 << 20)), journal=(offset, 1 << 20))
    assert (report.exit_code, report.image_end_offset) == (0, offset + (1 << 20))


def test_messages_are_bounded(images: dict[str, Path]) -> None:
    # Scenario: a refcount block of ones; every cluster of the file leaks.
    data = bytearray(images["clusters-512"].read_bytes())
    _, sites = find_sites(bytes(data))
    for block in sites.blocks:
        data[block : block + 512] = b"\0\7" * 256
    report = check_bytes(bytes(data))
    assert len(report.messages) == 200
    assert report.messages_left_out + 200 == report.leaks + report.corruptions


# ---- the command


def test_exit_codes_are_those_of_qemu_img(images: dict[str, Path], tmp_path: Path) -> None:
    data = images["width-16"].read_bytes()
    _, sites = find_sites(data)
    path = tmp_path / "bad.qcow2"
    for change, code in ((1 << 63, 2), (0, 0), (None, 3)):
        at = sites.l2[0]
        path.write_bytes(with_entry(data, at, 0 if change is None else entry_at(data, at) ^ change))
        assert run(PROGRAM, "check", "--quiet", path, check=False).returncode == code
        assert qemu_check(path)[0] == code


@pytest.mark.parametrize("content", [b"hello" * 1000, b"QFI\xfb", b""])
def test_what_is_not_a_qcow2_image_is_one_line_and_the_exit_code_of_qemu_img(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.qcow2"
    path.write_bytes(content)
    for words in ((), ("--repair", "leaks")):
        done = run(PROGRAM, "check", *words, path, check=False)
        assert done.returncode == run("qemu-img", "check", path, check=False).returncode == 63
        assert done.stderr.count("\n") == 1
        assert re.search("is not a qcow2 image|is shorter than a qcow2 header", done.stderr)
    assert path.read_bytes() == content


def test_what_cannot_be_checked_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "not.qcow2"
    done = run(PROGRAM, "check", path, check=False)
    assert done.returncode == run("qemu-img", "check", path, check=False).returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No such file" in done.stderr
    # As in qemu-img, and not 2: that is what a corrupt image is.
    for words in ((), ("--repair", "bad", path), ("--bogus", path)):
        assert run(PROGRAM, "check", *words, check=False).returncode == 1
    assert run(PROGRAM, "check", "--help").stdout


def test_findings_are_printed_for_people(images: dict[str, Path], tmp_path: Path) -> None:
    data = images["width-16"].read_bytes()
    _, sites = find_sites(data)
    path = tmp_path / "leak.qcow2"
    path.write_bytes(with_entry(data, sites.l2[0], 0))
    done = run(PROGRAM, "check", path, check=False)
    assert "refcount=1 reference=0" in done.stderr
    assert "1 leaked clusters" in done.stdout


def test_an_unknown_feature_is_refused_by_name(images: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(images["width-16"].read_bytes())
    data[72:80] = (1 << 40).to_bytes(8, "big")
    path = tmp_path / "unknown.qcow2"
    path.write_bytes(data)
    done = run(PROGRAM, "check", path, check=False)
    assert done.returncode == 1
    assert "incompatible bit 40" in done.stderr


@pytest.mark.parametrize("cluster_size", ["4k", "64k"])
def test_an_attached_journal_counts_as_it_will_be_replayed(
    make_image: Callable[..., Path], serve: Callable[..., Server], cluster_size: str
) -> None:
    # Scenario: allocating writes, a flush, SIGKILL. What maps them is in the journal and nowhere else.
    image = make_image("64M", cluster_size=cluster_size)
    server = serve(image)
    handle = server.connect()
    for at in range(0, 8 << 20, 1 << 20):
        handle.pwrite(b"x" * (256 << 10), at)
    handle.flush()
    server.kill()
    assert is_attached(image)
    done = run(PROGRAM, "check", "--json", image, check=False)
    facts = json.loads(done.stdout)
    assert (done.returncode, facts.get("corruptions"), facts.get("leaks")) == (0, None, None), done.stderr
    assert facts["journal-transactions"] > 0
    assert facts["allocated-clusters"] > 0
    run(PROGRAM, "recover", image)
    done = run(PROGRAM, "check", "--json", image)
    assert "journal-transactions" not in json.loads(done.stdout)
    assert json.loads(done.stdout) == qemu_check(image)[1]


# ---- hostile images


def sparse_image(
    path: Path, *, cluster_bits: int, size: int, l1: bytes, rest: dict[int, bytes], file_size: int, **fields: int
) -> tuple[Header, Callable[[int, int], bytes]]:
    """A file of holes with a header, an L1 table at its second cluster, and whatever else is wanted at offsets."""
    cluster = 1 << cluster_bits
    table = cluster + -(-len(l1) // cluster) * cluster
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, cluster_bits, size, 0, len(l1) // 8, cluster, table, 1,
        fields.get("snapshots", 0), fields.get("snapshots_offset", 0), 0, 0, 0, 4, 104,
    )  # fmt: skip
    with path.open("wb") as file:
        for at, content in {0: head, cluster: l1, **rest}.items():
            file.seek(at)
            file.write(content)
        file.truncate(file_size)

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length).ljust(length, b"\0")

    return parse_header(head.ljust(4096, b"\0"), file_size=file_size, name=path.name), read


def test_a_table_that_a_million_entries_name_is_read_once(tmp_path: Path) -> None:
    # Scenario: the largest L1 table there may be, all of it naming one L2 table with 512 entries.
    l2 = 64 << 20
    header, read = sparse_image(
        tmp_path / "loop.qcow2", cluster_bits=12, size=1 << 30, l1=(1 << 63 | l2).to_bytes(8, "big") * (4 << 20),
        rest={l2: ((1 << 63) | (l2 + 4096)).to_bytes(8, "big") * 512}, file_size=l2 + 8192,
    )  # fmt: skip
    begin = time.process_time()
    report = check_image(header, read, file_size=l2 + 8192, name="loop")
    assert time.process_time() - begin < 10
    # A refcount of 16 bits: what is beyond it is counted as qemu would, one by one, but computed.
    assert report.corruptions > 512 * (4 << 20)
    assert report.exit_code == 2


def test_overlapping_tables_end_the_check(tmp_path: Path) -> None:
    # Scenario: L2 tables that begin at every sector of one cluster of 2 MiB: 4,096 times 2 MiB to read. Their
    # entries are all wrong in several ways, so that messages are many more than are kept.
    cluster = 2 << 20
    entries = b"".join((4 * cluster + 512 * at).to_bytes(8, "big") for at in range(4096))
    header, read = sparse_image(
        tmp_path / "overlap.qcow2", cluster_bits=21, size=1 << 30, l1=entries, rest={4 * cluster: b"\1" * cluster},
        file_size=6 * cluster,
    )  # fmt: skip
    begin = time.process_time()
    report = check_image(header, read, file_size=6 * cluster, name="overlap")
    assert time.process_time() - begin < 30
    assert report.exit_code == 1
    assert any("tables overlap" in message for message in report.messages)


def test_scattered_references_are_refused_before_memory_is_used_up(tmp_path: Path) -> None:
    # Scenario: 2.5 MiB of L2 tables in a sparse file of 8 TiB; each entry names a cluster far from all others.
    count, far = 320 << 10, 8 << 40
    step = far // count // 512 * 512
    first = 1 << 20
    tables = b"".join((at * step).to_bytes(8, "big") for at in range(1, count + 1))
    l1 = b"".join((first + 512 * at).to_bytes(8, "big") for at in range(len(tables) // 512))
    size = len(l1) // 8 * 64 * 512
    header, read = sparse_image(
        tmp_path / "scattered.qcow2", cluster_bits=9, size=size, l1=l1, rest={first: tables}, file_size=far
    )
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="scattered too widely"):
            check_image(header, read, file_size=far, name="scattered")
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BASE + (64 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(4))
def test_noise_anywhere_is_reported_or_refused(images: dict[str, Path], seed: int) -> None:
    # Scenario: as `damaged`, but header and extensions as well, and many bytes; nothing but our errors may come.
    chance = random.Random(seed)
    whole = [path.read_bytes() for path in images.values()]
    for _ in range(60):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 3, 20, 200))):
            # Four times out of five in the first clusters, where the metadata is.
            at = chance.randrange(min(len(data), chance.choice((112, 512, 4096, 1 << 18, len(data)))))
            data[at] = chance.choice((0, 0xFF, data[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
        begin = time.process_time()
        try:
            report = check_bytes(bytes(data))
        except Error:
            pass
        else:
            assert report.exit_code in (0, 1, 2, 3)
        assert time.process_time() - begin < 5, f"seed {seed}"


# ---- size


def test_a_tebibyte_is_checked_in_seconds_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "128G")
    run("qemu-img", "resize", "-q", path, "1T")
    run("qemu-io", "-c", "write 500G 1M", "-c", "write -z 900G 1G", path)
    done = run(sys.executable, "-c", MEASURED, "check", "--json", path)
    assert json.loads(done.stdout) == qemu_check(path)[1]
    peak_kib, cpu_seconds = done.stderr.split()
    assert float(cpu_seconds) < 15
    assert int(peak_kib) < 256 << 10


MEASURED = """
import re, sys, time
from nbd_qcow2j.cli import main
code = main(sys.argv[1:])
# Not getrusage: its peak is that of the process that started this one, if it was larger.
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], time.process_time(), file=sys.stderr)
sys.exit(code)
"""
