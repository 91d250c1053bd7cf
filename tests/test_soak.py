"""Full load for minutes on a disk of 1 TiB: memory stays within its bounds, and is not still growing at the end.

Eight clients write, overwrite, trim and read single pages and whole clusters, flushing now and then, at 16,384
places spread over the whole disk: 2,048 L2 tables (128 MiB) are in use, far more than the L2 cache holds, and the
pending table and the ring are kept as full as the writer lets them be.

`SOAK_SECONDS` says how long, 600 by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, is_attached, run

MIB = 1 << 20
LOAD = """
import sys, nbd, random
uri, seed = sys.argv[1], int(sys.argv[2])
handle = nbd.NBD()
handle.connect_uri(uri)
rng = random.Random(seed)
places, stride = 16384, 64 << 20
holds = {}
turn = 0
while True:
    turn += 1
    place = rng.randrange(seed, places, 8)
    page = rng.randrange(4)
    offset = place * stride + page * 4096
    kind = rng.random()
    if kind < 0.70:
        data = (seed * 1000003 + turn).to_bytes(8, "big") * 512
        handle.pwrite(data, offset)
        holds[offset] = data
    elif kind < 0.75:
        data = (seed * 1000003 + turn).to_bytes(8, "big") * 8192
        handle.pwrite(data, place * stride)
        for each in range(4):
            holds[place * stride + each * 4096] = data[:4096]
    elif kind < 0.78:
        handle.trim(65536, place * stride)
        for each in range(4):
            holds[place * stride + each * 4096] = bytes(4096)
    elif kind < 0.97:
        assert handle.pread(4096, offset) == holds.get(offset, bytes(4096)), offset
    else:
        handle.flush()
    if turn % 64 == 0:
        print(turn, flush=True)
"""


def resident(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


@pytest.mark.sweep
def test_memory_stays_within_its_bounds_at_full_load(
    serve: Callable[..., Server], make_image: Callable[..., Path], tmp_path: Path
) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    image = make_image(size="1T")
    server = serve(image)
    started = resident(server.pid, "VmRSS")
    logs = [(tmp_path / f"load-{seed}").open("wb+") for seed in range(8)]
    load = [
        subprocess.Popen([sys.executable, "-c", LOAD, server.uri, str(seed)], stdout=log, stderr=subprocess.PIPE)
        for seed, log in enumerate(logs)
    ]
    samples: list[int] = []
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(0.2)
            samples.append(resident(server.pid, "VmRSS"))
            for each in load:
                assert each.poll() is None, (each.stderr.read() if each.stderr else b"").decode()
    finally:
        for each in load:
            each.kill()
            each.wait()
    turns = 0
    for log in logs:
        log.seek(0)
        turns += int((log.read().split() or [b"0"])[-1])
    peak = resident(server.pid, "VmHWM")
    third = len(samples) // 3
    middle, last = max(samples[third : 2 * third]), max(samples[2 * third :])
    print(
        f"{seconds:g} s, {turns} requests: RSS {started / MIB:.0f} MiB at the start, peak {peak / MIB:.0f} MiB, "
        f"highest in the middle third {middle / MIB:.0f}, in the last {last / MIB:.0f}"
    )
    # 200 MiB for the program, its tables and its threads; the ring's content (32 MiB), the pending table (64 MiB).
    assert peak < (200 + 32 + 64) * MIB
    # What grows without a bound has grown by the last third.
    assert last < middle + 32 * MIB
    server.stop(seconds=120)
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)
