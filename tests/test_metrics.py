"""`/metrics` of a real server: every name is there, and the values move as the requests did, to the byte.

The work is done by libnbd, one request a call, so that what is counted is known exactly.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import pytest
from conftest import PROGRAM, Server, free_port, is_attached, poll, run
from prometheus_client.parser import text_string_to_metric_families

from nbd_qcow2j.counters import Histogram, OperationCounters
from nbd_qcow2j.driver import open_device
from nbd_qcow2j.metrics import ACCEPT_AGAIN_SECONDS, STATES, DeviceCollector, start_metrics
from nbd_qcow2j.options import parse_options

nbd = pytest.importorskip("nbd", reason="libnbd's Python binding: deploy/setup --test makes it visible")

CLUSTER = 1 << 16
OPERATIONS = ("read", "write", "flush", "trim", "write_zeroes", "cache", "block_status")
# The background does nothing on its own accord.
QUIET = ("--commit-interval", "60", "--checkpoint-interval", "600")


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        text: str = reply.read().decode()
        return text


def values(port: int) -> dict[str, float]:
    """Every sample by its name without the prefix, and its labels, a bucket's bound last: `requests_total read`."""
    found = {}
    for family in text_string_to_metric_families(fetch(port)):
        for sample in family.samples:
            labels = sorted(sample.labels, key="le".__eq__)
            name = sample.name.removeprefix("nbd_qcow2j_")
            found[" ".join((name, *(sample.labels[label] for label in labels)))] = sample.value
    return found


@pytest.fixture
def measured(serve: Callable[..., Server]) -> Callable[..., tuple[Server, int]]:
    """measured(IMAGE, *options): a server with metrics, and their port."""

    def start(image: Path, *options: object) -> tuple[Server, int]:
        port = free_port()
        return serve(image, "--metrics", port, *options), port

    return start


