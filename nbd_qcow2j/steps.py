"""What an operation of the engine asks its driver to do: the only way the engine touches a disk.

An operation is a generator. Between two `yield`s it runs in one hold of the state lock and changes
memory only; what it yields is a `Step`, done *without* the lock, whose result is sent back. So

    Invariant: a `yield` is the only place where another operation can come between.

`driver.py` runs operations with real files and threads; tests run the same generators one step at a
time, in any order, with a cut between any two. What a step raises (an `OSError` of the disk, an `ImageError`
of what was read, a `MemoryError`) is thrown into the operation: what it holds is given back under the lock. A read
that fails is a `ReadFailed`: an `OSError` is of a write, a sync, or room, and may be a lost write.

A `Wait` names a `Gate`; the operation is run again when the gate was opened after it yielded, and looks
again at its condition: `while not condition: yield Wait(gate)`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ReadFailed

if TYPE_CHECKING:
    from .storage import Storage

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Step:
    """One thing to do outside the lock. `perform` does it and returns what is sent back."""

    __slots__ = ()

    def perform(self) -> Any:
        raise AssertionError(f"{type(self).__name__} is for the driver")


def _read(storage: Storage, buffer: bytearray | memoryview, offset: int) -> None:
    try:
        storage.read_into(buffer, offset)
    except OSError as error:
        raise ReadFailed(f"{storage.name}: cannot read {len(buffer)} bytes at {offset}: {error.strerror}") from error


class Read(Step):
    """Read `length` bytes at `offset`, zeros past the end of the file. Sends back a bytearray."""

    __slots__ = ("length", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, length: int) -> None:
        self.storage, self.offset, self.length = storage, offset, length

    def perform(self) -> bytearray:
        buffer = bytearray(self.length)
        _read(self.storage, buffer, self.offset)
        return buffer


class ReadInto(Step):
    """Fill `buffer` from `offset`, zeros past the end of the file."""

    __slots__ = ("buffer", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, buffer: bytearray | memoryview) -> None:
        self.storage, self.offset, self.buffer = storage, offset, buffer

    def perform(self) -> None:
        _read(self.storage, self.buffer, self.offset)


class Write(Step):
    """Write the buffers one after the other from `offset`. Not durable before a `Sync`."""

    __slots__ = ("buffers", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, buffers: Sequence[Buffer]) -> None:
        self.storage, self.offset, self.buffers = storage, offset, buffers

    def perform(self) -> None:
        self.storage.write(self.offset, self.buffers)


class WriteSync(Write):
    """Write the buffers and make this range, and nothing else, durable (RWF_DSYNC)."""

    __slots__ = ()

    def perform(self) -> None:
        self.storage.write_sync(self.offset, self.buffers)


class Sync(Step):
    """Make durable everything that was written before this step began (fdatasync)."""

    __slots__ = ("storage",)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def perform(self) -> None:
        self.storage.sync()


class Allocate(Step):
    """Give the range space in the host file system; what was not written reads as zeros."""

    __slots__ = ("length", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, length: int) -> None:
        self.storage, self.offset, self.length = storage, offset, length

    def perform(self) -> None:
        self.storage.allocate(self.offset, self.length)


class Punch(Allocate):
    """Give the range's space back to the host file system; it reads as zeros afterwards."""

    __slots__ = ()

    def perform(self) -> None:
        self.storage.punch(self.offset, self.length)


class ZeroRange(Allocate):
    """Make the range read as zeros and give it space: what a cluster must be before it is handed out."""

    __slots__ = ()

    def perform(self) -> None:
        self.storage.zero_range(self.offset, self.length)


class Truncate(Step):
    """Set the length of the file."""

    __slots__ = ("size", "storage")

    def __init__(self, storage: Storage, size: int) -> None:
        self.storage, self.size = storage, size

    def perform(self) -> None:
        self.storage.truncate(self.size)


class FileSize(Step):
    """Send back the length of the file in bytes."""

    __slots__ = ("storage",)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def perform(self) -> int:
        return self.storage.size()


class DataRuns(Step):
    """Send back (length, whether it may hold data) of the pieces of a range; what may not reads as zeros."""

    __slots__ = ("length", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, length: int) -> None:
        self.storage, self.offset, self.length = storage, offset, length

    def perform(self) -> list[tuple[int, bool]]:
        return self.storage.data_runs(self.offset, self.length)


class DropCached(Step):
    """Let the page cache forget what it need not keep: reads show what is on the disk. A hint."""

    __slots__ = ("storage",)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def perform(self) -> None:
        self.storage.drop_cached()


class Compute(Step):
    """Call a function of no arguments that takes long and touches no shared state (inflate)."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def perform(self) -> Any:
        return self.function()


class Pause(Step):
    """Nothing to do: others may have the lock. For who has much to change, none of it urgent."""

    __slots__ = ()

    def perform(self) -> None:
        return


class Batch(Step):
    """Do the steps in order, as one. Sends back the list of their results."""

    __slots__ = ("steps",)

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def perform(self) -> list[Any]:
        return [step.perform() for step in self.steps]


class Gate:
    """Something operations wait for. The engine calls `open()` when a waiter should look again."""

    __slots__ = ("name", "waiters")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiters: list[Callable[[], object]] = []

    def open(self) -> None:
        """Wake everybody who waits here. Called with the state lock held."""
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for wake in waiters:
                wake()


class Wait(Step):
    """Come back when the gate was opened. The driver must register with the gate under the same hold."""

    __slots__ = ("gate",)

    def __init__(self, gate: Gate) -> None:
        self.gate = gate


Operation = Generator[Step, Any, T]


def run_simply(operation: Operation[T]) -> T:
    """Run an operation where nothing else runs (opening, the command line): a `Wait` is an error."""
    result: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = operation.send(result) if failure is None else operation.throw(failure)
        except StopIteration as stop:
            value: T = stop.value
            return value
        result, failure = None, None
        try:
            result = step.perform()
        except BaseException as error:
            failure = error
