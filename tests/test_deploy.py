"""What lies in deploy/: `serve` as a person types it, the systemd unit, the Prometheus examples.

systemd itself is not needed: what the unit would start is read out of it and started here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, SAID_ALL, TOP, Server, answers, free_port, is_attached, poll, run

DEPLOY = TOP / "deploy"
UNIT = DEPLOY / "nbd-qcow2j@.service"

# ---- deploy/serve -----------------------------------------------------------------------------------


@pytest.fixture
def deploy_serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """deploy_serve(*words, cwd=…, socket=…): what `deploy/serve` has started, answering; its log is all it printed."""
    servers: list[Server] = []

    def start(*words: object, cwd: Path, socket: Path) -> Server:
        log = tmp_path / f"deploy-{len(servers)}.log"
        # The usual port may be in use on a machine that runs tests.
        command = [DEPLOY / "serve", *words, "--metrics", free_port()]
        with log.open("wb") as out:
            process = subprocess.Popen([str(word) for word in command], cwd=cwd, stdout=out, stderr=out)
        server = Server(process, socket, log)
        servers.append(server)
        server.wait_ready()
        # It listens a moment before it says so.
        poll(lambda: SAID_ALL in server.log, what="the server says that it serves")
        return server

    yield start
    for server in servers:
        if not server.killed:
            server.stop()


def printed(server: Server) -> dict[str, str]:
    """The lines to attach, by their first word."""
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in server.log.splitlines() if line.startswith("  ")}


def test_serve_makes_a_disk_serves_it_and_closes_it_on_ctrl_c_under_a_client(
    deploy_serve: Callable[..., Server], short_path: Path
) -> None:
    # No argument: disk.qcow2 where the command was typed.
    server = deploy_serve(cwd=short_path, socket=short_path / "disk.qcow2.sock")
    image = short_path / "disk.qcow2"
    assert f"serving {image} at nbd+unix:///?socket={image}.sock\n" in server.log
    assert "metrics     http://127.0.0.1:" in server.log
    handle = server.connect()
    assert handle.get_size() == 10 << 30
    handle.pwrite(b"x" * 5000, 1 << 30)
    assert is_attached(image)
    server.stop(signal.SIGINT)
    assert not is_attached(image)
    assert not server.path.exists()
    run("qemu-img", "check", "-q", image)
    assert "Pattern verification failed" not in run("qemu-io", "-r", "-c", "read -P 120 1G 5000", image).stdout

    # The second start makes and installs nothing, and what was written is there.
    server = deploy_serve(image, cwd=short_path, socket=short_path / "disk.qcow2.sock")
    assert "setup:" not in server.log
    assert "creating" not in server.log
    assert server.connect().pread(5000, 1 << 30) == b"x" * 5000


def test_what_serve_prints_is_what_the_readme_says(deploy_serve: Callable[..., Server], short_path: Path) -> None:
    server = deploy_serve("disk.qcow2", cwd=short_path, socket=short_path / "disk.qcow2.sock")
    readme = (TOP / "README.md").read_text()
    for command in ("qemu", "/dev/nbd0", "copy", "convert"):
        assert printed(server)[command].replace(str(short_path), "/path") in readme, command


def test_the_printed_lines_work_for_a_path_with_a_space_in_another_directory(
    deploy_serve: Callable[..., Server], short_path: Path, tmp_path: Path
) -> None:
    there, here = short_path / "my disks", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    image = there / "a disk, mine.qcow2"
    run(PROGRAM, "create", image, "3M")
    server = deploy_serve(image, cwd=here, socket=there / "a disk, mine.qcow2.sock")
    server.connect().pwrite(b"spaced" * 1000, 1 << 20)
    lines = printed(server)
    for command in ("copy", "convert"):
        run("sh", "-c", lines[command], cwd=here)
    assert (here / "copy.raw").read_bytes()[1 << 20 :][:6000] == b"spaced" * 1000
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", here / "copy.raw", here / "copy.qcow2")
    words = shlex.split(lines["/dev/nbd0"])
    assert words[words.index("-unix") + 1] == str(server.path)
    if shutil.which("qemu-system-x86_64"):
        line = lines["qemu"].replace("-m 1G", "-m 64M") + " -S -nodefaults -display none -monitor stdio"
        seen = run("sh", "-c", line, cwd=here, input="info block\nquit\n", timeout=60)
        assert "virtio0" in seen.stdout
        assert "mine.qcow2.sock" in seen.stdout
    server.stop(signal.SIGINT)
    assert not is_attached(image)


def test_serve_takes_over_the_socket_that_a_killed_one_left_and_not_that_of_a_living_one(
    deploy_serve: Callable[..., Server], short_path: Path
) -> None:
    image, path = short_path / "disk.qcow2", short_path / "disk.qcow2.sock"
    run(PROGRAM, "create", image, "1M")
    first = deploy_serve(image, cwd=short_path, socket=path)
    first.connect().pwrite(b"k" * 512, 0, 1)
    again = run(DEPLOY / "serve", image, "--metrics", free_port(), check=False)
    assert again.returncode == 1
    assert again.stderr.startswith(f"nbd-qcow2j: {image} is in use: another nbd-qcow2j writes to it")
    assert again.stderr.count("\n") == 1
    other = short_path / "other.qcow2"
    run(PROGRAM, "create", other, "1M")
    again = run(PROGRAM, "serve", other, "--socket", path, check=False)
    assert again.stderr == f"nbd-qcow2j: option socket: {path} is in use: a server answers there\n"
    first.kill()
    assert path.is_socket(), "or this test would prove nothing"
    second = deploy_serve(image, cwd=short_path, socket=path)
    assert second.connect().pread(512, 0) == b"k" * 512


def test_serve_finds_another_place_for_the_socket_where_none_can_be_beside_the_image(short_path: Path) -> None:
    directory = short_path / ("a directory with a long name " * 4)
    directory.mkdir()
    command = [str(DEPLOY / "serve"), "--metrics", str(free_port())]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(short_path)}
    places = set()
    for _ in range(2):
        with subprocess.Popen(command, cwd=directory, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                first = process.stdout.readline()
                while first.startswith("created "):
                    first = process.stdout.readline()
                path = Path(first.rstrip("\n").partition("nbd+unix:///?socket=")[2])
                assert path.parent == short_path
                assert answers(path)
                places.add(path)
                # As killed: the second takes the socket over.
                process.kill()
            finally:
                process.kill()
    assert len(places) == 1


def test_serve_explains_itself_and_refuses_in_one_line(short_path: Path) -> None:
    assert "deploy/serve [IMAGE" in run(DEPLOY / "serve", "--help").stdout
    text = short_path / "text"
    text.write_text("no image")
    done = run(DEPLOY / "serve", text, "--metrics", free_port(), check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(text) in done.stderr


def test_serve_takes_a_port_instead_of_the_socket(short_path: Path) -> None:
    port, image = free_port(), short_path / "disk.qcow2"
    run(PROGRAM, "create", image, "1M")
    words = [DEPLOY / "serve", image, "--port", port, "--metrics", free_port()]
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"serving {image} at nbd://127.0.0.1:{port}\n"
            assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}").stdout == f"{1 << 20}\n"
        finally:
            server.terminate()
    assert server.returncode == 0 and not is_attached(image)
    done = run(DEPLOY / "serve", "", check=False)
    assert (done.returncode, done.stderr) == (1, "serve: the name of the image is empty\n")


# ---- systemd ----------------------------------------------------------------------------------------


def settings(unit: str) -> dict[str, list[str]]:
    """Every setting of the unit with its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    done = run("systemd-analyze", "verify", UNIT)
    assert (done.stdout, done.stderr) == ("", "")
    unit = tmp_path / "nbd-qcow2j@disk.service"
    unit.write_text(UNIT.read_text().replace("Restart=on-failure", "Restart=perhaps"))
    assert "perhaps" in run("systemd-analyze", "verify", unit, check=False).stderr, "or it verifies nothing"


