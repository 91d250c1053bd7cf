"""`nbd-qcow2j check IMAGE`: refcounts against references, with what an attached journal holds laid over them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from typing import Any

from ..errors import ImageError, NotQcow2, printable
from ..format.header import (
    INCOMPAT_CORRUPT,
    INCOMPAT_DATA_FILE,
    INCOMPAT_DIRTY,
    INCOMPAT_JOURNAL,
    INCOMPAT_KNOWN,
    check_usable,
)
from ..geometry import SECTOR
from ..image.check import check_image
from ..image.findings import CheckReport
from ..image.repair import plan_repair, without_marks
from ..image.snapshots import Reader
from ..locks import WRITER
from ..opening import HEADER_READ, read_header, replayed_header
from ..steps import run_simply
from ..storage import FileStorage
from ._open import looked_into

NOT_SUPPORTED = 63
"""Exit code of `qemu-img check` for a format that it cannot check."""


def add_parser(subparsers: Any) -> None:
    """Add `check` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check", help="compare refcounts with references",
        description="Check an image as `qemu-img check` does, an attached journal included. Changes nothing "
        "unless told to repair.",
        epilog="Exit codes: 0 well, 1 could not be checked, 2 corrupt, 3 leaked clusters only, 63 not a qcow2 image.",
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="as JSON, with the names of `qemu-img check --output=json`")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing; the exit code says it")
    parser.add_argument(
        "--repair", choices=("leaks", "all"),
        help="leaks: free what nothing names; all: mend refcounts and COPIED flags too. The bytes that change are "
        "kept in IMAGE.before-repair-N first; entries are never guessed at. Then the image is checked",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Check; returns the exit code. Raises ImageError."""
    try:
        return _run(arguments)
    except NotQcow2 as error:
        print(f"nbd-qcow2j: {printable(str(error))}", file=sys.stderr)
        return NOT_SUPPORTED


def _run(arguments: argparse.Namespace) -> int:
    if arguments.repair:
        for line in _repair(arguments.image, everything=arguments.repair == "all"):
            if not arguments.quiet:
                print(printable(line), file=sys.stderr if arguments.json else sys.stdout)
    with looked_into(arguments.image) as (file, found, plan):
        header = found
        if header.incompatible & (INCOMPAT_DATA_FILE | ~INCOMPAT_KNOWN):
            check_usable(header, write=False, name=arguments.image)

        def read(offset: int, length: int) -> bytearray:
            buffer = bytearray(length)
            file.read_into(buffer, offset)
            return buffer

        size, journal, transactions = file.size(), None, 0
        overlaid: Reader = read
        if plan is not None:
            # The state that the next opening will see: what is only in the journal counts.
            overlaid = plan.overlay(read)
            size = max(size, *(offset + SECTOR for offset in plan.sectors), 0)
            header = replayed_header(
                found, bytes(overlaid(0, HEADER_READ)), file_size=size, name=arguments.image
            )  # fmt: skip
            journal, transactions = (plan.location.offset, plan.location.length), len(plan.transactions)
        report = check_image(header, overlaid, file_size=size, name=arguments.image, journal=journal)
    if arguments.quiet:
        return report.exit_code
    if arguments.json:
        facts = report.to_json(arguments.image)
        if journal is not None:
            facts["journal-transactions"] = transactions
        print(json.dumps(facts, indent=4))
    else:
        _print(report, printable(arguments.image), transactions if journal is not None else None)
        bits = header.incompatible
        marks = [word for bit, word in ((INCOMPAT_DIRTY, "dirty"), (INCOMPAT_CORRUPT, "corrupt")) if bits & bit]
        if marks:
            print(
                f"{printable(arguments.image)} is marked {' and '.join(marks)}, and is not served for writing; "
                "check --repair all takes that away where nothing else is wrong"
            )
    return report.exit_code


def _repair(path: str, *, everything: bool) -> list[str]:
    """Mend what is safe; returns what to tell. Raises ImageError."""
    with FileStorage.open(path, read_only=False) as file:
        file.lock(WRITER)
        header, _ = run_simply(read_header(file, name=path))
        if header.incompatible & INCOMPAT_JOURNAL:
            raise ImageError(f"{path} has an attached journal: nbd-qcow2j recover {shlex.quote(path)} comes first")
        check_usable(header, write=False, name=path)

        def read(offset: int, length: int) -> bytearray:
            buffer = bytearray(length)
            file.read_into(buffer, offset)
            return buffer

        size = file.size()
        plan = plan_repair(header, read, file_size=size, name=path, everything=everything)
        told = list(plan.left)
        ranges = plan.ranges()
        marked = everything and bool(header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT))
        if ranges or marked:
            backup = _keep(path, [(0, bytes(read(0, SECTOR))), *((at, bytes(read(at, n))) for at, n in ranges)])
            told.append(f"what {path} had in {len(ranges) + marked} places that change is kept in {backup}")
        for step in plan.steps:
            for offset, data in step:
                file.write(offset, [data])
            file.sync()
        if marked and not check_image(header, read, file_size=file.size(), name=path).exit_code:
            file.write_sync(0, [without_marks(bytes(read(0, SECTOR)))])
            told.append("it is no longer marked dirty or corrupt")
        file.sync()
    return told


def _keep(path: str, old: list[tuple[int, bytes]]) -> str:
    """Write the old bytes beside the image, one JSON object a line, durably; returns the file's name."""
    for number in itertools.count(1):
        name = f"{path}.before-repair-{number}"
        try:
            with open(name, "x", encoding="ascii") as out:
                for offset, data in old:
                    out.write(json.dumps({"offset": offset, "hex": data.hex()}) + "\n")
                out.flush()
                os.fsync(out.fileno())
        except FileExistsError:
            continue
        # Crash: without this the image may be changed while its backup has no name yet.
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return name
    raise AssertionError


def _print(report: CheckReport, name: str, transactions: int | None) -> None:
    for message in report.messages:
        print(printable(message), file=sys.stderr)
    if report.messages_left_out:
        print(f"... and {report.messages_left_out} more", file=sys.stderr)
    if transactions is not None:
        print(f"{name} has an attached journal of {transactions} transactions, counted as they will be replayed")
    if report.corruptions:
        print(f"{report.corruptions} corruptions: data may be lost already, or by the next write; restore from a copy")
    if report.leaks:
        print(f"{report.leaks} leaked clusters: space is lost, no data at risk; --repair leaks frees it")
    if report.check_errors:
        print(f"{report.check_errors} errors while checking: what is said here is not complete")
    if not report.exit_code:
        print(f"No errors were found in {name}.")
    total = report.total_clusters
    percent = 100 * report.allocated_clusters / total if total else 0.0
    print(
        f"{report.allocated_clusters}/{total} clusters allocated ({percent:.2f} %), "
        f"{report.fragmented_clusters} fragmented, {report.compressed_clusters} compressed; "
        f"the image ends at byte {report.image_end_offset}"
    )
