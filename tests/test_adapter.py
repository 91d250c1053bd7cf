"""What a client is promised, by flags and by what it then gets; which errno it is told, and what stays in the log.

Through nbdkit, libnbd and nbdinfo, over a real socket.
"""

from __future__ import annotations

import errno
import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import START_SECONDS, Server, answers, is_attached, poll, run, write_plugin

from nbd_qcow2j.format.tables import OFFSET_MASK

CLUSTER = 1 << 16

# ---- What a client is promised ----------------------------------------------------------------------


def nbdinfo(server: Server) -> dict[str, Any]:
    export: dict[str, Any] = json.loads(run("nbdinfo", "--json", "--no-content", server.uri).stdout)["exports"][0]
    return export


def test_every_flag_that_nbdkit_offers_is_set(server: Server) -> None:
    export = nbdinfo(server)
    assert export["export-size"] == 64 << 20
    for flag in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache", "df"):
        assert export[f"can_{flag}"] is True, flag
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] in range(4096, CLUSTER + 1)
    assert export["block_size_maximum"] >= 1 << 20


def test_fua_and_cache_are_native_not_emulated(serve: Callable[..., Server], image: Path) -> None:
    # nbdkit emulates FUA by a flush of everything, and cache by a read: its debug log says which it does.
    import nbd  # noqa: PLC0415

    server = serve(image, "--", "-v")
    handle = server.connect()
    before = len(server.log)
    handle.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
    handle.cache(4096, 4096)
    requests = server.log[before:]
    assert "python: pwrite count=4096 offset=0 fua=1" in requests
    assert "python: cache count=4096 offset=4096" in requests
    assert "python: flush" not in requests
    assert "python: pread" not in requests


def test_the_one_export_is_listed_and_described_without_a_path(server: Server, image: Path) -> None:
    exports = json.loads(run("nbdinfo", "--json", "--list", server.uri).stdout)["exports"]
    assert [export["export-name"] for export in exports] == [""]
    assert "qcow2" in exports[0]["description"]
    assert "/" not in exports[0]["description"]
    assert image.name not in json.dumps(exports)


def test_what_one_connection_has_flushed_another_reads(server: Server) -> None:
    one, other = server.connect(), server.connect()
    assert one.can_multi_conn()
    one.pwrite(b"\x11" * 5000, 1000)
    other.pwrite(b"\x22" * 100, 3000)
    one.flush()
    expected = b"\x11" * 2000 + b"\x22" * 100 + b"\x11" * 2900
    assert other.pread(5000, 1000) == expected
    assert one.pread(5000, 1000) == expected


def test_many_requests_at_once_answer_the_right_ones(server: Server) -> None:
    # 64 writes, then 64 reads, all under way together: each reply must carry its own data.
    import nbd  # noqa: PLC0415

    handle = server.connect()
    pieces = [bytes([number]) * 4096 for number in range(64)]
    for number, piece in enumerate(pieces):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(piece)), 8192 * number)
    while handle.aio_in_flight():
        handle.poll(-1)
    buffers = [nbd.Buffer(4096) for _ in pieces]
    for number, buffer in enumerate(buffers):
        handle.aio_pread(buffer, 8192 * number)
    while handle.aio_in_flight():
        handle.poll(-1)
    assert [bytes(buffer.to_bytearray()) for buffer in buffers] == pieces


