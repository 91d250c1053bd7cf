"""`nbd-qcow2j journal IMAGE`: the transactions in the ring, oldest first."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import printable
from ..format.journal import GUEST_DATA, REVOKE_GUEST, REVOKE_HOST, WRITE_DATA
from ._open import add_force_share, looked_into

_NAMES = {WRITE_DATA: "write data", REVOKE_HOST: "revoke host", GUEST_DATA: "guest data", REVOKE_GUEST: "revoke guest"}


def add_parser(subparsers: Any) -> None:
    """Add `journal` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "journal", help="list the transactions of a journal",
        description="List the transactions between the tail and the head of an attached journal. Changes nothing.",
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE")
    add_force_share(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every descriptor")


def run(arguments: argparse.Namespace) -> int:
    """Print it. Raises ImageError."""
    with looked_into(arguments.image, share=arguments.force_share) as (_, _, plan):
        if plan is None:
            if not arguments.json:
                print(f"{printable(arguments.image)} has no journal attached")
            return 0
        if not plan.transactions and not arguments.json:
            print(f"{printable(arguments.image)} has an attached journal without transactions")
        for transaction in plan.transactions:
            position = (plan.slot.tail_position + transaction.start) % plan.location.ring_length
            if arguments.json:
                records = [
                    {"type": _NAMES[each.type], "offset": each.offset, "length": each.length}
                    for each in transaction.records
                ]
                facts = {"sequence": transaction.sequence, "position": position, "length": transaction.length}
                print(json.dumps({**facts, "crc32c": f"{transaction.crc:08x}", "descriptors": records}))
                continue
            parts = []
            for kind, name in _NAMES.items():
                lengths = [each.length for each in transaction.records if each.type == kind]
                if lengths:
                    parts.append(f"{name} {len(lengths)} ({sum(lengths)} bytes)")
            print(f"{transaction.sequence} at {position}, {transaction.length} bytes: {', '.join(parts)}")
    return 0
