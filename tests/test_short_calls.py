"""Short reads and writes and interrupted calls are no errors: a whole life of a device on a real file with both."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import is_attached, run

from nbd_qcow2j.driver import open_device
from nbd_qcow2j.options import parse_options

SIZE = 4 << 20


def live(image: Path, *, seed: int, requests: int) -> bytes:
    """Open, write of all kinds, flush, close; returns what the disk must hold."""
    rng = random.Random(seed)
    options = parse_options([("file", str(image)), ("journal-size", "256K"), ("checkpoint-interval", "0.1")])
    device = open_device(options)
    device.start()
    holds = bytearray(SIZE)
    for number in range(requests):
        offset = rng.randrange(SIZE - (256 << 10))
        length = rng.choice((1, 100, 512, 4096, 70_000, 200_000))
        kind = rng.randrange(10)
        if kind < 6:
            data = rng.randbytes(length)
            device.write(data, offset, fua=kind == 0)
            holds[offset : offset + length] = data
        elif kind < 8:
            device.write_zeroes(offset, length, may_trim=kind == 7, fast=False, fua=False)
            holds[offset : offset + length] = bytes(length)
        else:
            device.flush()
        buffer = bytearray(length)
        device.read_into(buffer, offset)
        assert buffer == holds[offset : offset + length], f"request {number}"
    device.close()
    return bytes(holds)


def assert_holds(image: Path, holds: bytes) -> None:
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.read_bytes() == holds


def test_a_device_lives_on_short_reads_and_writes(
    make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel may take or give less than it was asked for, by any amount.
    rng = random.Random(1)
    pwritev, preadv = os.pwritev, os.preadv
    short = 0

    def write_less(fd: int, buffers: Sequence[bytes], offset: int, flags: int = 0) -> int:
        nonlocal short
        data = b"".join(buffers)
        if len(data) > 1:
            short += 1
            data = data[: rng.randint(1, len(data) - 1)] if len(data) < 1 << 16 else data[: -rng.randint(1, 9000)]
        return pwritev(fd, [data], offset, flags)

    def read_less(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        nonlocal short
        view = memoryview(buffers[0]).cast("B")
        if len(view) > 1:
            short += 1
            view = view[: rng.randint(max(1, len(view) // 2), len(view) - 1)]
        return preadv(fd, [view], offset, flags)

    monkeypatch.setattr(os, "pwritev", write_less)
    monkeypatch.setattr(os, "preadv", read_less)
    image = make_image(size=str(SIZE))
    holds = live(image, seed=1, requests=100)
    monkeypatch.undo()
    print(f"{short} short calls")
    assert short > 300
    assert_holds(image, holds)


# Which calls, and which of them: every second one of each thread.
INTERRUPTED = ["pwritev,pwritev2,preadv,preadv2", "fdatasync", "fallocate,ftruncate"]


@pytest.mark.parametrize("calls", INTERRUPTED)
def test_a_device_lives_on_interrupted_calls(make_image: Callable[..., Path], tmp_path: Path, calls: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    image = make_image(size=str(SIZE))
    held, trace = tmp_path / "holds", tmp_path / "trace"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
        f"from test_short_calls import live; "
        f"Path({str(held)!r}).write_bytes(live(Path({str(image)!r}), seed=2, requests=120))"
    )
    words = ["strace", "-f", "-o", str(trace), "-e", f"trace={calls}", "-e", f"inject={calls}:error=EINTR:when=1+2"]
    done = subprocess.run([*words, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    interrupted = trace.read_text().count("(INJECTED)")
    print(f"{interrupted} calls interrupted: {calls}")
    assert interrupted > 3
    assert_holds(image, held.read_bytes())
