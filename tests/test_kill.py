"""SIGKILL at random moments under a random workload over a real socket: nothing that was flushed is lost.

The oracle is that of the engine's tests (engine.py), sector by sector. Every other server is a daemon. After each
kill the image is checked as it lies there, its journal laid over it, then attached and read; now and then it is
closed cleanly, and qemu-img must find no error and no leak.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import is_attached, run
from engine import Oracle, fill, number_of

from nbd_qcow2j.cli import main

nbd = pytest.importorskip("nbd", reason="libnbd's Python binding: deploy/setup --test makes it visible")

SECTOR = 512
SIZE = 8 << 20
IMAGES = {
    "plain": "cluster_size=65536",
    "small clusters": "cluster_size=512",
    "large clusters, refcounts of 64 bits": "cluster_size=2M,refcount_bits=64",
    "extended L2": "cluster_size=65536,extended_l2=on",
    "refcounts of 1 bit": "cluster_size=4096,refcount_bits=1",
}


class Workload(threading.Thread):
    """One connection that sends requests until the server is gone."""

    def __init__(self, uri: str, oracle: Oracle, lock: threading.Lock, seed: int) -> None:
        super().__init__()
        self.uri, self.oracle, self.lock = uri, oracle, lock
        self.rng = random.Random(seed)
        self.number = seed << 20
        self.surprise: BaseException | None = None

    def run(self) -> None:
        handle = nbd.NBD()
        try:
            handle.connect_uri(self.uri)
            while True:
                self.request(handle)
        except nbd.Error:
            pass
        except BaseException as error:
            self.surprise = error

    def request(self, handle: Any) -> None:
        rng, oracle = self.rng, self.oracle
        sectors = SIZE // SECTOR
        first = rng.randrange(sectors)
        length = min(sectors - first, rng.choice((1, 3, 8, 8, 16, 100, 600)))
        if rng.random() < 0.5:
            first -= first % 8
            length = min(max(8, length - length % 8), sectors - first)
        kind = rng.choices(("write", "fua", "zero", "trim", "flush"), (10, 2, 1, 1, 3))[0]
        offset, size = first * SECTOR, length * SECTOR
        self.number += 1
        if kind == "flush":
            with self.lock:
                began = oracle.tick()
            handle.flush()
            with self.lock:
                oracle.flushed = max(oracle.flushed, began)
            return
        if kind == "trim":
            first, length = first - first % 8, max(8, length - length % 8)
            offset, size = first * SECTOR, length * SECTOR
        with self.lock:
            started = oracle.begin(first, length, 0 if kind in ("zero", "trim") else self.number)
        if kind in ("write", "fua"):
            handle.pwrite(fill(self.number) * length, offset, nbd.CMD_FLAG_FUA if kind == "fua" else 0)
        elif kind == "zero":
            handle.zero(size, offset)
        else:
            handle.trim(size, offset)
        with self.lock:
            oracle.end(started)


def read_all(uri: str) -> list[int]:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = b"".join(bytes(handle.pread(1 << 20, at)) for at in range(0, SIZE, 1 << 20))
    handle.shutdown()
    return [number_of(data[at : at + SECTOR]) for at in range(0, SIZE, SECTOR)]


def rounds(image: Path, serve: Callable[..., Any], *, count: int, seed: int) -> None:
    rng = random.Random(seed)
    contents = [0] * (SIZE // SECTOR)
    flushes = 0
    for number in range(count):
        try:
            daemonize = number % 2 == 1
            server = serve(image, "--journal-size", rng.choice(("256K", "1M")), daemonize=daemonize)
            oracle = Oracle(contents)
            lock = threading.Lock()
            clients = [Workload(server.uri, oracle, lock, seed * 1000 + number * 4 + each) for each in range(3)]
            for each in clients:
                each.start()
            threading.Event().wait(rng.uniform(0.05, 0.5))
            server.kill()
            for each in clients:
                each.join()
                assert each.surprise is None, repr(each.surprise)
            flushes += oracle.flushed > 0
            assert_sound(image)
            server = serve(image, daemonize=not daemonize)
            contents = read_all(server.uri)
            oracle.check(contents)
            if rng.random() < 0.4 or number == count - 1:
                server.stop()
                assert not is_attached(image)
                run("qemu-img", "check", image)
            else:
                server.kill()
                assert_sound(image)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, round {number}: {error}") from None
    assert flushes > count // 2, "too few rounds had a flush: this would prove nothing"


def assert_sound(image: Path) -> None:
    """No leak and no error in what a killed server left, with its journal replayed in memory."""
    assert is_attached(image), "or nothing was killed"
    assert main(["check", str(image)]) == 0, "nbd-qcow2j check"


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_a_killed_server_has_lost_nothing_that_was_flushed(options: str, tmp_path: Path, serve: Any) -> None:
    image = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    rounds(image, serve, count=10, seed=1)


@pytest.mark.sweep
@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_a_hundred_kills(options: str, tmp_path: Path, serve: Any) -> None:
    image = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    rounds(image, serve, count=100, seed=7)
