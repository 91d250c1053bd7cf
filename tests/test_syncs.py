"""How often a flush waits for the disk, counted from outside by the system calls of a real server."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import nbd
import pytest
from conftest import Server, poll

FLUSHES = 2000
WAITS = re.compile(r"fdatasync\(|fsync\(|pwritev2\(.*RWF_DSYNC")


@pytest.fixture
def traced(tmp_path: Path) -> Callable[[Server], Callable[[], list[str]]]:
    def start(server: Server) -> Callable[[], list[str]]:
        path = tmp_path / "trace"
        tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-e", "trace=pwritev2,fsync,fdatasync,sync_file_range", "-o", path, "-p",
             str(server.pid)], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()

        def stop() -> list[str]:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=30)
            return path.read_text().splitlines()

        return stop

    return start


def test_a_flush_costs_one_synchronous_operation(
    server: Server, image: Path, traced: Callable[[Server], Callable[[], list[str]]]
) -> None:
    # Scenario: a flush after each allocating 4 KiB write, at random places of an empty image. The checkpoint goes on
    # in the background and is counted; attach and detach are not.
    rng = Random(1)
    client = nbd.NBD()
    client.connect_uri(server.uri)
    pages = client.get_size() // 4096
    client.pwrite(rng.randbytes(4096), 0)
    client.flush()
    stop = traced(server)
    poll(lambda: "TracerPid:\t0" not in Path(f"/proc/{server.pid}/status").read_text(), what="the trace begins")
    for _ in range(FLUSHES):
        client.pwrite(rng.randbytes(4096), rng.randrange(pages) * 4096)
        client.flush()
    lines = [line for line in stop() if image.name in line and WAITS.search(line)]
    client.shutdown()
    print(f"{len(lines)} synchronous operations for {FLUSHES} flushes")
    assert FLUSHES <= len(lines) <= 1.1 * FLUSHES