@pytest.mark.parametrize("configured", [False, True], ids=["/var/lib", "a file in /etc"])
def test_what_the_unit_starts_serves_and_what_stops_it_closes(configured: bool, short_path: Path) -> None:
    # The same words as systemd would start, with its directories and the tree elsewhere.
    unit = settings(UNIT.read_text())
    moved = {"%i": "disk", "/run/": f"{short_path}/run/", "/var/lib/": f"{short_path}/lib/"}
    moved["/opt/nbd-qcow2j"] = str(TOP)
    environment = dict(each.split("=", 1) for each in unit["Environment"][0].split())
    port = free_port()
    if configured:
        environment = {"IMAGE": "/var/lib/nbd-qcow2j/else where.qcow2", "OPTIONS": f"--metrics {port} --read-only"}
    words = []
    for word in unit["ExecStart"][0].split():
        # systemd splits $NAME into words and leaves ${NAME} whole.
        whole = re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], word)
        words += environment[word[1:]].split() if word.startswith("$") and not word.startswith("${") else [whole]
    for old, new in moved.items():
        words = [word.replace(old, new) for word in words]
    runtime, state = short_path / "run" / "nbd-qcow2j" / "disk", short_path / "lib" / "nbd-qcow2j"
    assert unit["RuntimeDirectory"] == ["nbd-qcow2j/%i"]
    assert unit["StateDirectory"] == ["nbd-qcow2j"]
    runtime.mkdir(parents=True)
    state.mkdir(parents=True)
    image = state / ("else where.qcow2" if configured else "disk.qcow2")
    run(PROGRAM, "create", image, "8M")

    run(*words, timeout=30)
    # Type=forking: when the command has ended, the socket answers and the pid file is there or comes at once.
    assert unit["Type"] == ["forking"]
    assert answers(runtime / "socket")
    pid_file = Path(unit["PIDFile"][0].replace("%i", "disk").replace("/run/", f"{short_path}/run/"))
    pid = int(poll(lambda: pid_file.exists() and pid_file.read_text().strip(), what="the pid file"))
    assert is_attached(image) is not configured
    if configured:
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
    os.kill(pid, getattr(signal, unit["KillSignal"][0]))
    poll(lambda: not (runtime / "socket").exists() and not is_attached(image), what="it closes", seconds=30)

    # An image that is refused is a failed start.
    image.write_bytes(b"no image")
    done = run(*words, check=False, timeout=30)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_units_filter_lets_through_every_system_call_of_a_server(
    make_image: Callable[..., Path], short_path: Path, tmp_path: Path
) -> None:
    # Start, write, flush, trim, checkpoint and close under strace: what it calls is in systemd's list.
    unit = settings(UNIT.read_text())
    allowed = system_calls(unit["SystemCallFilter"][0])
    image, trace, path = make_image(), tmp_path / "trace", short_path / "s"
    words = ["strace", "-f", "-qq", "-o", trace, PROGRAM, "serve", image, "--socket", path, "--metrics", free_port()]
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL) as process:
        try:
            poll(lambda: answers(path), what="the server answers", seconds=60)
            commands = ("write 0 8M", "write 12M 4k", "discard 1M 1M", "write -z 4M 1M", "flush", "read 0 8M")
            words = [word for command in commands for word in ("-c", command)]
            run("qemu-io", "-f", "raw", "-d", "unmap", *words, f"nbd+unix:///?socket={path}")
        finally:
            pid = int(trace.read_text().split(maxsplit=1)[0])
            os.kill(pid, signal.SIGTERM)
            assert process.wait(60) == 0
    called = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"pwritev2", "fdatasync", "fallocate"} <= called, "or this test would prove nothing"
    assert called - allowed == set()


