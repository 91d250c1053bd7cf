"""Options and images that `nbd-qcow2j serve` and plain nbdkit refuse, and how a refusal looks.

That it is one clear line is part of each test: a traceback, or a second line that says less, is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PLUGIN, PROGRAM, is_attached, refused, run

from nbd_qcow2j.options import OPTIONS


def test_plain_nbdkit_refuses_an_unknown_key_by_name(image: Path, short_path: Path) -> None:
    path = short_path / "s"
    said = refused("nbdkit", "-f", "-U", path, "python", PLUGIN, f"file={image}", "jurnal-size=1M")
    assert "unknown option jurnal-size: did you mean journal-size?" in said
    said = refused("nbdkit", "-f", "-U", path, "python", PLUGIN, f"file={image}", "commit_interval=0")
    assert "option commit-interval: expected 0.05 s to 60 s, found '0'" in said
    assert "name the image as file=PATH" in refused("nbdkit", "-f", "-U", path, "python", PLUGIN, "discard=off")
    assert not is_attached(image)


def test_serve_refuses_an_option_before_nbdkit_is_there(image: Path, short_path: Path) -> None:
    said = refused(PROGRAM, "serve", image, "--socket", short_path / "s", "--journal-size", "3")
    assert said == "nbd-qcow2j: option journal-size: expected 256K to 1G, found '3'"
    done = run(PROGRAM, "serve", image, "--socket", short_path / "s", "--jurnal-size", "1M", check=False)
    assert done.returncode == 2
    assert "--jurnal-size" in done.stderr
    said = refused(PROGRAM, "serve", image, "--port", "70000")
    assert said == "nbd-qcow2j: option port: expected 1 to 65535, found 70000"


def test_the_help_and_dump_plugin_list_every_key_with_its_default() -> None:
    dumped = run("nbdkit", "--dump-plugin", "python", PLUGIN).stdout
    helped = " ".join(run(PROGRAM, "serve", "--help", env={**os.environ, "COLUMNS": "200"}).stdout.split())
    for key in OPTIONS:
        assert f"={key}=" in dumped
        if key not in ("file", "remove-socket"):
            assert f"--{key}" in helped
    for text in ("default 32M, 256K to 1G", "default 1 s, 0.05 s to 60 s"):
        assert text in dumped
        assert text in helped


@pytest.mark.parametrize("daemonize", [[], ["--daemonize"]])
def test_too_few_descriptors_are_told_of_before_anybody_is_told_where_to_connect(
    image: Path, short_path: Path, daemonize: list[str]
) -> None:
    words = [PROGRAM, "serve", image, "--socket", short_path / "s", *daemonize]
    said = refused("prlimit", "--nofile=20:20", *words)
    assert "Too many open files: serving needs " in said
    assert not is_attached(image)


@pytest.fixture
def not_images(tmp_path: Path, image: Path) -> dict[str, Path]:
    """Files that cannot be served, by what must be said about them."""
    text = tmp_path / "text"
    text.write_text("hello" * 100)
    short = tmp_path / "short"
    short.write_bytes(image.read_bytes()[:50])
    future = tmp_path / "future"
    future.write_bytes(image.read_bytes()[:72] + b"\x20" + image.read_bytes()[73:])
    return {
        "No such file or directory": tmp_path / "missing",
        "is a directory": tmp_path,
        "qcow2": text,
        "short": short,
        "feature": future,
        "is not a regular file": Path("/dev/null"),
    }


@pytest.mark.parametrize(
    "expected", ["No such file or directory", "is a directory", "qcow2", "short", "feature", "is not a regular file"]
)
def test_a_bad_image_is_one_clear_line(not_images: dict[str, Path], short_path: Path, expected: str) -> None:
    bad = not_images[expected]
    for said in (
        refused(PROGRAM, "serve", bad, "--socket", short_path / "s"),
        refused("nbdkit", "-f", "-U", short_path / "s", "python", PLUGIN, f"file={bad}"),
    ):
        assert str(bad) in said
    assert expected.strip() in refused(PROGRAM, "serve", bad, "--socket", short_path / "s")
    assert not (short_path / "s").exists()


def refused_by_both(image: Path, path: Path, *options: str, **how: Any) -> tuple[str, str]:
    """What `serve` and plain nbdkit say about an image that cannot be served: a line each that names the file."""
    keys = [f"{key.removeprefix('--')}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    said = (
        refused(PROGRAM, "serve", image, "--socket", path, *options, **how),
        refused("nbdkit", "-f", "-U", path, "python", PLUGIN, f"file={image}", *keys, **how),
    )
    assert not path.exists()
    return said


def test_a_version_2_image_is_refused_for_writing_with_the_line_that_mends_it(
    make_image: Callable[..., Path], short_path: Path
) -> None:
    image = make_image(compat="0.10")
    for said in refused_by_both(image, short_path / "s"):
        assert said.endswith(f"read-only: qemu-img amend -f qcow2 -o compat=1.1 {image} makes it version 3")
    line = refused_by_both(image, short_path / "s")[0].rpartition(": ")[2]
    run(*line.removesuffix(" makes it version 3").split())
    assert "version 2" not in refused(PROGRAM, "serve", image, "--socket", short_path / "no" / "s")


def test_a_backing_file_that_is_not_there_is_named_before_anything_is_said_to_be_served(
    make_image: Callable[..., Path], short_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    image = make_image(size="1M", backing_file="base", backing_fmt="raw")
    (tmp_path / "base").unlink()
    for said in refused_by_both(image, short_path / "s"):
        assert said.endswith(f"backing file {tmp_path / 'base'} cannot be opened: No such file or directory")
    for said in refused_by_both(image, short_path / "s", "--backing", "deny"):
        assert said.endswith("has a backing file (base), and backing=deny refuses one")
    assert run(PROGRAM, "serve", image, "--socket", short_path / "s", check=False).stdout == ""
    assert not is_attached(image)


def test_an_image_that_qemu_writes_is_refused_and_qemu_named(image: Path, short_path: Path) -> None:
    words = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write("write 0 512\n")
        qemu.stdin.flush()
        while "wrote 512/512" not in (line := qemu.stdout.readline()):
            assert line
        for said in refused_by_both(image, short_path / "s"):
            assert f"{image} is in use: qemu" in said
        # Nobody is told that it is served.
        assert run(PROGRAM, "serve", image, "--socket", short_path / "s", check=False).stdout == ""
        qemu.communicate("quit\n")
    assert not is_attached(image)


def test_who_may_not_write_is_told_so_and_of_read_only(image: Path, short_path: Path) -> None:
    # Root may do everything, so nobody is asked.
    how = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if run(sys.executable, "-c", "import nbd_qcow2j.cli", check=False, cwd="/", **how).returncode:
        pytest.skip("the tree may not be read by others")
    short_path.chmod(0o755)
    there = short_path / "disk.qcow2"
    there.write_bytes(image.read_bytes())
    there.chmod(0o444)
    said, by_nbdkit = refused_by_both(there, short_path / "s", cwd="/", **how)
    assert said == f"nbd-qcow2j: {there}: Permission denied; served read-only it can be"
    assert f"{there}: Permission denied; served read-only it can be" in by_nbdkit
    if how:
        there.chmod(0o666)
        said = refused(PROGRAM, "serve", there, "--socket", short_path / "s", cwd="/", **how)
        assert said == f"nbd-qcow2j: option socket: no permission to make a file in {short_path}"
        assert not is_attached(there)


def test_an_image_on_a_read_only_file_system_is_refused_with_the_reason(image: Path, short_path: Path) -> None:
    mount = short_path / "m"
    mount.mkdir()
    for command in (
        f"{PROGRAM} serve {mount}/i --socket {short_path}/s",
        f"nbdkit -f -U {short_path}/s python {PLUGIN} file={mount}/i",
    ):
        made = f"mount -t tmpfs none {mount} && cp {image} {mount}/i && mount -o remount,ro {mount}"
        script = f"{made} || exit 77; {command}"
        done = run("unshare", "-m", "sh", "-c", script, check=False, timeout=30)
        if "unshare" in done.stderr or done.returncode == 77:
            pytest.skip("no mounts here")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{mount}/i: Read-only file system; " in done.stderr
        assert "read-only" in done.stderr


def test_a_pid_file_that_cannot_be_written_is_refused_before_the_daemon_is_silent(
    image: Path, short_path: Path
) -> None:
    # nbdkit writes it when it is in the background: the daemon would be gone without a word, the journal attached.
    words = (PROGRAM, "serve", image, "--socket", short_path / "s", "--daemonize", "--pid-file")
    said = refused(*words, short_path / "no" / "pid")
    assert said == f"nbd-qcow2j: option pid-file: the directory of {short_path / 'no' / 'pid'} does not exist"
    assert refused(*words, short_path) == f"nbd-qcow2j: option pid-file: {short_path} is a directory"
    assert not is_attached(image)


@pytest.mark.parametrize("kind", ["the image", "a link", "a backing file", "a fifo"])
def test_a_pid_file_that_is_something_else_is_refused_and_left_alone(
    make_image: Callable[..., Path], short_path: Path, kind: str
) -> None:
    # nbdkit truncates it: the disk would be served, and gone.
    base = make_image(name="base")
    image = make_image(backing_file="base", backing_fmt="qcow2")
    path = {"the image": image, "a backing file": base}.get(kind, short_path / "pid")
    if kind == "a link":
        path.symlink_to(image)
    elif kind == "a fifo":
        os.mkfifo(path)
    before = image.read_bytes(), base.read_bytes()
    said = refused(PROGRAM, "serve", image, "--socket", short_path / "s", "--daemonize", "--pid-file", path)
    what = "is not a regular file" if kind == "a fifo" else "is no file of a process id"
    assert said == f"nbd-qcow2j: option pid-file: {path} exists and {what}"
    assert (image.read_bytes(), base.read_bytes()) == before


@pytest.mark.parametrize(
    "words", ["-U s2", "-p 10810", "-fU s2", "-Us2", "--unix=s2", "-P p", "--pid-file p", "-s", "-i ::"]
)
def test_where_the_image_is_served_is_not_said_to_nbdkit_alone(image: Path, short_path: Path, words: str) -> None:
    # The lines to attach would lead nowhere.
    said = refused(PROGRAM, "serve", image, "--socket", short_path / "s", "--", *words.split(), cwd=short_path)
    option = "-U" if words in ("-fU s2", "-Us2") else words.split(maxsplit=1)[0].partition("=")[0]
    assert said.startswith(f"nbd-qcow2j: {option} after --: where the image is served say --socket, ")
    assert not is_attached(image) and not list(short_path.iterdir())


@pytest.mark.parametrize("option", ["socket", "pid-file"])
def test_an_empty_name_is_refused(image: Path, short_path: Path, option: str) -> None:
    words = ["--socket", ""] if option == "socket" else ["--socket", short_path / "s", f"--{option}", ""]
    assert refused(PROGRAM, "serve", image, *words) == f"nbd-qcow2j: option {option}: it is empty"
    assert refused(PROGRAM, "serve", "", "--socket", "s") == "nbd-qcow2j: IMAGE: the name is empty"


def test_without_a_place_to_listen_or_with_two_the_usage_is_shown(image: Path) -> None:
    for words in ([], ["--socket", "s", "--port", "10809"], ["--socket", "s", "--bogus"]):
        done = run(PROGRAM, "serve", image, *words, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 2
        assert done.stderr.startswith("usage: nbd-qcow2j ")
    assert not is_attached(image)


def test_the_help_says_what_the_units_are() -> None:
    helped = " ".join(run(PROGRAM, "serve", "--help").stdout.split())
    units = "SIZE is in bytes, or with K, M, G or T in powers of 1024; SECONDS may also be written as 500ms"
    assert units in helped
    assert f"nbd_qcow2j_units={units}\n" in run("nbdkit", "--dump-plugin", "python", PLUGIN).stdout
