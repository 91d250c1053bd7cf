"""Threads that step aside when they have answered (cpus.py), behind the real adapter, nbdkit and libnbd."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import START_SECONDS, answers, poll, write_plugin

WATCHED = """
import os, pathlib, threading, time
from nbd_qcow2j import thread_state

class Replaced:
    size, read_only, description = 1 << 20, False, "watched"
    start = close = lambda self, *cpus: None
    at_work = set()
    def block_sizes(self):
        return 1, 4096, 1 << 25
    def see(self, *args, **kwargs):
        self.at_work.add(os.sched_getscheduler(0))
    write = trim = flush = see
    def read_into(self, buffer, offset):
        self.see()
        if offset == 0:
            # As a look does that finds it to be better; and none may find otherwise.
            for each in plugin.adapter.OPERATIONS.values():
                each.on_many = lambda: None
            plugin.adapter._cpus._working = os.SCHED_BATCH
            plugin.adapter._cpus._set_policy(list(thread_state.kept.values()), os.SCHED_BATCH)
            plugin.adapter._cpus.aside = True
            self.at_work.clear()
        elif offset == 4096:
            mine, end = threading.get_native_id(), time.monotonic() + 10
            others = lambda: {os.sched_getscheduler(each) for each in thread_state.kept.values() if each != mine}
            # The one that answered before this one may be about to step aside.
            while os.SCHED_IDLE not in others() and time.monotonic() < end:
                time.sleep(0.01)
            buffer[0] = os.SCHED_IDLE in others()
        elif offset == 8192:
            buffer[0] = sum(1 << each for each in self.at_work)

def closes(really=plugin.adapter.connection_closes):
    pathlib.Path(CLOSED).write_text(str(os.sched_getscheduler(0)))
    really()

plugin.adapter.connection_closes = closes
"""


def policies(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.sched_getscheduler(int(each.name)) for each in Path(f"/proc/{pid}/task").iterdir()}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_wait_aside_and_work_at_their_own_policy(threads: int, tmp_path: Path, short_path: Path) -> None:
    # Breakage: adapter.py: if get_ident() not in ready: -> if get_ident() not in kept:
    import nbd  # noqa: PLC0415

    if os.sched_getscheduler(0) != os.SCHED_OTHER or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("under another policy, or on one CPU, threads are left as they are")
    script, path, closed = tmp_path / "watched.py", short_path / "nbd.sock", tmp_path / "closed"
    write_plugin(script, f"CLOSED = {str(closed)!r}\n" + WATCHED)
    words = ["nbdkit", "-f", "-t", str(threads), "-U", str(path), "python", str(script), "file=/dev/null"]
    with subprocess.Popen(words) as process:
        try:
            poll(lambda: answers(path), what="the server answers", seconds=START_SECONDS)
            handle = nbd.NBD()
            handle.connect_unix(str(path))
            # Most threads have had a request when it begins, as with a look.
            for _ in range(4 * threads):
                handle.pread(512, 1 << 16)
            handle.pread(512, 0)
            for _ in range(2 * threads):
                handle.pwrite(bytes(512), 0)
                handle.flush()
                handle.pread(512, 1 << 16)
                handle.trim(512, 0)
            at_work = handle.pread(512, 8192)[0]
            assert at_work == 1 << os.SCHED_BATCH, "nothing is done at idle priority"
            # One more of each, so that what answered last is not a trim.
            for _ in range(2 * threads):
                handle.pread(512, 1 << 16)
            if threads > 1:
                assert handle.pread(512, 4096)[0], "another one waits aside"
            assert os.SCHED_IDLE in policies(process.pid)
            # To send much is work: after a large request a thread stays as it was.
            poll(
                lambda: len(handle.pread(128 << 10, 1 << 16)) and os.SCHED_IDLE not in policies(process.pid),
                what="each thread has answered a large request",
            )
            handle.pread(512, 1 << 16)
            poll(lambda: os.SCHED_IDLE in policies(process.pid), what="one is aside again")
            # With one, the thread that answered closes the connection as well: and, of `nbdkit -s`, the image.
            closed.unlink(missing_ok=True)
            handle.shutdown()
            poll(lambda: closed.exists() and closed.read_text(), what="the connection is closed")
            assert int(closed.read_text()) != os.SCHED_IDLE
        finally:
            process.terminate()
