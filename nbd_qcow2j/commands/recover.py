"""`nbd-qcow2j recover IMAGE`: replay an attached journal, send everything home, detach."""

from __future__ import annotations

import argparse
from typing import Any

from ..driver import open_device
from ..errors import printable
from ..format.header import INCOMPAT_JOURNAL
from ..locks import READER
from ..opening import read_header
from ..options import parse_options
from ..steps import run_simply
from ..storage import FileStorage


def add_parser(subparsers: Any) -> None:
    """Add `recover` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "recover", help="make a plain qcow2 file of an image whose server was killed",
        description="Replay the journal of an image that was not closed cleanly, and detach it. Needs no server.",
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE")


def run(arguments: argparse.Namespace) -> int:
    """Recover. Raises ImageError, DeviceFailed."""
    options = parse_options([("file", arguments.image)])
    with FileStorage.open(options.file, read_only=True) as file:
        file.lock(READER)
        header, _ = run_simply(read_header(file, name=arguments.image))
    name = printable(arguments.image)
    if not header.incompatible & INCOMPAT_JOURNAL:
        print(f"{name} has no journal attached: there is nothing to recover")
        return 0
    device = open_device(options, recover=True)
    count = device.disk.replayed_transactions
    device.close()
    if device.disk.corrupt:
        print(f"{name} is marked corrupt: {device.disk.corrupt}; qemu-img check -r all mends what can be")
    print(f"{name}: {count} transactions replayed, journal detached; it is a plain qcow2 file")
    return 0
