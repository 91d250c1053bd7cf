"""Runs several operations of the engine interleaved, one step at a time, in an order that a test chooses.

The engine's operations are generators of steps (`nbd_qcow2j/steps.py`). A driver runs them with threads; this
runs them in one thread and lets the test decide who is next, so that an order is a list of numbers that can
be chosen, enumerated, or drawn and replayed. A task goes on by *moves*; between two moves any other task
may come:

    begin    what the last `yield` asked for begins: a read is done, a write is in the page cache but has
             not returned, a sync has looked at what it will cover
    return   it returns (a synchronous write or a sync is durable), and the operation runs up to its next yield

A task that yielded `Wait(gate)` can move only after somebody opened that gate. The steps of a `Batch` are
begun and returned one by one. With `whole_steps` a step is one move: fewer orders, for enumeration.

Nothing is pending but what the moves have done: after any number of moves `disk.crash_states` or
`disk.kill` show what a cut there leaves, with the steps in flight open.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Protocol

from simdisk import SimStorage

from nbd_qcow2j.errors import Error
from nbd_qcow2j.steps import Batch, Operation, Step, Sync, Wait, Write, WriteSync


class Deadlock(AssertionError):
    """Operations are unfinished, and each waits for a gate."""


class Chooser(Protocol):
    """Who decides: `random.Random` does, and `Order`."""

    def randrange(self, stop: int, /) -> int: ...


class Order:
    """The order with these decisions, the rest of them 0; keeps what was decided between how many."""

    def __init__(self, decisions: list[int]) -> None:
        self.decisions = decisions
        self.made: list[tuple[int, int]] = []

    def randrange(self, stop: int, /) -> int:
        at = len(self.made)
        choice = self.decisions[at] if at < len(self.decisions) else 0
        self.made.append((choice, stop))
        return choice

    def __repr__(self) -> str:
        return f"Order({[choice for choice, _ in self.made]})"


def every_order(limit: int) -> Iterator[Order]:
    """Every order there is, depth first, at most `limit`: run the scenario anew with each."""
    decisions: list[int] | None = []
    for _ in range(limit):
        if decisions is None:
            return
        order = Order(decisions)
        yield order
        made = order.made
        while made and made[-1][0] + 1 >= made[-1][1]:
            made.pop()
        decisions = [choice for choice, _ in made[:-1]] + [made[-1][0] + 1] if made else None


class Task:
    """One operation on its way. `result` or `error` is set when it is `done`."""

    def __init__(self, name: str, operation: Operation[Any], *, daemon: bool) -> None:
        self.name = name
        self.daemon = daemon
        self.done = False
        self.result: Any = None
        self.error: Error | OSError | None = None
        self.waits_for: str = ""
        """Name of the gate; empty while it can move."""
        self.trace: list[str] = []
        """What it did, for the message of a failing test."""
        self._operation = operation
        self._stack: list[tuple[list[Step], list[Any]]] = []
        """Batches on the way: the steps still to do, and the results so far."""
        self._step: Step | None = None
        self._begun: Any = None
        self._in_flight = False

    @property
    def step(self) -> Step | None:
        """What its last `yield` asked for: to be begun, or in flight."""
        return None if self.done else self._step

    def move(self, *, whole_steps: bool = False) -> None:
        """Begin the step, or return from it and run up to the next."""
        if self._step is not None and not self._in_flight:
            try:
                self._begin(self._step)
            except (OSError, Error) as error:
                self._in_flight = False
                self._stack.clear()
                return self._run(failure=error)
            # To look again after a wait is one move.
            if not whole_steps and not isinstance(self._step, Wait):
                return None
        if self._step is None:
            return self._run()
        try:
            result = self._return(self._step)
        except OSError as error:
            self._stack.clear()
            return self._run(failure=error)
        return self._next(result)

    def _next(self, result: Any) -> None:
        """Go on with the rest of a batch, else with the operation."""
        while self._stack:
            rest, results = self._stack[-1]
            results.append(result)
            if rest:
                return self._issue(rest.pop(0))
            self._stack.pop()
            result = results
        return self._run(result)

    def _run(self, result: Any = None, *, failure: Exception | None = None) -> None:
        """One hold of the lock: the operation's code up to its next yield."""
        self._step = None
        try:
            step = self._operation.send(result) if failure is None else self._operation.throw(failure)
        except StopIteration as stop:
            self.done, self.result = True, stop.value
        except (Error, OSError) as error:
            self.done, self.error = True, error
        else:
            self._issue(step)

    def _issue(self, step: Step) -> None:
        while isinstance(step, Batch) and step.steps:
            first, *rest = step.steps
            self._stack.append((rest, []))
            step = first
        self._step = step
        if isinstance(step, Wait):
            # Under the same hold as the yield, as the driver does: no opening is missed.
            self.waits_for = step.gate.name or "?"
            step.gate.waiters.append(self._wake)

    def _wake(self) -> None:
        self.waits_for = ""

    def _begin(self, step: Step) -> None:
        self.trace.append(_describe(step))
        self._in_flight = True
        if isinstance(step, Wait):
            self._begun = None
        elif isinstance(step, Write) and isinstance(step.storage, SimStorage):
            kind = "write_sync" if isinstance(step, WriteSync) else "write"
            self._begun = step.storage.begin_write(step.offset, step.buffers, kind=kind)
        elif isinstance(step, Sync) and isinstance(step.storage, SimStorage):
            self._begun = step.storage.begin_sync()
        else:
            self._begun = step.perform()

    def _return(self, step: Step) -> Any:
        self._in_flight = False
        begun, self._begun = self._begun, None
        if isinstance(step, Write) and isinstance(step.storage, SimStorage):
            return step.storage.finish_write(begun)
        if isinstance(step, Sync) and isinstance(step.storage, SimStorage):
            return step.storage.finish_sync(begun)
        return begun


