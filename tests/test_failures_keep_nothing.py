"""What failed keeps no memory: neither in circles that only a collection breaks, nor in what is raised again and again.

Where a test's comment names a `Breakage`, that change makes the test fail. Through nbdkit: test_adapter.py.
"""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
from stage import PAGES, WIDE, Stage, pending

from nbd_qcow2j import checkpoint
from nbd_qcow2j.driver import Runner
from nbd_qcow2j.errors import DeviceFailed, ReadFailed
from nbd_qcow2j.going import Going
from nbd_qcow2j.steps import Operation, Read, run_simply


def test_requests_of_a_latched_device_leave_nothing_behind() -> None:
    # Breakage: journal/log.py: raise self._failure() -> raise self.failed
    stage = Stage(PAGES)
    log = stage.disk.log
    log.latch(OSError(errno.EIO, "bad"), "write")
    for _ in range(10):
        with pytest.raises(DeviceFailed, match="takes no more writes"):
            run_simply(stage.disk.flush())
    assert log.failed is not None and log.failed.__traceback__ is None


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_request_that_fails_leaves_nothing_for_the_collector(no_collection: None) -> None:
    # Breakage: driver.py: failure = None\n            lock.release() -> lock.release()
    class Held:
        pass

    def failing() -> Operation[None]:
        held = Held()
        alive.append(weakref.ref(held))
        yield Read(stage.engine.file, 0, 512)

    stage, alive = Stage(PAGES), []
    stage.sim.fail("read", 1, times=0)
    with pytest.raises(ReadFailed):
        Runner().run(failing())
    assert alive[0]() is None


def test_a_round_that_fails_leaves_nothing_for_the_collector(no_collection: None) -> None:
    # Breakage: checkpoint.py: left = None\n        held.undo() -> held.undo()
    stage = Stage(replace(WIDE, journal=1 << 19))
    stage.do(pending(stage, 0, 8), pending(stage, 16, 16), stage.flush())
    stage.engine.backing.storage.disk.fail("read", 1, times=0)  # type: ignore[union-attr]
    assert Runner().run(checkpoint.round_(stage.disk))
    assert not Runner().run(checkpoint.round_(stage.disk))
    assert not [each for each in gc.get_objects() if isinstance(each, Going)]
