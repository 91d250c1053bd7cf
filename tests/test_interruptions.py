"""A server that is interrupted at bad moments, and clients that come in crowds or vanish.

Promised: a clean end keeps everything that was answered; any other end keeps what was flushed; the next start
finds an image that it can serve. What nbdkit itself cannot do is allowed and said where it is met.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PLUGIN, PROGRAM, Server, answers, is_attached, poll, run
from engine import Oracle
from test_kill import SECTOR, SIZE, Workload, read_all

nbd = pytest.importorskip("nbd", reason="libnbd's Python binding: deploy/setup --test makes it visible")


def assert_plain(image: Path) -> None:
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


# ---- signals


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_signal_under_load_and_again_keeps_everything_that_was_answered(
    serve: Callable[..., Server], make_image: Callable[..., Path], how: signal.Signals
) -> None:
    # Clients write, trim, zero and flush without a pause; the signal comes twice. A clean end flushes for them.
    image = make_image(size=str(SIZE))
    contents = [0] * (SIZE // SECTOR)
    for number in range(2):
        server = serve(image, "--journal-size", "256K")
        oracle, lock = Oracle(contents), threading.Lock()
        clients = [Workload(server.uri, oracle, lock, 100 * number + each) for each in range(4)]
        for each in clients:
            each.start()
        poll(lambda oracle=oracle: oracle.now > 400, what="some requests", seconds=30)
        os.kill(server.pid, how)
        os.kill(server.pid, how)
        assert server.wait_ended() == 0, server.log
        for each in clients:
            each.join()
            assert each.surprise is None, repr(each.surprise)
        assert "Traceback" not in server.log
        assert_plain(image)
        server = serve(image)
        contents = read_all(server.uri)
        oracle.check(contents, oracle.now)
        server.stop()


ATTACH_CALLS = [("pwritev2", 1), ("pwritev2", 3), ("pwritev2", 5), ("pwritev2", 6), ("pwritev2", 7), ("fdatasync", 1),
                ("fdatasync", 2), ("fdatasync", 3), ("fdatasync", 4)]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "at"),
    [(how, each) for how, calls in (("SIGTERM", ATTACH_CALLS), ("SIGINT", ATTACH_CALLS[::3])) for each in calls],
    ids=str,
)
def test_a_signal_while_the_journal_is_attached_leaves_a_plain_image(
    image: Path, short_path: Path, serve: Callable[..., Server], how: str, at: tuple[str, int]
) -> None:
    # The signal comes with the nth write or sync of the start: zeroing the ring, header slots, header.
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path, (call, nth) = short_path / "s", at
    # What a shell starts in the background has SIGINT ignored, and so would all that these tests start.
    words: list[object] = ["env", "--default-signal", "strace", "-f", "-o", short_path / "trace", "-e", f"trace={call}"]
    words += ["-e", f"inject={call}:signal={how}:when={nth}"]
    words += [PROGRAM, "serve", image, "--socket", path, "--journal-size", "4M"]
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    if b"ptrace" in told.lower() and b"not permitted" in told:
        pytest.skip("strace may not trace here")
    assert how.encode() in (short_path / "trace").read_bytes(), "or this test would prove nothing"
    assert b"Traceback" not in told
    number = signal.Signals[how]
    assert process.returncode in (0, -number, 128 + number), told
    assert_plain(image)
    server = serve(image)
    handle = server.connect()
    handle.pwrite(b"x" * 4096, 0)
    handle.flush()
    del handle
    server.stop()
    assert_plain(image)


def test_an_ignored_signal_while_the_journal_is_attached_changes_nothing(image: Path, short_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path = short_path / "s"
    words = f"strace -f -o {short_path}/trace -e trace=pwritev2 -e inject=pwritev2:signal=SIGHUP:when=3"
    words += f" {PROGRAM} serve {image} --socket {path} -- --run 'nbdinfo --size $uri'"
    done = run("sh", "-c", f"trap '' HUP; exec {words}")
    assert b"SIGHUP" in (short_path / "trace").read_bytes(), "or this test would prove nothing"
    assert done.stdout.splitlines()[-1] == str(64 << 20)
    assert_plain(image)


def test_a_server_whose_parent_dies_detaches(image: Path, short_path: Path) -> None:
    # nbdkit's own way of being told to end.
    path = short_path / "s"
    words = ["nbdkit", "-f", "--exit-with-parent", "-U", str(path), "python", str(PLUGIN), f"file={image}"]
    code = f"import subprocess, sys; subprocess.Popen({words!r}); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        poll(lambda: answers(path), what="the server answers", seconds=30)
        assert is_attached(image)
        parent.kill()
    poll(lambda: not is_attached(image), what="it detaches", seconds=30)
    poll(lambda: run("qemu-img", "check", "-q", image, check=False).returncode == 0, what="its lock is gone")


# ---- clients


def greet(server: Server) -> socket.socket:
    """A connection that has done its handshake, for requests that libnbd would not send."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(server.path))
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
    client.recv(10, socket.MSG_WAITALL)
    return client


