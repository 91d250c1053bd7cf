"""`nbd-qcow2j info IMAGE`: what an image is, and what its journal holds."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..errors import printable
from ..format.header import INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY, INCOMPAT_KNOWN
from ..options import format_size
from ._open import add_force_share, looked_into

_ONLY_IF_SO = frozenset({"dirty", "corrupt", "encrypted", "external-data-file", "unknown-features"})
"""What is worth a line where it stands in the way of serving."""


def add_parser(subparsers: Any) -> None:
    """Add `info` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info", help="show what an image is", description="Show an image's header and its journal. Changes nothing."
    )
    parser.add_argument("image", metavar="IMAGE")
    add_force_share(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print it. Raises ImageError."""
    with looked_into(arguments.image, share=arguments.force_share) as (file, header, plan):
        facts: dict[str, Any] = {
            "filename": arguments.image,
            "format": "qcow2",
            "version": header.version,
            "virtual-size": header.size,
            "file-size": file.size(),
            "actual-size": os.stat(arguments.image).st_blocks * 512,
            "cluster-size": header.geometry.cluster_size,
            "refcount-bits": header.geometry.refcount_bits,
            "extended-l2": header.geometry.extended_l2,
            "compression-type": ("zlib", "zstd")[header.compression_type],
            "dirty": bool(header.incompatible & INCOMPAT_DIRTY),
            "corrupt": bool(header.incompatible & INCOMPAT_CORRUPT),
            "encrypted": bool(header.crypt_method),
            "external-data-file": bool(header.incompatible & INCOMPAT_DATA_FILE),
            "unknown-features": [bit for bit in range(64) if header.incompatible & ~INCOMPAT_KNOWN & 1 << bit],
            "snapshots": header.snapshot_count,
            "backing-filename": os.fsdecode(header.backing_name) if header.backing_name else None,
            "backing-format": header.backing_format,
            "journal": None,
        }
        if plan is not None:
            facts["journal"] = {
                "attached": True,
                "offset": plan.location.offset,
                "size": plan.location.ring_length,
                "used": len(plan.log),
                "transactions": len(plan.transactions),
                "metadata-sectors": len(plan.sectors),
                "pending-pages": len(plan.pages),
                "uuid": plan.slot.uuid.hex(),
            }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if key == "journal":
            if value is None:
                print("journal: none is attached")
            else:
                # Who looks at it without a lock does not know whether somebody serves it.
                why = "is being served, or " if arguments.force_share else ""
                print(
                    f"journal: attached, {value['transactions']} transactions in {format_size(value['used'])} of "
                    f"{format_size(value['size'])}; the image {why}was not closed cleanly: serve it "
                    "again, or nbd-qcow2j recover"
                )
        elif key in _ONLY_IF_SO and not value:
            continue
        elif value is not None:
            text = (
                f"{format_size(value)} ({value} bytes)"
                if key.endswith("-size")
                else str(value).lower()
                if isinstance(value, bool)
                else ", ".join(f"incompatible bit {bit}" for bit in value)
                if isinstance(value, list)
                else printable(str(value))
            )
            print(f"{key}: {text}")
    return 0
