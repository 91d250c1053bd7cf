"""However the server is asked to end, and whatever its clients do, it ends at once and leaves a plain image.

nbdkit on its own waits for its clients: these tests fail by timeout without lifecycle.py.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import PLUGIN, PROGRAM, SAID_ALL, Server, answers, free_port, is_attached, poll, run

from nbd_qcow2j import lifecycle

SIGNALS = [signal.SIGTERM, signal.SIGINT]
# What the issue allows besides the checkpoint, which has almost nothing to do here.
STOP_SECONDS = 2.0

BUSY = """
import sys, nbd
handle = nbd.NBD()
handle.connect_unix(sys.argv[1])
data = bytes(range(256)) * 16
number = 0
while True:
    handle.pwrite(data, number % 4096 * 4096)
    if number % 16 == 15:
        handle.flush()
    if number == 64:
        print("busy", flush=True)
    number += 1
"""


@contextmanager
def idle_client(server: Server) -> Iterator[None]:
    """Connected, has written and flushed, and asks for nothing more: what /dev/nbd0 does most of the time."""
    handle = server.connect()
    handle.pwrite(b"x" * 4096, 0)
    handle.flush()
    yield
    del handle


@contextmanager
def busy_client(server: Server) -> Iterator[None]:
    """Writes without a pause, in a process of its own, till it is cut off."""
    words = [sys.executable, "-c", BUSY, str(server.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        yield
        assert process.wait(10) == 1, "the client's connection went away under it"


@contextmanager
def deep_client(server: Server) -> Iterator[None]:
    """Keeps 16 requests of 64 KiB under way: some are half received when the signal comes."""
    words = ["fio", "--name=deep", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw", "--bs=64k", "--iodepth=16"]
    words += ["--time_based", "--runtime=60", "--size=16m"]
    handle = server.connect()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            poll(lambda: handle.pread(16 << 20, 0) != bytes(16 << 20), what="fio's first write")
            yield
            assert process.wait(10) != 0, "the client's connection went away under it"
        finally:
            process.kill()


@contextmanager
def deaf_client(server: Server) -> Iterator[None]:
    """Has asked for 64 MiB and reads none of it: the server's threads wait in `send`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(server.path))
        client.recv(18, socket.MSG_WAITALL)
        # The old way to choose an export ends the handshake in one step; the answer is its size and flags.
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        client.recv(10, socket.MSG_WAITALL)
        for number in range(64):
            client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, 0, 1 << 20))
        assert client.recv(1, socket.MSG_PEEK), "replies have begun to come"
        yield


@contextmanager
def no_client(server: Server) -> Iterator[None]:
    """Nobody has ever been there."""
    yield


def assert_plain(image: Path) -> None:
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


CLIENTS = [no_client, idle_client, busy_client, deep_client, deaf_client]


@pytest.mark.parametrize("daemonize", [False, True], ids=["foreground", "daemon"])
@pytest.mark.parametrize(
    ("client", "how"),
    [
        *((client, how) for client in CLIENTS for how in SIGNALS),
        # A closed terminal, and Ctrl-\\: nbdkit ends on them too.
        (idle_client, signal.SIGHUP), (idle_client, signal.SIGQUIT),
    ],
)  # fmt: skip
def test_a_signal_ends_the_server_and_detaches(
    serve: Callable[..., Server], image: Path, client: Callable, daemonize: bool, how: signal.Signals
) -> None:
    server = serve(image, daemonize=daemonize)
    assert is_attached(image), "or this test would prove nothing"
    with client(server):
        began = time.monotonic()
        server.stop(how)
        assert time.monotonic() - began < STOP_SECONDS
    assert_plain(image)
    assert not server.path.exists()


def test_many_clients_of_every_kind_do_not_hold_the_server(serve: Callable[..., Server], image: Path) -> None:
    server = serve(image)
    with ExitStack() as stack:
        for client in (idle_client, busy_client, idle_client, deaf_client, deep_client):
            stack.enter_context(client(server))
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < STOP_SECONDS
    assert_plain(image)


def test_signals_that_come_while_it_ends_change_nothing(serve: Callable[..., Server], image: Path) -> None:
    # An impatient person presses Ctrl-C three times; systemd sends SIGTERM after it.
    server = serve(image)
    with idle_client(server):
        for how in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(server.pid, how)
        while server.is_running():
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.001)
    assert server.process.returncode == 0
    assert "Traceback" not in server.log
    assert_plain(image)


def test_a_tcp_client_is_let_go_as_well(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image, port = make_image(), free_port()
    words = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "python", str(PLUGIN), f"file={image}"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            client = poll(lambda: _dial(port), what="the server listens")
            with client:
                assert client.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
                process.terminate()
                assert process.wait(STOP_SECONDS) == 0
                assert client.recv(1) == b""
        finally:
            process.kill()
    assert_plain(image)


def _dial(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port), timeout=10)
    except ConnectionRefusedError:
        return None