def write_request(number: int, offset: int, data: bytes) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, 1, number, offset, len(data)) + data


def files(server: Server) -> list[str]:
    """The open files of a server; none of one that has ended."""
    try:
        return os.listdir(f"/proc/{server.pid}/fd")
    except OSError:
        return []


def open_files(server: Server) -> int:
    """How many it has when no connection ends any more."""
    seen: list[int] = []

    def settled() -> bool:
        seen.append(len(files(server)))
        return seen[-10:] == [seen[-1]] * 10

    poll(settled, what="the last connection has ended")
    return seen[-1]


def wait_for_end_of_connection(server: Server, before: int) -> None:
    """Until its last thread has ended a connection may take the server with it; it had so many files open before."""
    poll(lambda: not server.is_running() or len(files(server)) <= before, what="the connection ends")


@pytest.mark.parametrize("sent", ["a header", "half its data", "one request", "sixteen requests"])
def test_a_client_that_vanishes_takes_nothing_flushed_with_it(
    serve: Callable[..., Server], image: Path, sent: str
) -> None:
    # With several requests under way nbdkit 1.32.4 and 1.32.5 abort (their assertion `sock >= 0`); the next start
    # replays. With one request or less the server must live.
    server = serve(image)
    keeper = server.connect()
    ends = 0
    for number in range(1, 11):
        keeper.pwrite(bytes([number]) * 8192, number * 8192)
        keeper.flush()
        requests = [write_request(each, (1 << 20) + each * 65536, b"v" * 65536) for each in range(16)]
        whole = {
            "a header": requests[0][:28], "half its data": requests[0][:30000], "one request": requests[0],
            "sixteen requests": b"".join(requests),
        }[sent]  # fmt: skip
        before = open_files(server)
        client = greet(server)
        client.sendall(whole)
        client.close()
        if sent == "sixteen requests":
            wait_for_end_of_connection(server, before)
            if not server.is_running():
                server.wait_ended()
                assert server.process.returncode == -signal.SIGABRT
                server.killed = True
                ends += 1
                server = serve(image)
                keeper = server.connect()
        for each in range(1, number + 1):
            assert keeper.pread(8192, each * 8192) == bytes([each]) * 8192
    print(f"{ends} of 10 servers aborted by nbdkit")
    assert not ends or sent == "sixteen requests"
    del keeper
    server.stop()
    assert_plain(image)


CROWD = """
import sys, nbd, random
path, first, count, requests = sys.argv[1], *map(int, sys.argv[2:])
handles = []
for number in range(first, first + count):
    handle = nbd.NBD()
    handle.connect_unix(path)
    handles.append((number, handle, {}))
rng = random.Random(first)
for turn in range(requests):
    for number, handle, holds in handles:
        page = rng.randrange(64)
        offset = number * 262144 + page * 4096
        kind = rng.randrange(8)
        if kind < 4:
            holds[page] = bytes([turn % 251, number, page, 1]) * 1024
            handle.pwrite(holds[page], offset)
        elif kind < 7:
            assert handle.pread(4096, offset) == holds.get(page, bytes(4096)), (number, page)
        elif turn % 4 == 0:
            handle.flush()
for number, handle, holds in handles:
    for page, data in holds.items():
        assert handle.pread(4096, number * 262144 + page * 4096) == data, (number, page)
    handle.flush()
    handle.shutdown()
print("well")
"""


