"""`/metrics`: one Prometheus collector over the device's statistics and the adapter's counters.

The port is bound before the fork, so that a port in use is seen by whoever started the server; it is served after
it. Nothing is counted here: what the hot path counted is rendered when somebody scrapes.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from . import __version__
from .counters import OperationCounters, Snapshot, Statistics
from .errors import OptionError
from .options import parse_address

STATES = ("serving", "read-only", "failed", "corrupt")


def _cumulative(snapshot: Snapshot) -> list[tuple[str, float]]:
    found, count = [], 0
    for bound, bucket in zip((*map(str, snapshot.bounds), "+Inf"), snapshot.buckets, strict=True):
        count += bucket
        found.append((bound, float(count)))
    return found


class DeviceCollector(Collector):
    """Renders the state of one device."""

    def __init__(
        self,
        statistics: Callable[[], Statistics],
        operations: Mapping[str, OperationCounters],
        in_flight: Callable[[], Mapping[str, int]],
    ) -> None:
        self.statistics, self.operations, self.in_flight = statistics, operations, in_flight

    def collect(self) -> Iterable[Metric]:
        yield from self._operations()
        yield from self._device(self.statistics())

    def _operations(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("nbd_qcow2j_requests", "Requests answered.", labels=["operation"])
        size = CounterMetricFamily("nbd_qcow2j_request_bytes", "Bytes of the requests answered.", labels=["operation"])
        errors = CounterMetricFamily("nbd_qcow2j_request_errors", "Requests refused or failed.", labels=["operation"])
        latency = HistogramMetricFamily(
            "nbd_qcow2j_request_duration_seconds", "Time from the callback to its answer.", labels=["operation"]
        )
        for name, counters in self.operations.items():
            requests.add_metric([name], counters.requests)
            size.add_metric([name], counters.bytes)
            errors.add_metric([name], counters.errors)
            snapshot = counters.snapshot()
            latency.add_metric([name], _cumulative(snapshot), snapshot.total)
        under_way = GaugeMetricFamily(
            "nbd_qcow2j_requests_in_flight", "Requests that are being answered now.", labels=["operation"]
        )
        for name, count in self.in_flight().items():
            under_way.add_metric([name], count)
        yield from (requests, size, errors, latency, under_way)

    def _device(self, now: Statistics) -> Iterable[Metric]:
        counters = {
            "commits": ("Transactions written into the journal.", now.commits),
            "commit_bytes": ("Bytes written into the journal.", now.commit_bytes),
            "checkpoints": ("Rounds of the checkpoint.", now.checkpoints),
            "checkpoint_clusters": ("Guest clusters sent home.", now.checkpoint_clusters),
            "checkpoint_bytes": ("Bytes written home.", now.checkpoint_bytes),
            "checkpoint_starvations": (
                "Rounds of the checkpoint that could send nothing home: the host file system has no room, or a read "
                "failed.",
                now.checkpoint_starvations,
            ),
            "copy_on_write_read_bytes": ("Bytes read beneath clusters that were copied.", now.cow_read_bytes),
            "clusters_allocated": ("Host clusters allocated.", now.clusters_allocated),
            "clusters_freed": ("Host clusters freed.", now.clusters_freed),
            "replayed_transactions": ("Transactions replayed when the image was opened.", now.replayed_transactions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"nbd_qcow2j_{name}", text, value=value)
        gauges = {
            "journal_size_bytes": ("Size of the ring.", now.journal_size_bytes),
            "journal_used_bytes": ("Bytes of the ring that are still needed.", now.journal_used_bytes),
            "pending_bytes": ("Guest data that has no home yet.", now.pending_bytes),
            "oldest_pending_age_seconds": (
                "Since when the cluster that waits longest has had data without a home.",
                now.oldest_pending_seconds,
            ),
            "pool_clusters": ("Free host clusters ready to be handed out.", now.pool_clusters),
        }
        for name, (text, level) in gauges.items():
            yield GaugeMetricFamily(f"nbd_qcow2j_{name}", text, value=level)
        histograms = {
            "commit_duration_seconds": (
                "Time from closing a transaction to its being durable in the journal.",
                now.commit_seconds,
            ),
            "commit_pages": ("Pages in a transaction: the batch size.", now.commit_pages),
            "fsync_duration_seconds": ("Time of an fdatasync of the image.", now.fsync_seconds),
            "checkpoint_duration_seconds": ("Time of a round of the checkpoint.", now.checkpoint_seconds),
        }
        for name, (text, snapshot) in histograms.items():
            yield HistogramMetricFamily(
                f"nbd_qcow2j_{name}", text, buckets=_cumulative(snapshot), sum_value=snapshot.total
            )
        state = GaugeMetricFamily("nbd_qcow2j_device_state", "1 for the state the device is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == now.state))
        yield state
        yield InfoMetricFamily("nbd_qcow2j_build", "The version that serves.", value={"version": __version__})


ACCEPT_AGAIN_SECONDS = 0.1


class MetricsServer:
    """A bound port; `serve` answers on it."""

    def __init__(self, host: str, port: int) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if self.path.split("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                body = encode(registry)
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not worth a line each."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            # HTTPServer's own asks the DNS for the name of the host, and a start may not wait for that.
            server_bind = TCPServer.server_bind

            def get_request(self) -> tuple[socket.socket, Any]:
                try:
                    return super().get_request()
                except OSError:
                    # Without a descriptor for it the client stays in the queue, and would be asked for at once again.
                    time.sleep(ACCEPT_AGAIN_SECONDS)
                    raise

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A scraper that did not wait for its answer is no news; anything else is a mistake of ours."""
                if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
                    super().handle_error(request, client_address)

        self._http = Server((host, port), Handler)
        self._thread: threading.Thread | None = None

    def serve(
        self,
        statistics: Callable[[], Statistics],
        operations: Mapping[str, OperationCounters],
        in_flight: Callable[[], Mapping[str, int]],
    ) -> None:
        """Answer scrapes from now on, in a thread of its own."""
        self.registry.register(DeviceCollector(statistics, operations, in_flight))
        thread = threading.Thread(target=self._http.serve_forever, name="metrics", daemon=True)
        thread.start()
        # Order: one that could not be started never ends, and `close` would wait for it.
        self._thread = thread

    def close(self) -> None:
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


def start_metrics(address: str) -> MetricsServer:
    """Bind HOST:PORT. Raises OptionError."""
    host, port = parse_address(address)
    try:
        return MetricsServer(host, port)
    except OSError as error:
        raise OptionError(f"option metrics: cannot listen on {host} port {port}: {error.strerror}") from None
    except UnicodeError:
        raise OptionError(f"option metrics: {host} is neither an address nor a host's name") from None