def test_every_metric_is_there_and_named_as_prometheus_wants(image: Path, measured: Any) -> None:
    server, port = measured(image)
    handle = server.connect()
    handle.pwrite(b"x" * 4096, 0)
    handle.flush()
    text = fetch(port)
    checked = subprocess.run(
        [PROGRAM.with_name("promtool"), "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    kinds = {family.name.removeprefix("nbd_qcow2j_"): family.type for family in text_string_to_metric_families(text)}
    assert kinds == {
        "requests": "counter", "request_bytes": "counter", "request_errors": "counter",
        "request_duration_seconds": "histogram", "requests_in_flight": "gauge",
        "commits": "counter", "commit_bytes": "counter", "commit_pages": "histogram",
        "commit_duration_seconds": "histogram", "fsync_duration_seconds": "histogram",
        "journal_size_bytes": "gauge", "journal_used_bytes": "gauge",
        "pending_bytes": "gauge", "oldest_pending_age_seconds": "gauge", "pool_clusters": "gauge",
        "checkpoints": "counter", "checkpoint_clusters": "counter", "checkpoint_bytes": "counter",
        "checkpoint_starvations": "counter",
        "checkpoint_duration_seconds": "histogram", "copy_on_write_read_bytes": "counter",
        "clusters_allocated": "counter", "clusters_freed": "counter", "replayed_transactions": "counter",
        "device_state": "gauge", "build_info": "gauge",
    }  # fmt: skip
    for name in ("requests_total", "request_errors_total", "requests_in_flight"):
        assert {f"{name} {operation}" for operation in OPERATIONS} <= values(port).keys()


def test_requests_bytes_and_errors_are_counted_exactly(image: Path, measured: Any) -> None:
    # An L2 entry that names no cluster boundary: reads below it are refused, and the device is well.
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {2 * CLUSTER}", image)
    with image.open("r+b") as file:
        file.seek(40)
        file.seek(struct.unpack(">Q", file.read(8))[0])
        table = struct.unpack(">Q", file.read(8))[0] & ~(1 << 63)
        file.seek(table + 8)
        file.write(struct.pack(">Q", 1 << 63 | CLUSTER * 5 + 512))
    server, port = measured(image)
    before = values(port)
    assert before["requests_total read"] == 0, "the greeting is no request"
    handle = server.connect("base:allocation")
    for number in range(5):
        handle.pwrite(b"w" * 5000, (number + 2) * CLUSTER + 100)
    handle.pwrite(b"f" * 4096, 8 * CLUSTER, nbd.CMD_FLAG_FUA)
    for number in range(3):
        handle.pread(100 + number, 2 * CLUSTER + number)
    for _ in range(2):
        handle.flush()
    handle.trim(CLUSTER, 3 * CLUSTER)
    handle.zero(2 * CLUSTER, 4 * CLUSTER)
    handle.cache(8192, 0)
    handle.block_status(CLUSTER, 2 * CLUSTER, lambda *_: 0)
    for _ in range(4):
        with pytest.raises(nbd.Error):
            handle.pread(512, CLUSTER)
    now = values(port)
    expected = {
        "read": (3, 303), "write": (6, 25000 + 4096), "flush": (2, 0), "trim": (1, CLUSTER),
        "write_zeroes": (1, 2 * CLUSTER), "cache": (1, 8192), "block_status": (1, CLUSTER),
    }  # fmt: skip
    for name, (requests, size) in expected.items():
        assert (now[f"requests_total {name}"], now[f"request_bytes_total {name}"]) == (requests, size), name
        assert now[f"request_duration_seconds_count {name}"] == requests
        assert now[f"request_duration_seconds_bucket {name} +Inf"] == requests
        assert now[f"request_errors_total {name}"] == (4 if name == "read" else 0)
        assert (now[f"request_duration_seconds_sum {name}"] > 0) is (requests > 0)
    assert now["device_state serving"] == 1, "damage that a read finds does not latch"


def test_the_journal_and_what_is_pending_are_what_was_written(image: Path, measured: Any) -> None:
    server, port = measured(image, *QUIET, "--journal-size", "1M")
    handle = server.connect()
    before = values(port)
    assert (before["pending_bytes"], before["oldest_pending_age_seconds"], before["commits_total"]) == (0, 0, 0)
    assert before["journal_size_bytes"] == 1 << 20
    wrote = time.monotonic()
    for number in range(6):
        handle.pwrite(b"x" * 4096, number * CLUSTER)
    written = time.monotonic()
    handle.flush()
    handle.flush()
    asked = time.monotonic()
    now = values(port)
    answered = time.monotonic()
    # Six pages in one transaction, and a flush with nothing to do commits nothing.
    assert (now["commits_total"], now["commit_pages_count"], now["commit_pages_sum"]) == (1, 1, 6)
    assert now["commit_duration_seconds_count"] == 1
    assert 6 * 4096 < now["commit_bytes_total"] <= 6 * 4096 + 8192
    assert now["journal_used_bytes"] == now["commit_bytes_total"]
    assert now["pending_bytes"] == 6 * 4096
    # The age is that of the oldest: from before the first write returned till the scrape, and it grows.
    assert asked - written <= now["oldest_pending_age_seconds"] <= answered - wrote
    handle.pwrite(b"y" * 4096, 0)
    again = values(port)
    assert again["oldest_pending_age_seconds"] > now["oldest_pending_age_seconds"], "younger data does not hide it"
    assert again["pending_bytes"] == now["pending_bytes"]


def test_a_checkpoint_is_seen_with_what_it_copied_and_allocated(
    make_image: Callable[..., Path], measured: Any, tmp_path: Path
) -> None:
    (tmp_path / "base").write_bytes(b"b" * (16 * CLUSTER))
    image = make_image(size="1M", backing_file="base", backing_fmt="raw")
    server, port = measured(image, "--checkpoint-interval", "0.1")
    handle = server.connect()
    for number in range(3):
        handle.pwrite(b"x" * 4096, number * CLUSTER + 8192)
    handle.pwrite(b"w" * CLUSTER, 8 * CLUSTER)
    handle.flush()
    now = poll(lambda: (seen := values(port))["pending_bytes"] == 0 and seen, what="everything goes home")
    assert now["checkpoint_clusters_total"] == 3
    assert now["copy_on_write_read_bytes_total"] == 3 * CLUSTER, "what was wholly overwritten is not read"
    assert now["checkpoint_bytes_total"] >= 3 * CLUSTER
    assert now["clusters_allocated_total"] == 5, "four clusters and their L2 table"
    assert now["clusters_freed_total"] == 0
    assert now["checkpoints_total"] == now["checkpoint_duration_seconds_count"] >= 1
    assert now["fsync_duration_seconds_count"] >= 1
    assert now["oldest_pending_age_seconds"] == 0
    # Over a backing file zeros are said by the entry: the cluster itself is free.
    handle.trim(CLUSTER, 8 * CLUSTER)
    handle.flush()
    assert values(port)["clusters_freed_total"] == 1


def test_what_was_replayed_after_a_kill_is_told(image: Path, serve: Any, measured: Any) -> None:
    server = serve(image, *QUIET)
    handle = server.connect()
    for number in range(3):
        handle.pwrite(b"x" * 4096, number * CLUSTER)
        handle.flush()
    server.kill()
    listed = run(PROGRAM, "journal", "--json", image).stdout.splitlines()
    _, port = measured(image, *QUIET)
    now = values(port)
    assert now["replayed_transactions_total"] == len(listed) == 3
    assert now["pending_bytes"] == 3 * 4096
    assert now["journal_used_bytes"] > 0
    assert 0 < now["oldest_pending_age_seconds"] < 3600, "as old as the replay, not as the machine"


def test_requests_under_way_are_seen_and_then_gone(image: Path, measured: Any) -> None:
    server, port = measured(image)
    stop = threading.Event()

    def read() -> None:
        handle = server.connect()
        while not stop.is_set():
            handle.pread(32 << 20, 0)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for each in threads:
        each.start()
    try:
        poll(lambda: values(port)["requests_in_flight read"] > 0, what="a read under way is seen", seconds=60)
        assert values(port)["requests_in_flight write"] == 0
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert values(port)["requests_in_flight read"] == 0


def listening(port: int) -> set[str]:
    """The IPv4 addresses on which somebody listens at `port`, as the kernel writes them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {line[1].split(":")[0] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A"}


def test_the_port_is_loopback_unless_told_otherwise(image: Path, serve: Any) -> None:
    port = free_port()
    server = serve(image, "--metrics", port)
    assert listening(port) == {"0100007F"}
    server.stop()
    serve(image, "--metrics", f"0.0.0.0:{port}")
    assert listening(port) == {"00000000"}
    assert values(port)["device_state serving"] == 1


def test_a_path_that_is_not_metrics_is_not_found_and_the_server_goes_on(image: Path, measured: Any) -> None:
    server, port = measured(image)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/metrics", b"post"), timeout=10)
    assert values(port)["device_state serving"] == 1
    assert "Traceback" not in server.log


def test_a_scraper_that_goes_away_is_no_news(image: Path, measured: Any) -> None:
    server, port = measured(image)
    files = Path(f"/proc/{server.pid}/fd")
    before = len(list(files.iterdir()))
    for asks in (b"", b"GET /metrics HTTP/1.0\r\n\r\n"):
        for how in (0, 1):
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port)) as scraper:
                    # Closed with this it is a reset, without what was asked for is written to nobody.
                    scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", how, 0))
                    scraper.sendall(asks)
    assert values(port)["device_state serving"] == 1
    # What there is to say of one is said before it is closed.
    poll(lambda: len(list(files.iterdir())) <= before, what="all scrapers are gone")
    assert "Traceback" not in server.log and "rror" not in server.log, server.log


def test_the_size_of_an_answer_may_be_asked_for(image: Path, measured: Any) -> None:
    _, port = measured(image)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 200 and int(reply.headers["Content-Length"]) > 1000 and reply.read() == b""


# ---- Without a server -------------------------------------------------------------------------------


def states(device: Any) -> dict[str, float]:
    families = DeviceCollector(device.statistics, {}, dict).collect()
    state = next(family for family in families if family.name == "nbd_qcow2j_device_state")
    return {sample.labels["state"]: sample.value for sample in state.samples}


def test_the_state_is_serving_then_failed_and_read_only_when_it_is(image: Path) -> None:
    device = open_device(parse_options([("file", str(image))]))
    nothing = dict.fromkeys(STATES, 0)
    assert states(device) == nothing | {"serving": 1}
    device.disk.mark_corrupt("a test says so")
    assert states(device) == nothing | {"corrupt": 1}
    device.disk.log.latch(OSError(5, "Input/output error"), "commit of transaction 1")
    assert states(device) == nothing | {"failed": 1}
    with pytest.raises(Exception, match="takes no more writes"):
        device.close()
    assert is_attached(image), "a latched device is not detached"
    device = open_device(parse_options([("file", str(image)), ("read-only", "true")]))
    assert states(device) == nothing | {"read-only": 1}
    device.close()


def test_a_histogram_counts_each_value_in_the_bucket_that_prometheus_means() -> None:
    # "le": a value equal to the bound belongs to it.
    histogram = Histogram((1, 2, 4), scale=1)
    for value in (0, 1, 2, 3, 4, 5, 100):
        histogram.observe(value)
    snapshot = histogram.snapshot()
    assert (snapshot.buckets, snapshot.total) == ((2, 1, 2, 2), 115)
    counters = OperationCounters()
    for nanoseconds in (50_000, 50_001, 6_000_000_000):
        counters.observe(10, nanoseconds)
    assert (counters.requests, counters.bytes) == (3, 30)
    assert counters.snapshot().buckets[:2] == (1, 1)
    assert counters.snapshot().buckets[-1] == 1


def test_a_server_without_a_thread_for_it_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    server = start_metrics(f"127.0.0.1:{free_port()}")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", refuse)
        server.serve(lambda: pytest.fail("nobody asks"), {}, dict)
    closing = threading.Thread(target=server.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_a_scrape_for_which_there_is_no_descriptor_waits_and_keeps_no_core_busy(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepting, refused = TCPServer.get_request, []

    def get_request(server: TCPServer) -> Any:
        if len(refused) < 3:
            refused.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return accepting(server)

    monkeypatch.setattr(TCPServer, "get_request", get_request)
    device = open_device(parse_options([("file", str(image)), ("read-only", "true")]))
    port = free_port()
    server = start_metrics(f"127.0.0.1:{port}")
    try:
        server.serve(device.statistics, {}, dict)
        assert "nbd_qcow2j_device_state" in fetch(port)
        # The client is in the queue all the time: what does not wait asks for it again at once.
        assert time.monotonic() - refused[0] >= 3 * ACCEPT_AGAIN_SECONDS
    finally:
        server.close()
        device.close()
