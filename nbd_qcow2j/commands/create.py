"""`nbd-qcow2j create IMAGE SIZE`: a new, empty image."""

from __future__ import annotations

import argparse
import os
import stat
from typing import Any

from ..errors import OptionError, printable
from ..format.create import new_image
from ..format.header import parse_header
from ..geometry import SECTOR
from ..image.backing import backing_path
from ..options import format_size, parse_size


def add_parser(subparsers: Any) -> None:
    """Add `create` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "create", help="create an empty image", description="Create an empty qcow2 image (version 3). Never overwrites."
    )
    parser.add_argument("image", metavar="IMAGE", help="the file to create")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?",
        help="size of the disk, such as 10G or 1.5T, rounded up to 512 bytes; that of BACKING if left out",
    )  # fmt: skip
    parser.add_argument("-b", "--backing", metavar="BACKING", help="the image beneath, relative to IMAGE")
    parser.add_argument(
        "-F", "--backing-format", metavar="FORMAT", choices=("raw", "qcow2"), help="its format: raw or qcow2"
    )
    parser.add_argument("--cluster-size", metavar="N", default="64K", help="512 to 2M, a power of two (default 64K)")
    parser.add_argument(
        "--refcount-bits",
        metavar="N",
        type=int,
        default=16,
        choices=(1, 2, 4, 8, 16, 32, 64),
        help="1 to 64 (default 16)",
    )
    parser.add_argument("--extended-l2", action="store_true", help="32 subclusters a cluster")


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise OptionError(f"{name}: expected {error}, found {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Create the image. Raises OptionError, OSError."""
    backing = arguments.backing
    if (backing is None) != (arguments.backing_format is None):
        raise OptionError("-b and -F go together: the format of a backing file is never guessed")
    size = _size("size", arguments.size) if arguments.size is not None else None
    if backing is not None:
        path = backing_path(backing, arguments.image)
        if path is None:
            raise OptionError(f"-b: {printable(backing)} names no file, for it begins like a protocol; ./NAME would")
        if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISBLK(mode)):
            raise OptionError(f"-b: {printable(path)} is neither a regular file nor a block device")
        with open(path, "rb") as file:
            # Not what stat says: a block device has no length there.
            length = file.seek(0, os.SEEK_END)
            file.seek(0)
            if arguments.backing_format == "qcow2":
                length = parse_header(file.read(1 << 16), file_size=length, name=path).size
        size = length if size is None else size
    if size is None:
        raise OptionError("size: say how large the disk is, such as 10G")
    size = -(-size // SECTOR) * SECTOR
    writes, length = new_image(
        size, cluster_size=_size("cluster size", arguments.cluster_size), refcount_bits=arguments.refcount_bits,
        backing_name=os.fsencode(backing) if backing is not None else None, backing_format=arguments.backing_format,
        extended_l2=arguments.extended_l2,
    )  # fmt: skip
    # Exclusive: an image that exists is never overwritten.
    with open(arguments.image, "xb") as file:
        try:
            file.truncate(length)
            for offset, data in writes:
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            # Half an image is none, and would be in the way of the next try.
            os.unlink(arguments.image)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, arguments.image) from None
            raise
    print(f"created {printable(arguments.image)}, {format_size(size)}")
    return 0