def test_a_hundred_clients_at_once_are_all_served(serve: Callable[..., Server], image: Path) -> None:
    # Ten processes with ten connections each, 200 requests on each of these.
    server = serve(image)
    words = [sys.executable, "-c", CROWD, str(server.path)]
    crowd = [
        subprocess.Popen([*words, str(first), "10", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for first in range(0, 100, 10)
    ]
    for each in crowd:
        out, told = each.communicate(timeout=300)
        assert out == b"well\n", told.decode()
    server.stop()
    assert "Traceback" not in server.log
    assert_plain(image)


def test_clients_that_come_and_go_leave_nothing_behind(serve: Callable[..., Server], image: Path) -> None:
    # 300 short visits, some rude: the server's descriptors and threads are what they were.
    server = serve(image)
    rng = random.Random(3)

    def count(what: str) -> int:
        return len(os.listdir(f"/proc/{server.pid}/{what}"))

    answers(server.path)
    before = count("fd")
    for number in range(300):
        if rng.random() < 0.3:
            with greet(server) as client:
                client.sendall(write_request(0, 0, b"x" * 512)[: rng.choice((0, 10, 28, 100))])
        else:
            handle = server.connect()
            handle.pwrite(bytes([number % 256]) * 512, number * 512)
            handle.shutdown()
    poll(lambda: count("fd") <= before, what="all connections are closed", seconds=30)
    server.stop()
    assert_plain(image)


# ---- a disk that fails once


@pytest.mark.parametrize("call", ["fdatasync", "pwritev2"])
def test_a_disk_that_fails_for_a_moment_latches_the_server_until_it_is_started_again(
    serve: Callable[..., Server], image: Path, tmp_path: Path, call: str
) -> None:
    # From outside: while strace holds on, every such call of the server fails with EIO. Then the disk is well again,
    # and a sync would succeed: nobody may believe it.
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    server = serve(image, "--checkpoint-interval", "600")
    handle = server.connect()
    handle.pwrite(b"a" * (1 << 20), 0)
    handle.pwrite(b"b" * 4096, 2 << 20)
    handle.flush()
    log = tmp_path / "strace"
    with log.open("wb") as out:
        words = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error=EIO"]
        tracer = subprocess.Popen([*words, "-p", str(server.pid)], stderr=out)
    try:
        # "Process 123 attached with 14 threads"
        poll(lambda: tracer.poll() is not None or " attached" in log.read_text(), what="strace", seconds=60)
        if tracer.poll() is not None:
            pytest.skip(f"strace may not trace here: {log.read_text()}")
        with pytest.raises(nbd.Error) as caught:
            handle.pwrite(b"c" * (1 << 20), 4 << 20)
            handle.flush()
        assert caught.value.errno == "EIO"
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
    for request, words in (("flush", ()), ("pwrite", (b"d" * 4096, 0)), ("trim", (65536, 0))):
        with pytest.raises(nbd.Error) as caught:
            getattr(handle, request)(*words)
        assert caught.value.errno == "EIO"
    assert handle.pread(1 << 20, 0) == b"a" * (1 << 20)
    assert handle.pread(4096, 2 << 20) == b"b" * 4096
    del handle
    server.process.terminate()
    assert server.wait_ended() == 1, "a supervisor sees that it did not end well"
    assert "the device takes no more writes" in server.log
    assert "Traceback" not in server.log
    server.killed = True
    assert is_attached(image)

    server = serve(image)
    handle = server.connect()
    assert handle.pread(1 << 20, 0) == b"a" * (1 << 20)
    assert handle.pread(4096, 2 << 20) == b"b" * 4096
    handle.pwrite(b"e" * 4096, 0)
    handle.flush()
    del handle
    server.stop()
    assert_plain(image)