def test_only_what_was_accepted_from_nbdkits_sockets_is_shut(short_path: Path) -> None:
    # Beside the listening socket of the NBD server: another one with its connection, a pair, a client of somebody.
    path = short_path / "nbd.sock"
    with ExitStack() as stack:
        stopper = lifecycle.Stopper(shutdown=lambda: None, leave=lambda: None)
        with stopper.own_listeners():
            metrics = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        nbd = stack.enter_context(socket.socket(socket.AF_UNIX))
        nbd.bind(str(path))
        nbd.listen()

        addresses = stopper.nbd_addresses()
        assert (socket.AF_UNIX, str(path)) in addresses
        assert (socket.AF_INET, metrics.getsockname()[1]) not in addresses

        nbd_client = stack.enter_context(socket.socket(socket.AF_UNIX))
        nbd_client.connect(str(path))
        accepted = stack.enter_context(nbd.accept()[0])
        scraper = stack.enter_context(socket.create_connection(metrics.getsockname()))
        scraped = stack.enter_context(metrics.accept()[0])
        one, other = socket.socketpair()
        stack.enter_context(one)
        stack.enter_context(other)
        for each in (accepted, scraped, other, nbd_client):
            each.settimeout(5)

        # Something has arrived that is not yet read: a request may be under way.
        nbd_client.sendall(b"request")
        assert not lifecycle.shut_idle(addresses, lifecycle.shut_idle(addresses, set()))
        assert accepted.recv(7) == b"request"

        empty = lifecycle.shut_idle(addresses, set())
        assert len(empty) == 1, "one look is not enough"
        lifecycle.shut_idle(addresses, empty)

        assert accepted.recv(1) == b"", "a thread that waits for a request sees the end"
        accepted.sendall(b"reply")
        assert nbd_client.recv(5) == b"reply", "and one at work can still answer"
        scraper.sendall(b"GET")
        assert scraped.recv(3) == b"GET"
        one.sendall(b"pair")
        assert other.recv(4) == b"pair"


def test_the_socket_file_of_another_server_stays(short_path: Path) -> None:
    # Ours was removed by somebody and its name taken by another server before we ended.
    path = short_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as ours, socket.socket(socket.AF_UNIX) as theirs:
        ours.bind(str(path))
        mine = lifecycle.SocketFile(str(path))
        path.rename(path.with_suffix(".old"))
        theirs.bind(str(path))
        mine.remove()
        assert path.exists()
        lifecycle.SocketFile(str(path)).remove()
        assert not path.exists()


def test_the_server_ends_when_nbdkit_wants_it_without_a_signal(image: Path, short_path: Path, tmp_path: Path) -> None:
    # `--run`: nbdkit ends by itself when the command has ended; then `cleanup` is all that is called.
    path = short_path / "nbd.sock"
    command = f"qemu-io -f raw -c 'write -P 7 0 64k' -c flush '{f'nbd+unix:///?socket={path}'}'"
    run("nbdkit", "-f", "-U", path, "--run", command, "python", PLUGIN, f"file={image}", timeout=30)
    assert not answers(path)
    assert_plain(image)
    assert "Pattern verification failed" not in run("qemu-io", "-r", "-c", "read -P 7 0 64k", image).stdout


def test_clients_that_take_all_descriptors_do_not_hold_the_server(serve: Callable[..., Server], image: Path) -> None:
    server = serve(image)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (64, 64))
    with ExitStack() as clients:
        clients.enter_context(idle_client(server))
        for _ in range(64):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(1)
            client.connect(str(server.path))
            try:
                refused = not client.recv(18)
            except (TimeoutError, ConnectionError):
                refused = True
            if refused:
                break
        assert refused and len(os.listdir(f"/proc/{server.pid}/fd")) > 55
        server.stop(seconds=STOP_SECONDS)
    assert "Traceback" not in server.log
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


@pytest.mark.parametrize("descriptors", [8, 11, 14, 20, 26, 38])
def test_a_start_with_too_few_descriptors_leaves_a_plain_image(
    descriptors: int, image: Path, short_path: Path, tmp_path: Path
) -> None:
    path, log = short_path / "s", tmp_path / "log"
    with log.open("wb") as out:
        words = ["prlimit", f"--nofile={descriptors}", PROGRAM, "serve", image, "--socket", path]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    # It fails, or serves: where what is there is enough for one client it also ends as it should.
    poll(lambda: process.poll() is not None or SAID_ALL in log.read_text(), what="a failure or a server", seconds=30)
    if process.poll() is None:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    else:
        assert process.returncode == 1 and "Too many open files" in log.read_text(), log.read_text()
    assert "Traceback" not in log.read_text()
    assert not is_attached(image)
    assert not path.exists()
    run("qemu-img", "check", "-q", image)


def test_a_socket_file_that_may_not_be_removed_is_no_reason_not_to_go_on(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with nbdkit's --user, in a directory that is not that user's.
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "s"))
        found = lifecycle.SocketFile(str(short_path / "s"))
        monkeypatch.setattr(os, "unlink", refuse)
        found.remove()
        monkeypatch.undo()
    assert (short_path / "s").is_socket()
