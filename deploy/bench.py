"""Measures us against qemu-nbd: both servers in turns (A B A B) in one run, each on a fresh copy of one image.

A workload says how its image is made, which options fio gets, and which figures of fio's answer count. A figure
is the median over the rounds; the ratio is ours to qemu-nbd's, turned so that above 1 we are ahead. Absolute
figures belong to this machine and this hour; only the ratio means anything, and it only within one run.

qemu-nbd runs as somebody who wants speed runs it: `-t -e 16 -f qcow2 --cache=writeback --discard=unmap`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
BIN = TOP / ".venv" / "bin"
US, THEM = "nbd-qcow2j", "qemu-nbd"
SMALL = 512 << 20
LARGE = 4 << 30
"""Bytes of a filled image and of a backing file: they fit the page cache, and the latter is not overwritten wholly
in the seconds of a round."""

FIO = "--ioengine=nbd --name=bench --output-format=json --time_based --randrepeat=0 --norandommap --group_reporting"


@dataclass(frozen=True)
class Image:
    """How an image is made: `filled` bytes of random data, at its front; over a backing file of as many."""

    size: int
    filled: int = 0
    backing: int = 0


@dataclass(frozen=True)
class Figure:
    """One number of a workload. `wanted` is the ratio to reach."""

    name: str
    unit: str
    read: Callable[[dict[str, Any]], float]
    wanted: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Workload:
    """What is run against a server, and what of it counts."""

    name: str
    image: Image
    fio: str
    figures: list[Figure] = field(default_factory=list)
    quick: bool = True
    cold: bool = False


def rate(direction: str) -> Callable[[dict[str, Any]], float]:
    """Requests a second."""
    return lambda job: float(job[direction]["iops"])


def bandwidth(direction: str) -> Callable[[dict[str, Any]], float]:
    """MiB a second."""
    return lambda job: job[direction]["bw_bytes"] / (1 << 20)


def flush(which: str) -> Callable[[dict[str, Any]], float]:
    """A flush's latency in milliseconds: `mean`, `max` or a percentile."""

    def read(job: dict[str, Any]) -> float:
        seen = job["sync"]["lat_ns"]
        value = seen[which] if which in seen else seen["percentile"][which]
        return float(value) / 1e6

    return read


EMPTY = Image(16 << 30)
FILLED = Image(SMALL, filled=SMALL)
BACKED = Image(LARGE, backing=LARGE)


def writes(wanted: float, name: str = "writes") -> Figure:
    return Figure(name, "1/s", rate("write"), wanted)


