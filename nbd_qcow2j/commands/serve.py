"""`nbd-qcow2j serve`: check everything that can be checked, then become nbdkit.

The process is replaced, not parent to the server: signals, exit codes and pid files mean the server itself.
The plugin checks again what is checked here, and more (locks, the journal); here it is one line without a word
about nbdkit.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import os
import resource
import shlex
import shutil
import socket
import stat
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..announcement import BEFORE_FORK, ONCE_LISTENING
from ..errors import Error, OptionError, printable
from ..format.header import check_usable, journal_extension_of, parse_header
from ..image.backing import open_backing
from ..locks import READER, WRITER
from ..nbdkit_words import is_read_only, places, split_keys
from ..options import UNITS, Options, describe_options, parse_address, parse_options
from ..storage import FileStorage

# nbdkit's threads for each connection; requests of one connection that wait for the disk at once. Measured on two
# cores with 2, 3, 4, 8, 16 of them, one connection at depth 16: 4 KiB random reads 119k to 120k a second with any; with
# the page cache dropped 25k, 44k, 43k, 53k, 46k; allocating writes, a flush every 32, 16.5k, 16.1k, 15.2k, 13.9k,
# 13.5k: every thread more is one that the interpreter lock has to travel to. At depth 1, 3 against 4, on two later
# machines: writes with a flush each 1.78 and 1.74 of qemu-nbd, 1.97 and 1.81; sequential writes 1.32 and 1.29, 1.94 and
# 1.85.
# Limit: nbdkit 1.32.4 and 1.32.5 (Debian 12) abort when a client with several requests under way vanishes: 17 of
# 20 times at depth 16, never with `-- -t 1`, which costs concurrent cold reads. Nothing flushed is lost by it.
THREADS = 3

# sun_path, less its closing zero.
_SOCKET_PATH_BYTES = 107
_PID_BYTES = 32
"""More than a process id and a newline take."""
_DESCRIPTORS = 1 << 16
"""A connection takes three; the usual limit of 1,024 is for programs that use select."""
# Options of the image that `serve` takes in another form.
_SPELT_OUT = frozenset({"file", "read-only", "remove-socket"})


def add_parser(subparsers: Any) -> None:
    """Add `serve` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="serve an image over NBD",
        description="Serve IMAGE over NBD, in the foreground until SIGTERM or Ctrl-C.",
        epilog=f"{UNITS}. What follows -- goes to nbdkit, such as --tls=require or --filter=log logfile=/tmp/log.",
        usage="nbd-qcow2j serve IMAGE (--socket PATH | --port N) [options] [-- nbdkit options]",
    )
    parser.add_argument("image", metavar="IMAGE", help="the qcow2 image to serve")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", metavar="PATH", help="listen on this Unix socket")
    where.add_argument("--port", type=int, metavar="N", help="listen on this TCP port")
    parser.add_argument("--address", metavar="A", help="the address for --port (default 127.0.0.1)")
    parser.add_argument("--read-only", action="store_true", help="serve without writing to the image")
    parser.add_argument("--daemonize", action="store_true", help="serve in the background")
    parser.add_argument("--pid-file", metavar="F", help="write the process id of the server there")
    group = parser.add_argument_group("options of the image (for plain nbdkit: key=value)")
    for key, metavar, text in describe_options():
        if key not in _SPELT_OUT:
            group.add_argument(f"--{key}", metavar=metavar, help=text.replace("%", "%%"))


