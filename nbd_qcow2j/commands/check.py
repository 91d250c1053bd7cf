"""`nbd-qcow2j check IMAGE`: refcounts against references, with what an attached journal holds laid over them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..format.header import INCOMPAT_DATA_FILE, INCOMPAT_KNOWN, check_usable
from ..geometry import SECTOR
from ..image.check import check_image
from ..image.findings import CheckReport
from ..image.snapshots import Reader
from ..opening import HEADER_READ, replayed_header
from ._open import looked_into


def add_parser(subparsers: Any) -> None:
    """Add `check` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check", help="compare refcounts with references",
        description="Check an image as `qemu-img check` does, an attached journal included. Changes nothing.",
        epilog="Exit codes: 0 well, 1 could not be checked, 2 corrupt, 3 leaked clusters only.",
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="as JSON, with the names of `qemu-img check --output=json`")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing; the exit code says it")


def run(arguments: argparse.Namespace) -> int:
    """Check; returns the exit code. Raises ImageError."""
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
        _print(report, arguments.image, transactions if journal is not None else None)
    return report.exit_code


def _print(report: CheckReport, name: str, transactions: int | None) -> None:
    for message in report.messages:
        print(message, file=sys.stderr)
    if report.messages_left_out:
        print(f"... and {report.messages_left_out} more", file=sys.stderr)
    if transactions is not None:
        print(f"{name} has an attached journal of {transactions} transactions, counted as they will be replayed")
    if report.corruptions:
        print(f"{report.corruptions} corruptions: data may be lost already, or by the next write; restore from a copy")
    if report.leaks:
        print(f"{report.leaks} leaked clusters: space is lost, no data at risk; qemu-img check -r leaks frees it")
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