def test_extents_tell_data_from_zeros_and_holes(server: Server) -> None:
    handle = server.connect("base:allocation")
    handle.pwrite(b"x" * CLUSTER, CLUSTER)
    handle.zero(CLUSTER, 4 * CLUSTER)
    handle.flush()
    found: list[tuple[int, int]] = []

    def note(context: str, offset: int, entries: list[int], error: Any) -> int:
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(64 << 20, 0, note)
    flat = [flags for length, flags in found for _ in range(length // CLUSTER)]
    assert len(flat) == 1024
    assert flat[0] & 2, "never written: zero"
    assert flat[1] == 0, "data"
    assert all(flags & 2 for flags in flat[2:]), "zeros"


def test_a_write_to_a_read_only_server_is_refused_by_flag_and_errno(serve: Callable[..., Server], image: Path) -> None:
    import nbd  # noqa: PLC0415

    server = serve(image, "--read-only")
    assert not is_attached(image)
    assert nbdinfo(server)["is_read_only"] is True
    handle = server.connect()
    handle.set_strict_mode(0)
    with pytest.raises(nbd.Error) as caught:
        handle.pwrite(b"x" * 512, 0)
    assert caught.value.errnum == errno.EPERM
    assert handle.pread(512, 0) == bytes(512)


# ---- Errors: what a client is told, what the log says ------------------------------------------------

FAILING = """
import errno
from nbd_qcow2j.errors import DeviceFailed, RequestError

class Replaced:
    size, read_only, description = 1 << 20, False, "failing"
    start = close = lambda self, *cpus: None
    def block_sizes(self):
        return 1, 4096, 1 << 25
    def write_zeroes(self, offset, length, **how):
        raise RequestError(errno.ENOTSUP if how["fast"] else errno.ENOSPC, "no")
    def read_into(self, buffer, offset):
        match offset >> 12:
            case 0: raise RequestError(errno.ENOSPC, "the reason for ENOSPC at /secret/path")
            case 1: raise OSError(errno.EROFS, "Read-only file system", "/secret/path")
            case 2: raise DeviceFailed("latched: /secret/path")
            case 3: raise KeyError("/secret/path")
            case 4: raise MemoryError
            case 5: raise OSError(errno.EBADF, "Bad file descriptor")
            case 6: raise RequestError(errno.ENOTSUP, "not supported")
            case 7: raise OSError(errno.EDQUOT, "Disk quota exceeded")
            case 8: raise RequestError(errno.EINVAL, "no")
        buffer[:] = bytes(len(buffer))
"""


def test_each_error_has_its_errno_and_the_reason_stays_in_the_log(tmp_path: Path, short_path: Path) -> None:
    # A device that fails in every way at once, behind the real adapter, nbdkit and libnbd.
    import nbd  # noqa: PLC0415

    script, path, log = tmp_path / "failing.py", short_path / "nbd.sock", tmp_path / "log"
    write_plugin(script, FAILING)
    words = ["nbdkit", "-f", "-U", str(path), "python", str(script), "file=/dev/null"]
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as process:
        try:
            poll(lambda: answers(path), what="the server answers", seconds=START_SECONDS)
            handle = nbd.NBD()
            handle.connect_unix(str(path))
            expected = [
                errno.ENOSPC, errno.EPERM, errno.EIO, errno.EIO, errno.ENOMEM,
                errno.EIO, errno.EINVAL, errno.ENOSPC, errno.EINVAL,
            ]  # fmt: skip
            # ENOTSUP is for fast zeroes only; nbdkit makes it EINVAL elsewhere, as the protocol wants.
            for flags, code in ((nbd.CMD_FLAG_FAST_ZERO, errno.ENOTSUP), (0, errno.ENOSPC)):
                with pytest.raises(nbd.Error) as caught:
                    handle.zero(4096, 0, flags)
                assert caught.value.errnum == code
            for number, code in enumerate(expected):
                with pytest.raises(nbd.Error) as caught:
                    handle.pread(512, number << 12)
                assert caught.value.errnum == code, (number, errno.errorcode[caught.value.errnum])
                assert "secret" not in caught.value.string
            assert handle.pread(512, 9 << 12) == bytes(512), "the connection lives on"
        finally:
            process.terminate()
    lines = log.read_text().splitlines()
    assert "Traceback" not in log.read_text()
    assert len([line for line in lines if "pread: error:" in line]) == len(expected)
    assert any(line.endswith("pread: error: the reason for ENOSPC at /secret/path") for line in lines)
    assert any("internal error: KeyError" in line for line in lines)


def test_a_request_that_fails_keeps_no_memory(
    make_image: Callable[..., Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    # nbdkit never frees what a callback raised: a MiB of compressed cluster stayed for each of these.
    # Breakage: refusals.py: each.__traceback__ = None -> pass
    import nbd  # noqa: PLC0415

    raw, path = tmp_path / "raw", tmp_path / "compressed.qcow2"
    raw.write_bytes(random.Random(1).randbytes(1 << 20) + bytes(1 << 20))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M", raw, path)
    content = bytearray(path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & OFFSET_MASK
    # Spec: "Compressed Clusters Descriptor": the offset has 62 - (cluster_bits - 8) bits.
    at = int.from_bytes(content[l2 : l2 + 8], "big") & (1 << 49) - 1
    content[at : at + 64] = b"\xff" * 64
    path.write_bytes(content)
    server = serve(path, "--read-only")
    handle = server.connect()

    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(nbd.Error) as caught:
                handle.pread(4096, 0)
            assert caught.value.errno == "EIO"

    def resident_kib() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[1])  # type: ignore[index]

    fail(10)
    before = resident_kib()
    fail(90)
    assert resident_kib() - before < 30 << 10


def test_a_trim_is_one_also_where_freed_space_is_kept(image: Path, serve: Callable[..., Server]) -> None:
    # discard=false is about the host file.
    # Breakage: driver.py: self._change(lambda: changes.zero(self.disk, offset, length, trim=True -> if
    # self.options.discard: (the same)
    for discard in ("true", "false"):
        server = serve(image, "--discard", discard)
        handle = server.connect()
        handle.pwrite(b"x" * (4 << 20), 0)
        handle.trim(4 << 20, 0)
        assert handle.pread(4 << 20, 0) == bytes(4 << 20)
        handle.flush()
        server.stop()
        assert [each["zero"] for each in json.loads(run("qemu-img", "map", "--output=json", image).stdout)] == [True]
    run("qemu-img", "check", "-q", image)
