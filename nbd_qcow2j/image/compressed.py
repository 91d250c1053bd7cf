"""Compressed clusters: inflated to exactly one cluster, never more. Spec: "Compressed Clusters Descriptor"."""

from __future__ import annotations

import zlib

import zstandard

from ..errors import ImageError

ZLIB, ZSTD = 0, 1


def inflate(data: bytes, compression_type: int, cluster_size: int, *, where: str) -> bytes:
    """The cluster that `data` holds; what follows it up to the end of its last sector is ignored.

    Never inflates past a cluster. Raises ImageError where the data is damaged or short.
    """
    try:
        if compression_type == ZLIB:
            # qemu writes raw deflate with a window of 4 KiB; the largest window reads it too.
            content = zlib.decompressobj(-15).decompress(data, cluster_size)
        elif compression_type == ZSTD:
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
                content = _read_up_to(reader, cluster_size)
        else:
            raise ImageError("compression type is not known", where=where, expected="0 or 1", found=compression_type)
    except (zlib.error, zstandard.ZstdError) as error:
        raise ImageError(f"compressed data is damaged ({error})", where=where) from None
    if len(content) != cluster_size:
        raise ImageError("compressed data is too short", where=where, expected=cluster_size, found=len(content))
    return content


def _read_up_to(reader: zstandard.ZstdDecompressionReader, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = reader.read(length)
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
