"""`create`, `info`, `check`, `journal` and `recover` on real images, for people and as JSON; qemu-img referees."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Server, is_attached, run

CLUSTER = 1 << 16
QUIET = ("--commit-interval", "60", "--checkpoint-interval", "600")


def said(command: str, *words: object) -> str:
    return run(PROGRAM, command, *words).stdout


def refused(command: str, *words: object, code: int = 1, **options: Any) -> str:
    """The one line of a command that fails."""
    done = run(PROGRAM, command, *words, check=False, **options)
    assert (done.returncode, done.stdout) == (code, ""), (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("nbd-qcow2j: ")
    return done.stderr.removeprefix("nbd-qcow2j: ").rstrip("\n")


def qemu_info(image: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", image).stdout)
    return found


@pytest.fixture
def killed(tmp_path: Path, serve: Callable[..., Server]) -> Path:
    """An image of 1 MiB whose server was killed with four transactions in the journal."""
    image = tmp_path / "killed.qcow2"
    run(PROGRAM, "create", image, "1M")
    server = serve(image, *QUIET)
    handle = server.connect()
    for number in range(3):
        handle.pwrite(b"x" * 4096, number * 2 * CLUSTER)
        handle.flush()
    # Whole clusters go past the journal: it holds the metadata, and that the page before is void.
    handle.pwrite(b"y" * CLUSTER, 0)
    handle.flush()
    server.kill()
    return image


# ---- create -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [(), ("--cluster-size", "512"), ("--cluster-size", "2M", "--refcount-bits", "1"), ("--extended-l2",)],
    ids=lambda options: " ".join(options) or "as it comes",
)
def test_qemu_finds_nothing_wrong_with_what_create_makes(options: tuple[str, ...], tmp_path: Path) -> None:
    image = tmp_path / "new.qcow2"
    assert said("create", image, "5M", *options) == f"created {image}, 5M\n"
    run("qemu-img", "check", "-q", image)
    info = qemu_info(image)
    assert info["virtual-size"] == 5 << 20
    given = dict(zip(options[::2], options[1::2], strict=False))
    assert info["cluster-size"] == {"512": 512, "2M": 2 << 20}.get(given.get("--cluster-size", ""), CLUSTER)
    assert info["format-specific"]["data"]["refcount-bits"] == int(given.get("--refcount-bits", 16))
    assert info["format-specific"]["data"]["extended-l2"] is ("--extended-l2" in options)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 5M", image)
    run("qemu-img", "check", "-q", image)


def test_an_overlay_has_the_size_of_what_lies_beneath_and_shows_it(tmp_path: Path, serve: Any) -> None:
    # The name is relative to the image, not to where the command is typed.
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.raw").write_bytes(b"b" * 1_000_000)
    run(PROGRAM, "create", "middle.qcow2", "2M", "-b", "base.raw", "-F", "raw", cwd=tmp_path)
    top = tmp_path / "sub" / "top.qcow2"
    run(PROGRAM, "create", "sub/top.qcow2", "-b", "../middle.qcow2", "-F", "qcow2", cwd=tmp_path)
    rounded = tmp_path / "rounded.qcow2"
    run(PROGRAM, "create", rounded, "-b", "base.raw", "-F", "raw")
    assert qemu_info(rounded)["virtual-size"] == 1_000_448
    info = qemu_info(top)
    assert (info["virtual-size"], info["backing-filename"], info["backing-filename-format"]) == (
        2 << 20, "../middle.qcow2", "qcow2",
    )  # fmt: skip
    handle = serve(top).connect()
    assert handle.pread(1_000_010, 0) == b"b" * 1_000_000 + bytes(10)


def test_the_size_is_that_of_the_file_that_is_served(tmp_path: Path, serve: Any) -> None:
    # Both names are there: qemu-img, as the server, takes what stands behind "file:".
    (tmp_path / "file:base.raw").write_bytes(b"w" * 4096)
    (tmp_path / "base.raw").write_bytes(b"b" * 1_000_448)
    (tmp_path / "b:1").write_bytes(b"c" * 8192)
    for name, size, content in (("file:base.raw", 1_000_448, b"b"), ("./b:1", 8192, b"c")):
        top = tmp_path / f"top-{size}.qcow2"
        run(PROGRAM, "create", top, "-b", name, "-F", "raw")
        handle = serve(top).connect()
        assert (handle.get_size(), bytes(handle.pread(1, 0))) == (size, content)


def test_create_takes_sizes_as_qemu_img_does(tmp_path: Path) -> None:
    for size, expected in (("1000000", 1_000_448), ("1.5G", 3 << 29), ("1.3M", 1_363_456)):
        image, other = tmp_path / f"{size}.qcow2", tmp_path / f"{size}.by-qemu"
        run(PROGRAM, "create", image, size)
        run("qemu-img", "create", "-q", "-f", "qcow2", other, size)
        assert qemu_info(image)["virtual-size"] == qemu_info(other)["virtual-size"] == expected


@pytest.mark.parametrize(
    "words", ["IMAGE --cluster-size 4K 1M", "--cluster-size 4K IMAGE 1M", "IMAGE 1M --cluster-size=4K"]
)
def test_options_may_stand_anywhere(words: str, tmp_path: Path) -> None:
    image = tmp_path / "new.qcow2"
    given = (str(image) if word == "IMAGE" else word for word in words.split())
    assert said("create", *given) == f"created {image}, 1M\n"
    assert (qemu_info(image)["cluster-size"], qemu_info(image)["virtual-size"]) == (4096, 1 << 20)


def test_create_never_overwrites_and_refuses_in_one_line(tmp_path: Path) -> None:
    image, base = tmp_path / "image.qcow2", tmp_path / "base.raw"
    image.write_text("precious")
    base.write_bytes(bytes(4096))
    assert refused("create", image, "1M") == f"{image}: File exists"
    assert image.read_text() == "precious"
    new = tmp_path / "new.qcow2"
    for words, expected in (
        ((new,), "size: say how large the disk is, such as 10G"),
        ((new, "1X"), "size: expected a size: a whole number of bytes, or a number with K, M, G or T, found '1X'"),
        ((new, "1.5"), "size: expected a size: a whole number of bytes, or a number with K, M, G or T, found '1.5'"),
        ((new, "1M", "-b", base), "-b and -F go together: the format of a backing file is never guessed"),
        ((new, "1M", "-b", "none", "-F", "raw"), f"{tmp_path}/none: No such file or directory"),
        ((new, "-b", "b:1", "-F", "raw"), "-b: b:1 names no file, for it begins like a protocol; ./NAME would"),
        ((new, "1M", "-b", base, "-F", "qcow2"), f"{base} is not a qcow2 image, expected 514649fb, found 00000000"),
        ((new, "1M", "--cluster-size", "3000"), "cluster size: expected a power of two from 512 to 2M, found 3000"),
        ((tmp_path / "no" / "x", "1M"), f"{tmp_path}/no/x: No such file or directory"),
        ((new, "1M", "--cluster-size", "0"), "cluster size: expected a power of two from 512 to 2M, found 0"),
        (
            (new, "9T", "--cluster-size", "4K"),
            f"size: expected at most {8 << 40} bytes with clusters of 4096 bytes; larger ones take more, up to 2M, "
            f"found {9 << 40}",
        ),
    ):
        assert refused("create", *words) == expected
        assert not new.exists()


def test_the_name_of_what_was_created_stays_on_its_line(tmp_path: Path) -> None:
    assert said("create", tmp_path / "two\nlines", "1M") == f"created {tmp_path}/two\\nlines, 1M\n"


def test_a_disk_of_no_bytes_leaks_nothing(tmp_path: Path) -> None:
    image = tmp_path / "none.qcow2"
    run(PROGRAM, "create", image, "0")
    run("qemu-img", "check", "-q", image)
    assert "virtual-size: 0" in said("info", image)


def test_what_could_not_be_created_is_not_in_the_way(tmp_path: Path) -> None:
    image = tmp_path / "new.qcow2"
    script = f"ulimit -f 100; exec {PROGRAM} create {image} 1M"
    done = run("bash", "-c", script, check=False)
    assert (done.returncode, done.stderr) == (1, f"nbd-qcow2j: {image}: File too large\n")
    assert not image.exists()


# ---- info -------------------------------------------------------------------------------------------


def test_info_says_what_qemu_says_and_what_the_journal_holds(killed: Path, tmp_path: Path) -> None:
    facts = json.loads(said("info", "--json", killed))
    assert facts["virtual-size"] == 1 << 20
    assert facts["journal"]["attached"] is True
    assert facts["journal"]["transactions"] == 4
    assert facts["journal"]["pending-pages"] == 2
    assert facts["journal"]["size"] == 32 << 20
    assert len(facts["journal"]["uuid"]) == 32
    assert "journal: attached, 4 transactions in " in said("info", killed)
    plain = tmp_path / "plain.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096,compression_type=zstd", plain, "3M")
    facts, expected = json.loads(said("info", "--json", plain)), qemu_info(plain)
    for key in ("virtual-size", "cluster-size", "format", "actual-size"):
        assert facts[key] == expected[key], key
    assert facts["compression-type"] == "zstd"
    assert facts["journal"] is None
    human = said("info", plain)
    assert "virtual-size: 3M (3145728 bytes)\n" in human
    assert human.endswith("journal: none is attached\n")
    assert "corrupt" not in human


def test_what_stands_in_the_way_of_serving_is_shown(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    run(PROGRAM, "create", image, "1M")
    data = bytearray(image.read_bytes())
    data[72:80] = (3 | 1 << 40).to_bytes(8, "big")
    image.write_bytes(data)
    facts = json.loads(said("info", "--json", image))
    assert (facts["dirty"], facts["corrupt"], facts["encrypted"]) == (True, True, False)
    assert facts["unknown-features"] == [40]
    human = said("info", image)
    assert "dirty: true\ncorrupt: true\nunknown-features: incompatible bit 40\n" in human
    data[72:80] = (3).to_bytes(8, "big")
    image.write_bytes(data)
    found = said("check", image)
    assert "is marked dirty and corrupt, and is not served for writing; check --repair all" in found
    assert "--repair all" in refused("serve", image, "--socket", tmp_path / "s")
    assert "in 1 places that change is kept" in said("check", "--repair", "all", image)
    assert "marked" not in said("check", image)


def test_names_from_an_image_stay_on_their_line(tmp_path: Path) -> None:
    image, base = tmp_path / "top.qcow2", tmp_path / "b\nsize= 1"
    base.write_bytes(bytes(4096))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", image, "1M")
    assert r"backing-filename: b\nsize= 1" in said("info", image)
    base.unlink()
    assert refused("serve", image, "--socket", tmp_path / "s").count("\n") == 0


# ---- journal ----------------------------------------------------------------------------------------


def test_journal_lists_every_transaction_with_what_is_in_it(killed: Path) -> None:
    before = killed.read_bytes()
    lines = [json.loads(line) for line in said("journal", "--json", killed).splitlines()]
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4]
    assert [line["descriptors"] for line in lines[:3]] == [
        [{"type": "guest data", "offset": number * 2 * CLUSTER, "length": 4096}] for number in range(3)
    ]
    kinds = {(each["type"], each["offset"]) for each in lines[3]["descriptors"]}
    assert ("revoke guest", 0) in kinds
    assert any(kind == "write data" for kind, _ in kinds)
    # They follow each other in the ring.
    for one, other in itertools.pairwise(lines):
        assert other["position"] == one["position"] + one["length"]
    human = said("journal", killed).splitlines()
    assert len(human) == 4
    assert human[0] == f"1 at 0, {lines[0]['length']} bytes: guest data 1 (4096 bytes)"
    assert killed.read_bytes() == before, "looking changes nothing"


def test_an_attached_journal_without_transactions_is_said_to_be_so(make_image: Callable[..., Path], serve: Any) -> None:
    image = make_image()
    serve(image).kill()
    assert said("journal", image) == f"{image} has an attached journal without transactions\n"
    assert said("journal", "--json", image) == ""


# ---- check, recover ---------------------------------------------------------------------------------


def test_check_counts_what_the_journal_holds_and_agrees_with_qemu_after_recover(killed: Path) -> None:
    report = json.loads(said("check", "--json", killed))
    assert report["journal-transactions"] == 4
    assert report["allocated-clusters"] == 1, "the two pages have no cluster yet"
    assert "attached journal of 4 transactions" in said("check", killed)
    assert said("check", "-q", killed) == ""
    assert said("recover", killed) == (
        f"{killed}: 4 transactions replayed, journal detached; it is a plain qcow2 file\n"
    )
    assert not is_attached(killed)
    run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 121 0 {CLUSTER}", killed)
    report = json.loads(said("check", "--json", killed))
    theirs = json.loads(run("qemu-img", "check", "--output=json", killed).stdout)
    for key in ("check-errors", "image-end-offset", "total-clusters", "allocated-clusters"):
        assert report[key] == theirs[key], key
    assert "journal-transactions" not in report
    assert said("recover", killed) == f"{killed} has no journal attached: there is nothing to recover\n"
    assert said("journal", "--json", killed) == ""


def test_check_tells_leaks_from_corruption_by_its_exit_code_as_qemu_does(make_image: Callable[..., Path]) -> None:
    image = make_image(size="1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", image)
    data = image.read_bytes()
    block = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
    counts = list(struct.unpack_from(">16H", data, block))
    last = max(index for index, count in enumerate(counts) if count)
    # The refcount of the data's cluster taken away; one given to a cluster that nothing refers to.
    for cluster, value, code in ((last, 0, 2), (last + 1, 1, 3)):
        changed = bytearray(data.ljust((last + 2) * CLUSTER, b"\0"))
        struct.pack_into(">H", changed, block + 2 * cluster, value)
        image.write_bytes(changed)
        assert run("qemu-img", "check", "-q", image, check=False).returncode == code, "or this test would prove nothing"
        done = run(PROGRAM, "check", image, check=False)
        assert done.returncode == code
        assert ("corruption" if code == 2 else "leaked") in done.stdout
    assert image.read_bytes() == bytes(changed), "check changes nothing"


@pytest.mark.parametrize("command", ["info", "check", "journal", "recover"])
def test_what_cannot_be_looked_into_is_one_line(
    command: str, tmp_path: Path, image: Path, serve: Callable[..., Server]
) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1 << 16))
    missing = tmp_path / "missing"
    assert refused(command, missing).startswith(f"{missing}: No such file or directory")
    code = 63 if command == "check" else 1
    assert refused(command, raw, code=code) == f"{raw} is not a qcow2 image, expected 514649fb, found 00000000"
    assert "is a directory" in refused(command, tmp_path)
    serve(image)
    assert refused(command, image).startswith(f"{image} is in use: another nbd-qcow2j writes to it")


def test_an_image_that_is_being_served_can_be_looked_at_when_that_is_asked_for(
    image: Path, serve: Callable[..., Server]
) -> None:
    handle = serve(image, *QUIET).connect()
    for number in range(3):
        handle.pwrite(b"x" * 4096, number << 20)
        handle.flush()
    lines = said("journal", "--json", "-U", image).splitlines()
    assert len([json.loads(line)["sequence"] for line in lines]) == 3
    found = json.loads(said("info", "--json", "--force-share", image))
    assert found["journal"]["transactions"] == 3
    assert "the image is being served, or was not closed cleanly" in said("info", "-U", image)
    handle.pwrite(b"x" * 4096, 0)
    handle.flush()


def test_what_nobody_wants_to_hear_is_done_all_the_same(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    for command in (f"create {image} 1M", f"check -q {image}", f"info {image}", f"recover {image}"):
        done = run("sh", "-c", f"{PROGRAM} {command} >&-", check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert qemu_info(image)["virtual-size"] == 1 << 20


def test_a_block_device_beneath_has_its_length(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(8 << 20))
    attached = run("losetup", "-f", "--show", raw, check=False)
    if attached.returncode:
        pytest.skip("no loop devices here")
    device = attached.stdout.strip()
    try:
        run(PROGRAM, "create", tmp_path / "over.qcow2", "-b", device, "-F", "raw")
        assert qemu_info(tmp_path / "over.qcow2")["virtual-size"] == 8 << 20
        run("qemu-img", "create", "-q", "-f", "qcow2", device, "3M")
        run(PROGRAM, "create", tmp_path / "over2.qcow2", "-b", device, "-F", "qcow2")
        assert qemu_info(tmp_path / "over2.qcow2")["virtual-size"] == 3 << 20
    finally:
        run("losetup", "-d", device)


def test_what_is_no_file_is_not_waited_for_as_a_backing_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    said = f"-b: {tmp_path / 'fifo'} is neither a regular file nor a block device"
    assert refused("create", tmp_path / "new.qcow2", "-b", tmp_path / "fifo", "-F", "raw") == said


def test_what_somebody_has_read_enough_of_is_no_error(killed: Path) -> None:
    done = run("sh", "-c", f"{PROGRAM} journal --json {killed} | true; {PROGRAM} info {killed} | head -1")
    assert done.stdout == f"filename: {killed}\n"
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["info"], ["check"], ["recover"], ["journal"]])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_name_with_a_newline_stays_on_its_line(tmp_path: Path, command: list[str], content: bytes | None) -> None:
    path = tmp_path / "two\nlines"
    if content is None:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    elif content:
        path.write_bytes(content)
    done = run(PROGRAM, *command, path, check=False)
    said = done.stdout + done.stderr
    assert "two\nlines" not in said
    assert r"two\nlines" in said


def test_a_name_that_is_not_text_is_shown_by_its_bytes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9")
    said = run(PROGRAM, "info", path, check=False).stderr
    assert rf"{tmp_path}/caf\xe9: No such file or directory" in said
