"""The ways in: `nbd-qcow2j serve` and plain nbdkit. Everything goes through real programs and sockets."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PLUGIN, PROGRAM, SAID_ALL, Server, answers, free_port, is_attached, poll, refused, run

# ---- Paths, daemons, sockets ------------------------------------------------------------------------


def test_relative_paths_mean_the_directory_of_the_command_also_for_a_daemon(image: Path, short_path: Path) -> None:
    # A daemon changes its directory to `/` before it opens the image again for the checkpoint.
    pid_file = image.with_name("pid")
    words = ("nbdkit", "-U", short_path / "s", "-P", pid_file, "python", os.path.relpath(PLUGIN, image.parent))
    run(*words, f"file={image.name}", cwd=image.parent, timeout=30)
    pid = int(poll(lambda: pid_file.exists() and pid_file.read_text().strip(), what="a process id"))
    try:
        poll(lambda: answers(short_path / "s"), what="the daemon answers")
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert is_attached(image)
    finally:
        os.kill(pid, signal.SIGTERM)
    poll(lambda: not is_attached(image), what="the daemon detaches")


def test_serve_takes_relative_paths(image: Path, short_path: Path) -> None:
    with (image.parent / "log").open("wb") as log:
        words = [str(PROGRAM), "serve", image.name, "--socket", os.path.relpath(short_path / "s", image.parent)]
        with subprocess.Popen(words, cwd=image.parent, stdout=log, stderr=log) as process:
            try:
                poll(lambda: answers(short_path / "s"), what="the server answers")
            finally:
                process.terminate()
    assert process.returncode == 0


def test_serve_becomes_nbdkit_so_that_signals_and_pid_files_mean_the_server(
    serve: Callable[..., Server], image: Path
) -> None:
    server = serve(image)
    # The process that was started, not a child of it.
    assert Path(f"/proc/{server.process.pid}/comm").read_text() == "nbdkit\n"


def test_a_daemon_is_named_by_its_pid_file_and_leaves_no_socket(serve: Callable[..., Server], image: Path) -> None:
    server = serve(image, daemonize=True)
    assert Path(f"/proc/{server.pid}/comm").read_text() == "nbdkit\n"
    assert server.connect().get_size() == 64 << 20
    server.stop()
    assert not server.path.exists()
    assert not is_attached(image)


def test_a_socket_that_a_killed_server_left_is_taken_over(serve: Callable[..., Server], image: Path) -> None:
    server = serve(image)
    server.kill()
    assert server.path.is_socket(), "or this test would prove nothing"
    again = serve(image, socket=server.path)
    assert again.connect().get_size() == 64 << 20
    again.stop()
    assert not server.path.exists()


def test_a_socket_on_which_somebody_answers_is_refused(
    serve: Callable[..., Server], image: Path, make_image: Callable[..., Path]
) -> None:
    server = serve(image)
    other = make_image(name="other.qcow2")
    said = refused(PROGRAM, "serve", other, "--socket", server.path)
    assert said == f"nbd-qcow2j: option socket: {server.path} is in use: a server answers there"
    assert answers(server.path)
    assert not is_attached(other)


def test_a_socket_whose_server_is_too_busy_to_accept_is_refused(image: Path, short_path: Path) -> None:
    path = short_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        assert "is in use" in refused(PROGRAM, "serve", image, "--socket", path)


def test_what_is_no_socket_is_not_removed(image: Path, short_path: Path) -> None:
    path = short_path / "letter"
    path.write_text("dear")
    assert refused(PROGRAM, "serve", image, "--socket", path).endswith(f"{path} exists and is not a socket")
    assert path.read_text() == "dear"
    said = refused(PROGRAM, "serve", image, "--socket", short_path / "no" / "s")
    assert said.endswith(f"the directory of {short_path / 'no' / 's'} does not exist")
    assert "at most 107 bytes" in refused(PROGRAM, "serve", image, "--socket", short_path / ("s" * 100))


def test_an_image_that_is_served_is_not_served_twice(
    serve: Callable[..., Server], image: Path, short_path: Path
) -> None:
    serve(image)
    said = refused("nbdkit", "-f", "-U", short_path / "two", "python", PLUGIN, f"file={image}")
    assert str(image) in said
    assert not (short_path / "two").exists()


def test_nbdkit_that_cannot_listen_leaves_a_plain_image(image: Path, short_path: Path) -> None:
    # nbdkit binds after the image was opened and attached, and leaves by `exit` when it cannot.
    path = short_path / "s"
    path.write_text("in the way")
    for foreground in (["-f"], []):
        done = run("nbdkit", *foreground, "-U", path, "python", PLUGIN, f"file={image}", check=False, timeout=30)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


@pytest.mark.parametrize("left", [b"", b"12345\n", b"1"])
def test_a_pid_file_that_another_server_left_is_written_over(
    serve: Callable[..., Server], image: Path, short_path: Path, left: bytes
) -> None:
    path = short_path / "pid"
    path.write_bytes(left)
    server = serve(image, "--pid-file", path)
    assert poll(lambda: path.read_text().strip(), what="the process id") == str(server.pid)


def test_a_server_takes_as_many_descriptors_as_it_may(serve: Callable[..., Server], image: Path) -> None:
    server = serve(image)
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert soft == (1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16))


# ---- TCP and metrics --------------------------------------------------------------------------------


@pytest.fixture
def serve_tcp(tmp_path: Path) -> Any:
    """serve_tcp(IMAGE, port, *options): (process, log) of a server that listens on a TCP port and has said so."""
    processes = []

    def start(image: Path, port: int, *options: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / "tcp.log"
        with log.open("wb") as out:
            words = [str(PROGRAM), "serve", str(image), "--port", str(port), *options]
            process = subprocess.Popen(words, stdout=out, stderr=out)
        processes.append(process)
        # What it prints comes a moment after the first that can connect; see announcement.py.
        poll(lambda: process.poll() is not None or SAID_ALL in log.read_text(), what="the server says that it serves")
        assert _reaches("127.0.0.1", port), log.read_text()
        return process, log

    yield start
    for process in processes:
        process.terminate()
        assert process.wait(10) == 0


def _reaches(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


def test_a_tcp_port_is_loopback_unless_told_otherwise(serve_tcp: Any, image: Path) -> None:
    port = free_port()
    _, log = serve_tcp(image, port)
    listening = Path("/proc/net/tcp").read_text()
    assert f" 0100007F:{port:04X} 00000000:0000 0A" in listening
    assert f" 00000000:{port:04X} " not in listening
    assert "warning" not in log.read_text()
    assert f"nbd://127.0.0.1:{port}" in log.read_text()


@pytest.mark.parametrize("tls", ["off", "on", "require"])
def test_a_tcp_port_for_everybody_warns_unless_tls_is_required(
    serve_tcp: Any, image: Path, tmp_path: Path, tls: str
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{'42' * 32}\n")
    options = ["--", f"--tls={tls}", *([f"--tls-psk={keys}"] if tls != "off" else [])]
    _, log = serve_tcp(image, free_port(), "--address", "0.0.0.0", *options)
    said = log.read_text()
    assert ("NBD has no passwords" in said) is (tls != "require")
    # What is printed can be typed: an address to connect to, and with TLS only what can be told of it in the URI.
    scheme = "nbds" if tls == "require" else "nbd"
    assert f" at {scheme}://{socket.gethostname()}:" in said
    assert "0.0.0.0" not in said.replace("anybody who reaches 0.0.0.0", "")
    assert ("sudo nbd-client" in said) is ("qemu-img convert" in said) is (tls != "require")


def test_a_port_in_use_is_one_clear_line_and_the_image_stays_plain(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(PROGRAM, "serve", image, "--port", port)
        assert said == f"nbd-qcow2j: option port: cannot listen on 127.0.0.1 port {port}: Address already in use"
        said = refused(PROGRAM, "serve", image, "--port", free_port(), "--metrics", f"127.0.0.1:{port}")
        assert said == f"nbd-qcow2j: option metrics: cannot listen on 127.0.0.1 port {port}: Address already in use"
        said = refused("nbdkit", "-f", "-U", image.with_name("s"), "python", PLUGIN, f"file={image}", f"metrics={port}")
        assert f"metrics: cannot listen on 127.0.0.1 port {port}: Address already in use" in said
    assert not is_attached(image)


def test_nothing_listens_for_metrics_unless_asked(server: Server) -> None:
    inodes = {os.readlink(path) for path in Path(f"/proc/{server.pid}/fd").iterdir()}
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    assert not {f"socket:[{line.split()[9]}]" for line in lines} & inodes


# ---- What is passed on, and how fast it starts -------------------------------------------------------


def test_options_after_the_dashes_go_to_nbdkit_and_its_filters(
    serve: Callable[..., Server], image: Path, tmp_path: Path
) -> None:
    log = tmp_path / "requests"
    server = serve(image, "--", "--filter", "log", f"logfile={log}", "-D", "nbdkit.backend.datapath=0", "-t", "1")
    server.connect().pread(512, 4096)
    assert "Read" in log.read_text()
    words = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    assert words.index("nbdkit.backend.datapath=0") < words.index("python") < words.index(f"logfile={log}")


def test_a_client_that_vanishes_with_replies_due_does_not_end_a_server_of_one_thread(
    serve: Callable[..., Server], image: Path
) -> None:
    # nbdkit 1.32.4 and 1.32.5 abort when this happens to several threads of a connection; README, limits.
    server = serve(image, "--", "-t", "1")
    script = textwrap.dedent("""
        import os, sys, nbd
        handle = nbd.NBD()
        handle.connect_unix(sys.argv[1])
        for number in range(16):
            handle.aio_pread(nbd.Buffer(1 << 20), number << 20)
        print("sent", flush=True)
        os.kill(os.getpid(), 9)
    """)
    for _ in range(5):
        assert run(sys.executable, "-c", script, server.path, check=False).stdout == "sent\n"
    assert server.connect().pread(512, 0) == bytes(512)


def test_a_large_empty_image_answers_soon(serve: Callable[..., Server], make_image: Callable[..., Path]) -> None:
    # A second on a slow machine that does other things as well; what grew with the size would take minutes.
    image = make_image(size="1T")
    best = 99.0
    for _ in range(3):
        began = time.monotonic()
        server = serve(image)
        server.connect().pread(4096, 1 << 39)
        best = min(best, time.monotonic() - began)
        server.stop()
    assert best < 5.0


def test_another_python_on_the_path_does_not_matter(image: Path, tmp_path: Path, short_path: Path) -> None:
    # Python looks for its library beside the first python3 on PATH: here one whose library is empty.
    library = tmp_path / "other" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    library.mkdir(parents=True)
    (library / "os.py").write_text("raise ImportError('the library of another build')\n")
    program = tmp_path / "other" / "bin" / "python3"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    words = [PROGRAM, "serve", image, "--socket", short_path / "s", "--", "--run", 'nbdinfo --size "$uri"']
    assert run(*words, env={**os.environ, "PATH": path}).stdout.endswith(f"{64 << 20}\n")


SIZE = "nbdinfo --size $uri"


@pytest.mark.parametrize("words", [["--run", f"{SIZE} && test a=b = a=b"], ["--exportname", "a=b", "--run", SIZE]])
def test_what_belongs_to_an_option_of_nbdkit_stays_with_it(image: Path, short_path: Path, words: list[str]) -> None:
    done = run(PROGRAM, "serve", image, "--socket", short_path / "s", "--", *words)
    assert done.stdout.splitlines()[-1] == str(64 << 20)
    assert not is_attached(image)


@pytest.mark.parametrize("option", ["-r", "--readonly", "--read-only", "-vr"])
def test_nbdkits_own_read_only_leaves_the_image_alone(image: Path, short_path: Path, option: str) -> None:
    before, asked = image.read_bytes(), "nbdinfo --is read-only $uri && echo it is"
    path = short_path / "s"
    done = run(PROGRAM, "serve", image, "--socket", path, "--", option, "--run", asked)
    assert done.stdout.splitlines()[-1] == "it is"
    done = run("nbdkit", option, "-U", path, "--run", asked, "python", PLUGIN, f"file={image}", "discard=on")
    assert done.stdout == "it is\n"
    # Two at once, as readers may.
    path = short_path / "other"
    command = ["nbdkit", "-f", option, "-U", str(path), "python", str(PLUGIN), f"file={image}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            poll(lambda: answers(path), what="the server answers", seconds=30)
            done = run("nbdkit", option, "-U", "-", "--run", asked, "python", PLUGIN, f"file={image}")
            assert done.stdout == "it is\n"
        finally:
            process.terminate()
    assert image.read_bytes() == before


def test_a_word_that_looks_like_read_only_is_not_taken_for_it(image: Path, short_path: Path) -> None:
    words = ["--exportname", "-r", "--run", "nbdinfo --can write nbd+unix:///-r?socket=$unixsocket && echo it can"]
    done = run(PROGRAM, "serve", image, "--socket", short_path / "s", "--", *words)
    assert done.stdout.splitlines()[-1] == "it can"


def test_nothing_is_said_to_be_served_before_somebody_listens(image: Path, short_path: Path) -> None:
    # Who reads the address may connect at once; five times, for it is a race that must not be there.
    for number in range(5):
        path = short_path / f"{number}"
        command = [PROGRAM, "serve", str(image), "--socket", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == f"serving {image} at nbd+unix:///?socket={path}\n"
                assert answers(path)
                process.terminate()
                assert process.stdout.read().endswith(SAID_ALL)
            finally:
                process.terminate()
        assert process.returncode == 0


def test_an_image_that_the_plugin_refuses_is_never_said_to_be_served(
    serve: Callable[..., Server], image: Path, short_path: Path
) -> None:
    # Both journal slots are damaged: only reading the journal shows it.
    server = serve(image)
    server.kill()
    data = image.read_bytes()
    assert data.count(b"qjournal") == 2
    image.write_bytes(data.replace(b"qjournal", b"jqournal"))
    for options in ((), ("--daemonize", "--pid-file", short_path / "pid")):
        done = run(PROGRAM, "serve", image, "--socket", short_path / "s", *options, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "journal" in done.stderr


def test_the_locale_does_not_matter_for_a_name(image: Path, short_path: Path) -> None:
    other = short_path / "ö 日本.qcow2"
    image.rename(other)
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    for words in (
        ("nbdkit", "-f", "-U", short_path / "s", "--run", SIZE, "python", PLUGIN, f"file={other}"),
        (PROGRAM, "serve", other, "--socket", short_path / "ö", "--", "--run", SIZE),
    ):
        assert run(*words, env=env).stdout.splitlines()[-1] == str(64 << 20)
        assert not is_attached(other)


def test_a_host_that_cannot_be_one_is_one_line(image: Path, short_path: Path) -> None:
    said = refused(PROGRAM, "serve", image, "--port", free_port(), "--address", "127..0.1")
    assert said == "nbd-qcow2j: option port: 127..0.1 is neither an address nor a host's name"
    said = refused(PROGRAM, "serve", image, "--socket", short_path / "s", "--metrics", "a..b:9809")
    assert said == "nbd-qcow2j: option metrics: a..b is neither an address nor a host's name"
    said = refused("nbdkit", "-f", "-U", short_path / "s", "python", PLUGIN, f"file={image}", "metrics=a..b:9809")
    assert "internal error" not in said
    assert "a..b" in said


def test_a_name_that_is_not_utf_8_is_refused_in_one_line(image: Path, short_path: Path) -> None:
    bad = os.fsencode(short_path) + b"/bad\xff.qcow2"
    with open(bad, "wb") as file:
        file.write(image.read_bytes())
    said = refused(PROGRAM, "serve", os.fsdecode(bad), "--socket", short_path / "s")
    assert "is not UTF-8" in said
    said = refused(PROGRAM, "serve", image, "--socket", os.fsdecode(os.fsencode(short_path) + b"/\xff"))
    assert "is not UTF-8" in said
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    assert b"virtual-size" in subprocess.run([PROGRAM, "info", bad], env=env, capture_output=True, check=True).stdout
