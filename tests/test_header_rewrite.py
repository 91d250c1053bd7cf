"""Attaching and detaching rewrite the header cluster: cut after every stage, torn at every sector, on a lying disk.

Every cut leaves a header that parses and means the plain image or the attached one, and from each of them both
ways lead on: to an attached image, and back to the header of before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from conftest import run
from engine import Engine, Oracle, Shape, fill, initial_contents, reference_counts, settle, verify
from simcrash import coverage, crash_states
from simdisk import SimDisk, SimStorage

from nbd_qcow2j import changes
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_JOURNAL,
    INCOMPAT_JOURNAL,
    Extension,
    Header,
    feature_names,
    journal_extension_of,
    parse_header,
)
from nbd_qcow2j.format.header_rewrite import Stage, apply_stages, plan_attach, plan_detach
from nbd_qcow2j.format.journal import Location

JOURNAL = Location(1 << 20, (64 << 10) + 8192).to_bytes()
AUTOCLEAR = slice(88, 96)
LIMIT = 300
"""More than the states of any stage: each is cut exhaustively."""


@dataclass(frozen=True)
class Variant:
    """A header as some program wrote it."""

    cluster_size: int = 65536
    length: int = 112
    names: bool = True
    unknown: tuple[Extension, ...] = ()
    backing: bytes = b""
    autoclear: int = 0

    def cluster(self) -> bytes:
        """The header cluster."""
        plain = new_image(1 << 20, cluster_size=self.cluster_size)[0][0][1].ljust(512, b"\0")
        table = bytes((0, 0)) + b"dirty bit".ljust(46, b"\0") + bytes((0, 1)) + b"corrupt bit".ljust(46, b"\0")
        extensions = [Extension(EXTENSION_BACKING_FORMAT, b"raw")] if self.backing else []
        extensions += [Extension(EXTENSION_FEATURE_NAMES, table)] if self.names else []
        extensions += self.unknown
        area = b"".join(
            each.type.to_bytes(4, "big") + len(each.data).to_bytes(4, "big") + each.data + bytes(-len(each.data) % 8)
            for each in extensions
        ) + bytes(8)
        head = bytearray(plain[: self.length])
        head[100:104] = self.length.to_bytes(4, "big")
        head[AUTOCLEAR] = self.autoclear.to_bytes(8, "big")
        if self.backing:
            head[8:16] = (self.length + len(area)).to_bytes(8, "big")
            head[16:20] = len(self.backing).to_bytes(4, "big")
        content = bytes(head) + area + self.backing
        assert len(content) <= self.cluster_size
        return content.ljust(self.cluster_size, b"\0")


UNKNOWN = (Extension(0x12345678, b"kept as it is" * 3), Extension(0x0BADCAFE, b""))
LONG = b"/".join([b"directory"] * 102) + b"/x"
VARIANTS = {
    f"{cluster}-{length}-{'names' if names else 'no names'}-{what}": Variant(
        cluster, length, names, unknown, backing, autoclear
    )
    for cluster in (512, 4096, 65536)
    for length in (104, 112)
    for names in (True, False)
    for what, unknown, backing, autoclear in (
        ("plain", (), b"", 0),
        ("unknown extensions", UNKNOWN, b"", 0),
        ("backing name", (), b"base.img", 0),
        ("long backing name", (), LONG, 0),
        ("everything", UNKNOWN, b"base.img", 0xF0),
    )
    if cluster > 512 or (backing != LONG and not (names and unknown))
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


def parsed(cluster: bytes) -> Header:
    return parse_header(cluster[:65536], file_size=1 << 30, name="image")


def meaning(header: Header) -> Header:
    """Without what the journal changes."""
    mine = (EXTENSION_JOURNAL, EXTENSION_FEATURE_NAMES)
    return replace(
        header, incompatible=header.incompatible & ~INCOMPAT_JOURNAL, autoclear=0, header_length=0, backing_offset=0,
        extensions=tuple(each for each in header.extensions if each.type not in mine),
    )  # fmt: skip


def cut_everywhere(cluster: bytes, stages: tuple[Stage, ...], rng: Random) -> Iterator[bytes]:
    """The header clusters that a cut may leave, at any stage and torn at any sector."""
    disk = SimDisk.of([(0, cluster)], len(cluster))
    storage = SimStorage(disk, "image")
    for stage in stages:
        for offset, data in stage:
            storage.write(offset, [data])
            assert coverage(disk, LIMIT)[0] == "sectors", "not exhaustive"
            for state in crash_states(disk, LIMIT, rng):
                content = bytearray(len(cluster))
                SimStorage(state, "state", read_only=True).read_into(content, 0)
                yield bytes(content)
        storage.sync()
    assert storage.size() == len(cluster), "written outside the header cluster"


def attached(cluster: bytes) -> bytes:
    return apply_stages(cluster, plan_attach(cluster, JOURNAL).stages)


def detached(cluster: bytes) -> bytes:
    return apply_stages(cluster, plan_detach(cluster).stages)


def without_autoclear(cluster: bytes) -> bytes:
    return cluster[:88] + bytes(8) + cluster[96:]


def test_an_attached_header_names_the_journal_and_means_what_it_meant(variant: Variant) -> None:
    cluster = variant.cluster()
    header = parsed(attached(cluster))
    assert journal_extension_of(header) == JOURNAL
    assert header.incompatible & INCOMPAT_JOURNAL
    assert header.autoclear == 0
    assert meaning(header) == meaning(parsed(cluster))


def test_the_feature_is_named_where_there_is_room(variant: Variant) -> None:
    names = feature_names(parsed(attached(variant.cluster())))
    if variant.cluster_size > 4096 or (variant.cluster_size == 4096 and variant.backing != LONG):
        assert names[0, 62] == "journal (nbd-qcow2j)"
        assert (names.get((0, 1)) == "corrupt bit") == variant.names


def test_a_detached_header_cluster_is_byte_for_byte_what_it_was(variant: Variant) -> None:
    cluster = variant.cluster()
    assert detached(attached(cluster)) == without_autoclear(cluster)


def test_attaching_and_detaching_can_be_cut_anywhere(variant: Variant) -> None:
    cluster = variant.cluster()
    before, rng = parsed(cluster), Random(1)
    whole = attached(cluster)
    states = kinds = 0
    for start, stages in ((cluster, plan_attach(cluster, JOURNAL).stages), (whole, plan_detach(whole).stages)):
        for state in cut_everywhere(start, stages, rng):
            header = parsed(state)
            assert meaning(header) == meaning(before)
            if header.incompatible & INCOMPAT_JOURNAL:
                kinds |= 1
                assert journal_extension_of(header) == JOURNAL
                again = detached(state)
            else:
                kinds |= 2
                assert journal_extension_of(header) is None
                again = detached(attached(state))
            assert replace(parsed(again), autoclear=0) == replace(before, autoclear=0)
            assert replace(parsed(detached(state)), autoclear=0) == replace(before, autoclear=0)
            states += 1
    assert kinds == 3
    assert states >= 5


def test_a_second_cut_while_a_cut_attach_is_made_again_is_no_worse() -> None:
    # Scenario: cut in attaching, attached anew from there, cut again; the same for detaching.
    total = 0
    for name in ("65536-112-names-backing name", "4096-104-names-long backing name", "512-104-no names-everything"):
        cluster = VARIANTS[name].cluster()
        before, rng = parsed(cluster), Random(2)
        first = set(cut_everywhere(cluster, plan_attach(cluster, JOURNAL).stages, rng))
        whole = attached(cluster)
        first.update(cut_everywhere(whole, plan_detach(whole).stages, rng))
        for state in sorted(first):
            is_attached = bool(parsed(state).incompatible & INCOMPAT_JOURNAL)
            plan = plan_detach(state) if is_attached else plan_attach(state, JOURNAL)
            for deeper in cut_everywhere(state, plan.stages, rng):
                assert meaning(parsed(deeper)) == meaning(before)
                assert replace(parsed(detached(deeper)), autoclear=0) == replace(before, autoclear=0)
                total += 1
    print(f"{total} states cut twice")
    assert total > 50


def test_a_name_that_another_program_gave_in_between_is_not_undone() -> None:
    # Scenario: a cut left our extension in a plain image, and qemu-img rebase wrote another name behind it.
    cluster = VARIANTS["65536-112-names-backing name"].cluster()
    whole = attached(cluster)
    plain = apply_stages(whole, plan_detach(whole).stages[:1])
    header = parsed(plain)
    assert not header.incompatible & INCOMPAT_JOURNAL
    at = header.backing_offset
    renamed = plain[:16] + (9).to_bytes(4, "big") + plain[20:at] + b"other.img" + plain[at + 9 :]
    assert parsed(detached(renamed)).backing_name == b"other.img"
    assert parsed(detached(attached(renamed))).backing_name == b"other.img"


def test_a_header_cluster_that_is_full_is_refused_with_what_helps() -> None:
    cluster = Variant(512, 112, False, (Extension(0x12345678, b"x" * 200),), b"y" * 120).cluster()
    with pytest.raises(ImageError, match=r"no room .* shorter backing file name .* larger clusters"):
        plan_attach(cluster, JOURNAL)


# ---- with qemu as the referee


def info(path: Path) -> object:
    found = json.loads(run("qemu-img", "info", "--output=json", path).stdout)
    found.pop("actual-size")
    return found


@pytest.mark.parametrize(
    "name",
    [name for name in VARIANTS if "plain" in name or ("everything" in name and "-names" in name) or "long" in name],
)
def test_qemu_sees_the_same_image_after_a_detach(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    writes, length = new_image(1 << 20, cluster_size=variant.cluster_size)
    path = tmp_path / "image.qcow2"
    with path.open("wb") as file:
        for offset, data in [*writes, (0, variant.cluster())]:
            file.seek(offset)
            file.write(data)
        file.truncate(length)
    if variant.backing == b"base.img":
        (tmp_path / "base.img").write_bytes(bytes(1 << 20))
    before = info(path)
    cluster = path.read_bytes()[: variant.cluster_size]
    whole = attached(cluster)
    path.write_bytes(whole + path.read_bytes()[variant.cluster_size :])
    done = run("qemu-img", "info", path, check=False)
    assert done.returncode != 0
    assert "Unsupported qcow2 feature(s)" in done.stderr
    path.write_bytes(detached(whole) + path.read_bytes()[variant.cluster_size :])
    assert info(path) == before


# ---- the refcount table moves


def image_before_a_move(variant: Variant, shape: Shape) -> SimDisk:
    """An image whose file is so long that the first cluster behind it needs a larger refcount table."""
    writes, _ = new_image(shape.size, cluster_size=variant.cluster_size, refcount_bits=64)
    head = bytearray(variant.cluster())
    # Size, tables and refcount width are those of this image.
    head[24:60] = writes[0][1][24:60]
    head[96:100] = writes[0][1][96:100]
    per_block = variant.cluster_size // 8
    table_covers = per_block * per_block * variant.cluster_size
    return SimDisk.of([*writes, (0, bytes(head))], table_covers)


@pytest.mark.parametrize(
    "name",
    [
        "512-112-no names-plain",
        "512-104-names-backing name",
        "2048-104-names-plain",
        "2048-112-names-long backing name",
        "2048-112-names-everything",
    ],
)
def test_a_move_of_the_refcount_table_can_be_cut_anywhere(name: str) -> None:
    # Scenario: sector 0 is journalled, goes home, and the journal is detached, with a cut after each operation.
    cluster, length, names, what = name.split("-")
    variant = Variant(
        int(cluster), int(length), names == "names", UNKNOWN if what == "everything" else (),
        {"backing name": b"base.img", "everything": b"base.img", "long backing name": LONG[:300]}.get(what, b""),
    )  # fmt: skip
    shape = Shape("", variant.cluster_size * (variant.cluster_size // 8 + 40), 1 << 18, backed=bool(variant.backing))
    image, rng = image_before_a_move(variant, shape), Random(3)
    original = bytearray(variant.cluster_size)
    SimStorage(image, "before").read_into(original, 0)
    engine = Engine(image, shape, rng)
    oracle = Oracle(initial_contents(shape))
    disk = engine.open()
    table = disk.allocator.reftable.host_offset
    # Up to the last free cluster below: what comes next moves the table.
    step = 8 * variant.cluster_size
    number = at = 0

    def write() -> None:
        nonlocal number, at
        number += 1
        sectors = min(step, shape.size - at) // 512
        started = oracle.begin(at // 512, sectors, number)
        settle(engine, changes.write(disk, fill(number) * sectors, at))
        oracle.end(started)
        at += step

    states = parsed_kinds = 0
    seen = -1

    def look(kind: str, offset: int, length: int) -> None:
        nonlocal states, parsed_kinds, seen
        if image.operations == seen:
            return
        seen = image.operations
        for state in crash_states(image, 12, rng):
            content = bytearray(variant.cluster_size)
            SimStorage(state, "state", read_only=True).read_into(content, 0)
            header = parsed(bytes(content))
            assert meaning(without_table(header)) == meaning(without_table(parsed(bytes(original))))
            parsed_kinds |= 1 if header.incompatible & INCOMPAT_JOURNAL else 2
            states += 1
            verify(state, shape, oracle, Random(states))

    while disk.allocator.reftable.host_offset == table and at < shape.size:
        if len(disk.allocator.pool) < 24:
            image.hook = look
        write()
    assert disk.allocator.reftable.host_offset != table, "the table has not moved"
    mark = oracle.tick()
    settle(engine, disk.flush())
    oracle.flushed = mark
    settle(engine, detach(disk))
    image.hook = None
    print(f"{states} cut states recovered")
    assert parsed_kinds == 3
    assert states > 50
    reference_counts(image)
    content = bytearray(variant.cluster_size)
    SimStorage(image, "after").read_into(content, 0)
    after = parsed(bytes(content))
    assert after.refcount_table_offset != table
    assert without_table(after) == without_table(parsed(bytes(original)))


def without_table(header: Header) -> Header:
    return replace(header, refcount_table_offset=0, refcount_table_clusters=0)