class Stepper:
    """Tasks, and who is next. A failing test prints `history`: the order of the moves by name."""

    def __init__(self, chooser: Chooser | None = None, *, whole_steps: bool = False) -> None:
        self.chooser: Chooser = chooser if chooser is not None else Random(0)
        self.whole_steps = whole_steps
        self.tasks: list[Task] = []
        self.history: list[str] = []
        self.moves = 0

    def add(self, operation: Operation[Any], name: str = "", *, daemon: bool = False) -> Task:
        """A new task; it has not begun. A daemon (writer, checkpoint) need not finish."""
        task = Task(name or f"task {len(self.tasks)}", operation, daemon=daemon)
        self.tasks.append(task)
        return task

    def runnable(self) -> list[Task]:
        return [task for task in self.tasks if not task.done and not task.waits_for]

    def move(self, task: Task) -> None:
        """One move of this task."""
        assert not task.done and not task.waits_for, f"{task.name} cannot move"
        self.moves += 1
        self.history.append(task.name)
        task.move(whole_steps=self.whole_steps)

    def run(self, *tasks: Task, limit: int | None = None, patience: int = 100_000) -> bool:
        """Move until the tasks given, or all that are no daemons, are done, or `limit` moves were made.

        Returns whether they are done. Raises Deadlock when nobody can move or `patience` is at its end, and
        whatever an operation raised that is neither OSError nor an error of the package.
        """
        moves = 0
        while True:
            waiting = [task for task in (tasks or self.tasks) if not task.done and (tasks or not task.daemon)]
            if not waiting:
                return True
            if limit is not None and moves >= limit:
                return False
            ready = self.runnable()
            if not ready or moves >= patience:
                raise Deadlock(self.describe())
            # A single candidate is no decision: it would only blow up the enumeration.
            self.move(ready[self.chooser.randrange(len(ready))] if len(ready) > 1 else ready[0])
            moves += 1

    def describe(self) -> str:
        """Where every unfinished task is."""
        lines = [f"after {self.moves} moves, order {self.chooser!r}:"]
        for task in self.tasks:
            if not task.done:
                state = f"waits for {task.waits_for}" if task.waits_for else "can move"
                lines.append(f"  {task.name} {state}; did {', '.join(task.trace[-8:]) or 'nothing'}")
        return "\n".join(lines)


def _describe(step: Step) -> str:
    name = type(step).__name__
    if isinstance(step, Wait):
        return f"{name}({step.gate.name})"
    if isinstance(step, Write):
        return f"{name}({step.offset:#x}+{sum(memoryview(buffer).nbytes for buffer in step.buffers):#x})"
    offset = getattr(step, "offset", None)
    return name if offset is None else f"{name}({offset:#x})"