def system_calls(name: str) -> set[str]:
    found = set()
    for line in run("systemd-analyze", "syscall-filter", name).stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            found |= system_calls(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


# ---- Prometheus -------------------------------------------------------------------------------------

PROMTOOL = PROGRAM.with_name("promtool")

CASES = """
rule_files: [prometheus-rules.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'nbd_qcow2j_device_state{instance="a", state="failed"}', values: "0 0 1 1"}
      - {series: 'nbd_qcow2j_device_state{instance="a", state="serving"}', values: "1 1 0 0"}
      - {series: 'nbd_qcow2j_device_state{instance="c", state="corrupt"}', values: "0 0 1 1"}
      - {series: 'nbd_qcow2j_checkpoint_starvations_total{instance="d"}', values: "0+1x30"}
      - {series: 'nbd_qcow2j_checkpoint_starvations_total{instance="once"}', values: "0 1x30"}
      - {series: 'nbd_qcow2j_journal_used_bytes{instance="b"}', values: "95x10"}
      - {series: 'nbd_qcow2j_journal_size_bytes{instance="b"}', values: "100x10"}
      - {series: 'nbd_qcow2j_journal_used_bytes{instance="read-only"}', values: "0x10"}
      - {series: 'nbd_qcow2j_journal_size_bytes{instance="read-only"}', values: "0x10"}
    alert_rule_test:
      - {eval_time: 1m, alertname: NbdQcow2jFailed}
      - eval_time: 2m
        alertname: NbdQcow2jFailed
        exp_alerts:
          - exp_labels: {severity: critical, instance: a, state: failed}
            exp_annotations: EXPECTED
      - {eval_time: 4m, alertname: NbdQcow2jJournalNearlyFull}
"""


def test_promtool_finds_nothing_wrong_with_the_examples() -> None:
    assert "SUCCESS" in run(PROMTOOL, "check", "config", DEPLOY / "prometheus.yml").stdout
    assert "SUCCESS: 4 rules found" in run(PROMTOOL, "check", "rules", DEPLOY / "prometheus-rules.yml").stdout


def test_the_alerts_ask_for_metrics_that_there_are(serve: Callable[..., Server], image: Path) -> None:
    port = free_port()
    serve(image, "--metrics", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    names = set(re.findall(r"nbd_qcow2j_\w+", (DEPLOY / "prometheus-rules.yml").read_text()))
    assert len(names) >= 3
    for name in names:
        assert re.search(rf"^{name}[ {{]", text, re.MULTILINE), name
    assert 'nbd_qcow2j_device_state{state="failed"} 0.0' in text


def test_the_alerts_fire_when_a_device_has_failed_or_a_journal_stays_full(tmp_path: Path) -> None:
    rules: Any = (DEPLOY / "prometheus-rules.yml").read_text()
    # What is said is for people; when it fires is tested.
    bare = re.sub(r"\n        annotations:\n(?:          .*\n)+", "\n        annotations: {}\n", rules + "\n")
    assert bare.count("annotations: {}") == 4
    (tmp_path / "prometheus-rules.yml").write_text(bare)
    cases = CASES.replace("EXPECTED", "{}") + (
        "      - eval_time: 6m\n        alertname: NbdQcow2jJournalNearlyFull\n"
        "        exp_alerts: [{exp_labels: {severity: warning, instance: b}}]\n"
        "      - eval_time: 2m\n        alertname: NbdQcow2jCorrupt\n"
        "        exp_alerts: [{exp_labels: {severity: critical, instance: c, state: corrupt}}]\n"
        "      - {eval_time: 9m, alertname: NbdQcow2jCannotCheckpoint}\n"
        "      - eval_time: 15m\n        alertname: NbdQcow2jCannotCheckpoint\n"
        "        exp_alerts: [{exp_labels: {severity: warning, instance: d}}]\n"
    )
    (tmp_path / "cases.yml").write_text(cases)
    assert "SUCCESS" in run(PROMTOOL, "test", "rules", tmp_path / "cases.yml").stdout
