"""Threads that step aside when they have answered (cpus.py), behind the real adapter, nbdkit and libnbd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLUGIN, START_SECONDS, answers, poll

WATCHED = """
import importlib.util, os, pathlib, threading, time
spec = importlib.util.spec_from_file_location("plugin", {plugin!r})
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
from nbd_qcow2j import thread_state

class Watched:
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
            time.sleep(0.2)
            mine = threading.get_native_id()
            waiting = {{os.sched_getscheduler(each) for each in thread_state.kept.values() if each != mine}}
            buffer[0] = sum(1 << each for each in waiting)
        elif offset == 8192:
            buffer[0] = sum(1 << each for each in self.at_work)

def closes(really=plugin.adapter.connection_closes):
    pathlib.Path({closed!r}).write_text(str(os.sched_getscheduler(0)))
    really()

plugin.adapter.connection_closes = closes
plugin.adapter.open_device = lambda options: Watched()
globals().update({{name: value for name, value in vars(plugin).items() if not name.startswith("__")}})
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
    site = next(Path(sys.prefix, "lib").glob("python*/site-packages"))
    start = f"import sys; sys.path[:0] = [{str(PLUGIN.parent)!r}, {str(site)!r}]\n"
    script.write_text(start + WATCHED.format(plugin=str(PLUGIN), closed=str(closed)))
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
                waiting = handle.pread(512, 4096)[0]
                assert waiting & 1 << os.SCHED_IDLE
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
