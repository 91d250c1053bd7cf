"""Fixtures that start real servers and speak to them.

`image` is a fresh qcow2 image; `serve(IMAGE, …)` starts `nbd-qcow2j serve IMAGE --socket PATH …` and returns when
the socket answers; `server` is one that serves `image`. Whatever was started is stopped at the end of the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TOP = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).with_name("nbd-qcow2j")
PLUGIN = TOP / "plugin.py"
START_SECONDS = 30.0
STOP_SECONDS = 30.0
SAID_ALL = "Ctrl-C ends it.\n"
"""The last line that a server in the foreground prints when it serves."""


# Nothing here fails for a slow machine: no test is a test of time.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_proved: Counter[str] = Counter()


@pytest.fixture
def proved() -> Callable[[str, int], None]:
    """proved(WHAT, COUNT): add to the sums that the run prints at its end."""

    def add(what: str, count: int) -> None:
        _proved[what] += count

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the run has counted, in one line."""
    if _proved:
        sums = ", ".join(f"{count} {what}" for what, count in sorted(_proved.items()))
        terminalreporter.write_line(f"proved: {sums}")


def run(*words: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed; raises with all of it if it fails and `check` is on."""
    done = subprocess.run([str(word) for word in words], text=True, capture_output=True, check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def refused(*words: object, **options: Any) -> str:
    """What a command that must fail says: one line, without a traceback."""
    done = run(*words, check=False, timeout=30, **options)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.rstrip("\n")


def poll(condition: Callable[[], Any], *, what: str, seconds: float = 10.0) -> Any:
    """The first true value of `condition()`, looked at again and again; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return value


_REPLACED = """
import importlib.util, sys
sys.path[:0] = {path!r}
spec = importlib.util.spec_from_file_location("plugin", {plugin!r})
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
{device}
plugin.adapter.open_device = lambda options: Replaced()
globals().update({{name: value for name, value in vars(plugin).items() if not name.startswith("__")}})
"""


def write_plugin(script: Path, device: str) -> None:
    """The plugin, but its device is the class `Replaced` of this source, behind the real adapter and nbdkit."""
    site = next(Path(sys.prefix, "lib").glob("python*/site-packages"))
    script.write_text(_REPLACED.format(path=[str(TOP), str(site)], plugin=str(PLUGIN), device=device))


def answers(path: Path) -> bool:
    """Whether an NBD server answers at a Unix socket; takes its leave as the protocol wants it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(START_SECONDS)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        try:
            greeting = probe.recv(18, socket.MSG_WAITALL)
            if greeting[:16] != b"NBDMAGICIHAVEOPT":
                return False
            probe.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 2, 0))
            while probe.recv(4096):
                pass
        except ConnectionError:
            # It died while it answered.
            return False
        return True


class Server:
    """A running server, in the foreground or as a daemon."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
        self.process, self.path, self._log = process, path, log
        self.pid = process.pid
        self.daemon = False
        self.killed = False

    @property
    def uri(self) -> str:
        """Where clients find the disk."""
        return f"nbd+unix:///?socket={self.path}"

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Return when the server answers; fail with what it printed when it has ended instead."""

        def is_ready() -> bool:
            if not self.daemon and self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            return answers(self.path)

        poll(is_ready, what="the server answers", seconds=START_SECONDS)

    def is_running(self) -> bool:
        """Whether the process is there and has not ended."""
        if not self.daemon:
            return self.process.poll() is None
        try:
            # A daemon whose new parent has not yet looked is a zombie; while one of its threads is not gone, it
            # still holds its files and their locks.
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z" or len(list(Path(f"/proc/{self.pid}/task").iterdir())) > 1
        except OSError:
            return False

    def wait_ended(self, seconds: float = STOP_SECONDS) -> int | None:
        """Return the exit code when the server has ended; a daemon's is not known."""
        if self.daemon:
            poll(lambda: not self.is_running(), what="the daemon ends", seconds=seconds)
            return None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {seconds} s:\n{self.log}") from None

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = STOP_SECONDS) -> None:
        """End the server as a person would, and see that it was content."""
        if self.is_running():
            os.kill(self.pid, how)
        code = self.wait_ended(seconds)
        assert code in (0, None), f"exit code {code}:\n{self.log}"

    def kill(self) -> None:
        """SIGKILL: the server has no say in it."""
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)
        self.wait_ended()
        self.killed = True

    def connect(self, *contexts: str) -> Any:
        """A libnbd handle, with the meta contexts that are named."""
        import nbd  # noqa: PLC0415 -- not every test file needs it

        handle = nbd.NBD()
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_unix(str(self.path))
        return handle


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name is short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="nq-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    """make_image(size="64M", name="disk.qcow2", **options of qemu-img create): the path of a fresh image."""

    def make(size: str = "64M", name: str = "disk.qcow2", **options: object) -> Path:
        path = tmp_path / name
        words = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, size)
        return path

    return make


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    """A fresh image of 64 MiB."""
    return make_image()


@pytest.fixture
def serve(tmp_path: Path, short_path: Path) -> Iterator[Callable[..., Server]]:
    """serve(IMAGE, *options, socket=None, daemonize=False): a server that answers."""
    servers: list[Server] = []

    def start(image: Path, *options: object, socket: Path | None = None, daemonize: bool = False) -> Server:
        number = len(servers)
        path = socket or short_path / f"{number}.sock"
        log = tmp_path / f"server-{number}.log"
        words = [PROGRAM, "serve", image, "--socket", path, *options]
        if daemonize:
            pid_file = tmp_path / f"server-{number}.pid"
            words[5:5] = ["--daemonize", "--pid-file", pid_file]
        with log.open("wb") as out:
            process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        server = Server(process, path, log)
        if daemonize:
            assert process.wait(START_SECONDS) == 0, server.log
            server.daemon = True
            server.pid = int(poll(lambda: pid_file.exists() and pid_file.read_text().strip(), what="a process id"))
        servers.append(server)
        server.wait_ready()
        return server

    yield start
    failures = []
    for server in servers:
        try:
            if not server.killed:
                server.stop()
        except AssertionError as error:
            failures.append(str(error))
            with contextlib.suppress(AssertionError, OSError):
                server.kill()
    assert not failures, "\n".join(failures)


@pytest.fixture
def server(serve: Callable[..., Server], image: Path) -> Server:
    """A server of `image`, in the foreground."""
    return serve(image)


def is_attached(image: Path) -> bool:
    """Whether the image says that its journal counts: incompatible feature bit 62."""
    with image.open("rb") as file:
        features: int = struct.unpack_from(">Q", file.read(80), 72)[0]
    return bool(features >> 62 & 1)


def free_port() -> int:
    """A TCP port on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