def run(arguments: argparse.Namespace) -> int:
    """Check, say where the image will be, and exec nbdkit. Returns only if nothing was started."""
    if taken := places(arguments.passed_on):
        raise OptionError(
            f"{taken[0]} after --: where the image is served say --socket, --port, --address and --pid-file"
        )
    for name in ("socket", "address", "pid_file"):
        if getattr(arguments, name) == "":
            raise OptionError(f"option {name.replace('_', '-')}: it is empty")
    pairs = _pairs(arguments)
    options = parse_options(pairs)
    nbdkit = shutil.which("nbdkit", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if nbdkit is None:
        raise Error("nbdkit is not installed: run deploy/setup")
    plugin = Path(__file__).resolve().parents[2] / "plugin.py"
    if not plugin.is_file():
        raise Error(f"{plugin} is not there: nbd-qcow2j serves from its source tree")

    check_image(options)
    if arguments.pid_file is not None:
        # nbdkit writes it when it is in the background, where nobody hears that it cannot.
        check_pid_file(os.path.abspath(arguments.pid_file))
    if options.metrics is not None:
        check_port("metrics", *parse_address(options.metrics))
    tls = "--tls=require" in arguments.passed_on or ("--tls", "require") in pairwise(arguments.passed_on)
    scheme = "nbds" if tls else "nbd"
    if arguments.socket is not None:
        path = os.path.abspath(arguments.socket)
        check_name(path)
        claim_socket(path)
        listen = ["-U", path]
        pairs.append(("remove-socket", path))
        uri = f"{scheme}+unix:///?socket={quote(path)}"
    else:
        host = arguments.address or "127.0.0.1"
        check_port("port", host, arguments.port)
        listen = ["-i", host, "-p", str(arguments.port)]
        name = _reached_at(host)
        uri = f"{scheme}://{f'[{name}]' if ':' in name else name}:{arguments.port}"
        if not _is_loopback(host) and not tls:
            print(
                f"nbd-qcow2j: warning: anybody who reaches {host} port {arguments.port} can read and write the disk:"
                " NBD has no passwords; use -- --tls=require (see nbdkit-tls(1))",
                file=sys.stderr,
            )

    command = [nbdkit, "-t", str(THREADS), *listen]
    if not arguments.daemonize:
        command.append("-f")
    if arguments.pid_file is not None:
        command += ["-P", os.path.abspath(arguments.pid_file)]
    for_nbdkit, for_filters = split_keys(arguments.passed_on)
    command += [*for_nbdkit, "python", str(plugin), *(f"{key}={value}" for key, value in pairs), *for_filters]
    # Said by the plugin, when it is true: until then the image may be refused, and nobody listens.
    when = BEFORE_FORK if arguments.daemonize else ONCE_LISTENING
    said = f"{_how_to_attach(options, uri, arguments, tls=tls)}\n"
    sys.stderr.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Forbidden: then there are as many as there were.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # The interpreter that nbdkit embeds looks for its library beside the first python3 on PATH, which may be another
    # build of the same version (pyenv, conda), whose modules do not load.
    os.execve(nbdkit, command, {**os.environ, "PYTHONHOME": sys.base_prefix, when: said})


def _pairs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The options of the image that were given, absolute paths and all, as plain nbdkit would get them."""
    pairs = [("file", os.path.abspath(arguments.image))]
    if arguments.read_only or is_read_only(arguments.passed_on):
        pairs.append(("read-only", "true"))
    for key, _, _ in describe_options():
        if key not in _SPELT_OUT and (value := getattr(arguments, key.replace("-", "_"))) is not None:
            pairs.append((key, value))
    if arguments.port is not None and not 0 < arguments.port < 1 << 16:
        raise OptionError(f"option port: expected 1 to 65535, found {arguments.port}")
    if arguments.address is not None and arguments.port is None:
        raise OptionError("option address: it goes with --port")
    return pairs


def check_image(options: Options) -> None:
    """Whether the file is an image that can be served, and nobody uses it. Raises ImageError; changes nothing."""
    path = options.file
    check_name(path)
    with FileStorage.open(path, read_only=options.read_only) as file:
        file.lock(READER if options.read_only else WRITER)
        data = bytearray(64 << 10)
        file.read_into(data, 0)
        header = parse_header(bytes(data), file_size=file.size(), name=path)
        check_usable(header, write=not options.read_only, name=path)
        extension = journal_extension_of(header)
        if extension is not None:
            # Not at the top: with crc32c it is a fifth of this process's time, and nearly no image has a journal here.
            from ..format.journal import Location  # noqa: PLC0415

            Location.from_bytes(extension, cluster_size=header.geometry.cluster_size, name=path)
        backing = open_backing(header, path, policy=options.backing, opener=FileStorage.open_backing)
        if backing is not None:
            backing.close()


def check_name(path: str) -> None:
    """Whether nbdkit can hand a name to its plugin. Raises OptionError."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise OptionError(f"the name {printable(path)} is not UTF-8, which nbdkit cannot pass on: rename it") from None


def check_directory(name: str, path: str) -> None:
    """Whether a file can be made at `path`; `name` is the option's. Raises OptionError."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise OptionError(f"option {name}: the directory of {path} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OptionError(f"option {name}: no permission to make a file in {directory}")
    if os.path.isdir(path):
        raise OptionError(f"option {name}: {path} is a directory")


def check_pid_file(path: str) -> None:
    """Whether nbdkit may write its process id there: over nothing but another one, for it truncates the file.

    A disk image may be at `path`, under this name or another. Raises OptionError.
    """
    check_directory("pid-file", path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OptionError(f"option pid-file: {path} exists and is not a regular file")
        with open(path, "rb") as file:
            found = file.read(_PID_BYTES + 1)
    except FileNotFoundError:
        return
    if len(found) > _PID_BYTES or not (found.strip() or b"0").isdigit():
        raise OptionError(f"option pid-file: {path} exists and is no file of a process id")


def claim_socket(path: str) -> None:
    """Make sure that nothing is at `path`: what a killed server left is removed. Raises Error if it is in use."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise OptionError(
            f"option socket: expected at most {_SOCKET_PATH_BYTES} bytes, found {len(os.fsencode(path))}: {path}"
        )
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        check_directory("socket", path)
        return
    if not stat.S_ISSOCK(mode):
        raise OptionError(f"option socket: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        # A server with a full backlog is a server.
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OptionError(f"option socket: {path} is in use: a server answers there")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def check_port(name: str, host: str, port: int) -> None:
    """Whether something can listen there; `name` is the option's. Raises OptionError."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in infos:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen()
    except OSError as error:
        raise OptionError(f"option {name}: cannot listen on {host} port {port}: {error.strerror}") from None
    except UnicodeError:
        raise OptionError(f"option {name}: {host} is neither an address nor a host's name") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reached_at(host: str) -> str:
    """Where to connect to what listens at `host`, which may be 0.0.0.0 or [::]."""
    try:
        return socket.gethostname() if ipaddress.ip_address(host).is_unspecified else host
    except ValueError:
        return host


def _how_to_attach(options: Options, uri: str, arguments: argparse.Namespace, *, tls: bool) -> str:
    """What to type in another terminal; with TLS only what takes it from the URI."""
    quoted = shlex.quote(uri)
    if arguments.socket is not None:
        nbd_client = f"-unix {shlex.quote(os.path.abspath(arguments.socket))}"
    else:
        nbd_client = f"{_reached_at(arguments.address or '127.0.0.1')} {arguments.port}"
    read_only = ",read-only=on" if options.read_only else ""
    drive = shlex.quote(f"file={uri.replace(',', ',,')},format=raw,if=virtio,discard=unmap{read_only}")
    lines = [f"serving {printable(options.file)} at {uri}"]
    copy = f"  copy        nbdcopy {quoted} copy.raw"
    if tls:
        lines += [
            copy,
            "  TLS         tls-psk-file=FILE or tls-certificates=DIR in the URI; qemu and nbd-client have options",
        ]
    else:
        lines += [
            f"  qemu        qemu-system-x86_64 -m 1G -drive {drive}",
            f"  /dev/nbd0   sudo modprobe nbd && sudo nbd-client {nbd_client} /dev/nbd0",
            copy,
            f"  convert     qemu-img convert -f raw -O qcow2 {quoted} copy.qcow2",
        ]
    if options.metrics is not None:
        lines.append(f"  metrics     http://{options.metrics}/metrics")
    if not arguments.daemonize:
        lines.append("Ctrl-C ends it.")
    return "\n".join(lines)
