"""What a request is answered while the image is being closed: nothing that the file does not hold then."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import is_attached, run

from nbd_qcow2j.driver import Device, open_device
from nbd_qcow2j.errors import DeviceFailed, Error, RequestError
from nbd_qcow2j.options import parse_options
from nbd_qcow2j.storage import FileStorage

OLD, NEW = b"old!" * 1024, b"new!" * 1024
AT = 1 << 20


@pytest.fixture
def device(make_image: Callable[..., Path]) -> Device:
    device = open_device(parse_options([("file", str(make_image()))]))
    device.start()
    device.write(OLD, AT, fua=True)
    return device


def close(device: Device, monkeypatch: pytest.MonkeyPatch, at_sync: Callable[[], object]) -> None:
    """Close it, with `at_sync` called after each sync of it: another thread may come in there, for no lock is held."""
    sync = FileStorage.sync

    def then(file: FileStorage) -> None:
        sync(file)
        at_sync()

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "sync", then)
        device.close()


def holds(device: Device, tmp_path: Path) -> bytes:
    raw = tmp_path / "raw"
    run("qemu-img", "check", "-q", device.options.file)
    run("qemu-img", "convert", "-O", "raw", device.options.file, raw)
    return raw.read_bytes()[AT : AT + len(OLD)]


def test_requests_that_come_while_it_is_closed_are_refused(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused: list[int] = []

    def ask() -> None:
        for request in (
            lambda: device.write(NEW, AT),
            lambda: device.write_zeroes(AT, 4096, may_trim=True, fast=False, fua=False),
            lambda: device.trim(AT, 4096, fua=False),
            device.flush,
        ):
            with pytest.raises(RequestError) as told:
                request()
            refused.append(told.value.errno)
        # Reading goes on.
        found = bytearray(len(OLD))
        device.read_into(found, AT)
        assert found == OLD

    close(device, monkeypatch, ask)
    assert refused
    assert set(refused) == {errno.ESHUTDOWN}
    assert holds(device, tmp_path) == OLD


def test_a_request_under_way_while_the_journal_is_detached_is_not_answered_as_durable(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # It was let in before the image was closed, and goes on when the header names the journal no more.
    answers: list[object] = []

    def go_on() -> None:
        if answers or is_attached(Path(device.options.file)):
            return
        answers.append("asked")
        monkeypatch.setattr(device, "_refuses", False)
        try:
            device.write(NEW, AT, fua=True)
            answers.append("durable")
        except Error as error:
            answers.append(type(error))
        assert device.statistics().state == "serving"

    close(device, monkeypatch, go_on)
    assert answers == ["asked", DeviceFailed]
    assert holds(device, tmp_path) == OLD


def test_what_fails_while_it_is_detached_is_what_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        if not is_attached(Path(device.options.file)):
            raise OSError(errno.EIO, "the cable")

    with pytest.raises(DeviceFailed, match="the cable"):
        close(device, monkeypatch, fail)
    assert device.statistics().state == "failed"
    # The header says so already: nothing is lost.
    subprocess.run(["qemu-img", "check", "-q", device.options.file], check=True)