WORKLOADS = [
    Workload("allocating, flush each", EMPTY, "--rw=randwrite --bs=4k --iodepth=1 --fsync=1",
             [writes(3), Figure("flush p99", "ms", flush("99.000000"), 1, False)]),
    Workload("allocating, flush each, 4 clients", EMPTY, "--rw=randwrite --bs=4k --iodepth=1 --fsync=1 --numjobs=4",
             [writes(4)]),
    Workload("allocating, depth 16, flush every 32", EMPTY, "--rw=randwrite --bs=4k --iodepth=16 --fsync=32",
             [writes(5), Figure("flush p99", "ms", flush("99.000000"), 10, False),
              Figure("flush mean", "ms", flush("mean"), 5, False),
              Figure("longest flush", "ms", flush("max"), 10, False)]),
    Workload("sequential over backing, flush every 64", BACKED, "--rw=write --bs=4k --iodepth=1 --fsync=64",
             [writes(3)]),
    Workload("the same, depth 16", BACKED, "--rw=write --bs=4k --iodepth=16 --fsync=64", [writes(3)]),
    Workload("random over backing, depth 16, flush every 256", BACKED,
             "--rw=randwrite --bs=4k --iodepth=16 --fsync=256", [writes(2)]),
    Workload("overwrites, flush each", FILLED, "--rw=randwrite --bs=4k --iodepth=1 --fsync=1", [writes(1.5)]),
    Workload("overwrites, depth 16", FILLED, "--rw=randwrite --bs=4k --iodepth=16", [writes(1.2)]),
    Workload("random reads, depth 1", FILLED, "--rw=randread --bs=4k --iodepth=1",
             [Figure("reads", "1/s", rate("read"), 1.3)]),
    Workload("random reads, depth 16", FILLED, "--rw=randread --bs=4k --iodepth=16",
             [Figure("reads", "1/s", rate("read"), 1.2)]),
    Workload("random reads, depth 16, cold", FILLED, "--rw=randread --bs=4k --iodepth=16",
             [Figure("reads", "1/s", rate("read"), 1.0)], cold=True),
    Workload("sequential reads, 256 KiB", FILLED, "--rw=read --bs=256k --iodepth=4",
             [Figure("reads", "MiB/s", bandwidth("read"), 1.2)]),
    Workload("sequential writes, 256 KiB, empty", EMPTY, "--rw=write --bs=256k --iodepth=4",
             [Figure("writes", "MiB/s", bandwidth("write"), 1.2)]),
    Workload("sequential writes, 1 MiB, empty", EMPTY, "--rw=write --bs=1m --iodepth=4",
             [Figure("writes", "MiB/s", bandwidth("write"), 1.2)]),
    Workload("mixed 70/30, depth 8, flush every 64", FILLED,
             "--rw=randrw --rwmixread=70 --bs=4k --iodepth=8 --fsync=64",
             [Figure("reads", "1/s", rate("read"), 1.5), writes(1.5)]),
    Workload("trim, 64 KiB", FILLED, "--rw=trim --bs=64k --iodepth=4 --time_based=0",
             [Figure("trims", "1/s", rate("trim"), 1.0)]),
    Workload("longest flush in 60 s", EMPTY, "--rw=randwrite --bs=4k --iodepth=16 --fsync=32 --runtime=60",
             [writes(5), Figure("flush p99", "ms", flush("99.000000"), 10, False),
              Figure("longest flush", "ms", flush("max"), 10, False)], quick=False),
    Workload("steady state, 10 minutes", EMPTY,
             "--rw=randwrite --bs=4k --iodepth=16 --fsync=32 --size=4g --runtime=600 --write_iops_log={log}/iops "
             "--log_avg_msec=1000 --per_job_logs=0",
             [writes(1)], quick=False),
]  # fmt: skip


# ---- images and servers


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {shlex.join(str(word) for word in words)}: {done.stdout}{done.stderr}")
    return done.stdout


class Images:
    """Makes each image once, and gives fresh copies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: dict[Image, Path] = {}

    def _random_file(self, size: int) -> Path:
        """A raw file of random data; it repeats, which no server can know."""
        path = self.directory / f"random-{size}.raw"
        if not path.exists():
            block = os.urandom(64 << 20)
            with path.open("wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
        return path

    def _make(self, image: Image) -> Path:
        path = self.directory / f"master-{len(self.made)}.qcow2"
        if image.filled:
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self._random_file(image.filled), path)
        elif image.backing:
            base = self._random_file(image.backing)
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, image.size)
        else:
            run("qemu-img", "create", "-q", "-f", "qcow2", path, image.size)
        return path

    def fresh(self, image: Image) -> Path:
        if image not in self.made:
            self.made[image] = self._make(image)
        path = self.directory / "disk.qcow2"
        path.unlink(missing_ok=True)
        shutil.copyfile(self.made[image], path)
        # What the copy has to write is not the server's to pay for.
        os.sync()
        return path


def _resident(pid: int) -> float:
    """Peak resident memory in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextmanager
def serving(name: str, image: Path, directory: Path, memory: dict[str, float]) -> Iterator[str]:
    """A server of the image; gives its URI, ends it, keeps its peak memory."""
    path = directory / "socket"
    path.unlink(missing_ok=True)
    words: list[object] = (
        [BIN / "nbd-qcow2j", "serve", image, "--socket", path]
        if name == US
        else ["qemu-nbd", "-t", "-e", "16", "-f", "qcow2", "--cache=writeback", "--discard=unmap", "-k", path, image]
    )
    with subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        uri = f"nbd+unix:///?socket={path}"
        deadline = time.monotonic() + 30
        while subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise SystemExit(f"bench: {name} does not answer: {server.stderr.read() if server.stderr else ''}")
            time.sleep(0.02)
        try:
            yield uri
            memory[name] = max(memory.get(name, 0.0), _resident(server.pid))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def measure(workload: Workload, name: str, images: Images, seconds: float, memory: dict[str, float]) -> dict[str, Any]:
    """One round with one server: fio's answer."""
    image = images.fresh(workload.image)
    with serving(name, image, images.directory, memory) as uri:
        if workload.cold:
            run("sync")
            with open("/proc/sys/vm/drop_caches", "w") as control:
                control.write("1")
        log = images.directory / name
        options = workload.fio.replace("{log}", str(log))
        if "{log}" in workload.fio:
            log.mkdir(exist_ok=True)
        words = ["fio", *FIO.split(), f"--uri={uri}", f"--runtime={seconds}", *options.split()]
        if "--size=" not in options:
            words.append(f"--size={min(workload.image.size, 16 << 30)}")
        output = run(*words)
    # fio's nbd engine says something before and sometimes after its JSON.
    job: dict[str, Any] = json.JSONDecoder().raw_decode(output[output.index("{") :])[0]["jobs"][0]
    return job


# ---- the run and what it prints


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy/bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the workloads that take seconds, 3 rounds of 4 s each")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="workloads with NAME in their name")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each server (default 5, 3 with --quick)")
    parser.add_argument("--seconds", type=float, metavar="S", help="seconds of each round (default 10, 4 with --quick)")
    parser.add_argument("--json", metavar="FILE", help="write all figures of all rounds there")
    parser.add_argument(
        "--directory", metavar="DIR", default=TOP / ".cache" / "bench", type=Path,
        help="where the images lie: a directory on the disk to be measured (default .cache/bench)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the workloads")
    return parser.parse_args()


def main() -> int:
    options = parse()
    chosen = [
        each
        for each in WORKLOADS
        if (not options.only or any(part in each.name for part in options.only)) and (each.quick or not options.quick)
    ]
    if options.list:
        print("\n".join(each.name for each in WORKLOADS))
        return 0
    if not chosen:
        raise SystemExit("bench: no workload has such a name; --list lists them")
    rounds = options.rounds or (3 if options.quick else 5)
    seconds = options.seconds or (4 if options.quick else 10)
    options.directory.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        images = Images(Path(scratch))
        print(f"{'':50} {US:>12} {THEM:>12}  ratio  wanted", flush=True)
        for workload in chosen:
            if workload.cold and not os.access("/proc/sys/vm/drop_caches", os.W_OK):
                print(f"{workload.name:50} left out: only root can drop the page cache")
                continue
            answers: dict[str, list[dict[str, Any]]] = {US: [], THEM: []}
            for _ in range(rounds):
                for name in (US, THEM):
                    answers[name].append(measure(workload, name, images, seconds, memory))
            for figure in workload.figures:
                results.append(show(workload, figure, answers))
    print(f"{'peak memory, MiB':50} {memory[US]:12.0f} {memory[THEM]:12.0f}")
    if options.json:
        answer = {"rounds": rounds, "seconds": seconds, "memory_mib": memory, "figures": results}
        Path(options.json).write_text(json.dumps(answer, indent=1) + "\n")
    return 0


def show(workload: Workload, figure: Figure, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print one line, and return it for the JSON."""
    all_rounds = {name: [figure.read(job) for job in jobs] for name, jobs in answers.items()}
    ours, theirs = (statistics.median(all_rounds[name]) for name in (US, THEM))
    ratio = (ours / theirs if figure.higher_is_better else theirs / ours) if ours and theirs else 0.0
    label = f"{workload.name}: {figure.name}, {figure.unit}"
    print(f"{label:50} {ours:12.2f} {theirs:12.2f} {ratio:6.2f}  {figure.wanted:g}", flush=True)
    return {
        "workload": workload.name, "figure": figure.name, "unit": figure.unit, "rounds": all_rounds,
        "median": {US: ours, THEM: theirs}, "ratio": ratio, "wanted": figure.wanted,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
