"""Two and three callers on the same clusters, in every order in which the lock lets them come.

Method: a scene prepares a disk and names its callers; `stepper.every_order` runs it anew with each order of their
steps, a step being one move. After every move the invariants are looked at (invariants.py); every read is judged by
the oracle; at the end nobody may be left waiting, the disk is flushed, the power is cut, what is left is recovered and
closed, and so is the disk itself: contents and refcounts must be right. Where there are more orders than a scene
may take, half of those it takes are the first in order and half are drawn; how many it was is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from engine import Engine, Shape, settle
from invariants import no_leaks, recover
from scale import scaled
from stage import BACKED, PAGES, SMALL, WIDE, Stage, chain, drain_pool
from stepper import Chooser, Stepper, every_order

from nbd_qcow2j.attaching import detach
from nbd_qcow2j.steps import Operation

LIMIT = 160
"""Orders of a scene in the quick run, at most."""
PATIENCE = 3000

Scene = Callable[[Stage], list[Operation[Any]]]
SCENES: dict[str, tuple[Shape, bool, Scene]] = {}


def scene(shape: Shape, *, in_place: bool = False) -> Callable[[Scene], Scene]:
    """`in_place`: also parts of clusters are written where they live."""

    def add(function: Scene) -> Scene:
        SCENES[function.__name__] = (shape, in_place, function)
        return function

    return add


@scene(WIDE)
def reader_against_checkpoint_that_copies(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(8, 8), stage.flush())
    return [stage.read(0, 16), stage.round(), stage.read(8, 8)]


@scene(PAGES)
def reader_against_checkpoint_and_tail(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8, fast=True), stage.write(8, 4), stage.flush())
    return [chain(stage.read(0, 16), stage.read(0, 16)), chain(stage.round(), stage.flush(), stage.round())]


@scene(WIDE)
def direct_write_against_pending_pages(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(8, 8), stage.flush())
    return [stage.write(0, 16), chain(stage.write(8, 8), stage.flush()), stage.read(4, 10)]


@scene(PAGES)
def direct_write_against_a_pending_write_and_checkpoint(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 4), stage.flush())
    return [stage.write(0, 8), stage.write(2, 3, fua=True), stage.round()]


@scene(PAGES)
def trim_against_read(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 16), stage.flush())
    return [stage.read(0, 16), chain(stage.trim(0, 16), stage.flush(), stage.release())]


@scene(BACKED)
def trim_over_a_backing_file_against_read_and_write(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 4), stage.flush())
    return [stage.trim(0, 8), stage.read(0, 8), stage.write(2, 3)]


@scene(PAGES)
def flush_against_commit(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8, fast=True))
    return [stage.flush(), chain(stage.write(8, 8, fast=True), stage.flush()), stage.calls.commit()]


@scene(PAGES)
def flush_against_a_direct_write_and_its_commit(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 16), stage.flush())
    return [stage.write(0, 8, fua=True), stage.flush(), stage.write(8, 8, fua=True)]


@scene(PAGES)
def two_merges_into_one_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8), stage.flush())
    return [stage.write(1, 2), stage.write(2, 3), stage.write(6, 1)]


@scene(PAGES)
def merge_against_direct_write_of_the_same_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8), stage.flush())
    return [stage.write(1, 2), stage.write(0, 8)]


@scene(PAGES)
def merge_against_trim_of_the_same_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8), stage.flush())
    return [stage.write(1, 2), chain(stage.trim(0, 8), stage.flush())]


@scene(PAGES)
def merge_against_checkpoint_of_the_same_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8, fast=True), stage.flush())
    return [chain(stage.write(1, 2), stage.write(4, 1)), stage.round()]


@scene(PAGES)
def checkpoint_against_write_of_the_same_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 4), stage.flush())
    return [stage.round(), chain(stage.write(0, 4), stage.flush(), stage.write(0, 3))]


@scene(PAGES)
def checkpoint_of_an_uncommitted_page_against_its_commit(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 4))
    return [chain(stage.round(), stage.flush()), chain(stage.write(0, 4), stage.flush())]


@scene(PAGES)
def checkpoint_against_trim_of_the_same_page(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 4), stage.flush())
    return [stage.round(), chain(stage.trim(0, 8), stage.flush()), stage.read(0, 8)]


@scene(PAGES)
def in_place_write_against_trim(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8), stage.write(8, 8))
    stage.home()
    return [stage.write(0, 8, fua=True), chain(stage.trim(0, 8), stage.flush(), stage.release())]


@scene(SMALL)
def in_place_write_against_trim_and_reuse(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    return [
        stage.write(0, 8, fua=True),
        chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(16, 8), stage.flush()),
    ]


@scene(PAGES, in_place=True)
def a_part_in_place_against_a_merge_and_a_checkpoint(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    return [stage.write(0, 4), chain(stage.write(2, 3), stage.flush()), stage.round()]


@scene(PAGES, in_place=True)
def a_part_in_place_against_trim_and_reuse(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    return [
        chain(stage.write(0, 4), stage.write(4, 2, fua=True)),
        chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(16, 8), stage.flush()),
    ]


@scene(PAGES)
def two_direct_writes_of_the_same_cluster(stage: Stage) -> list[Operation[Any]]:
    return [stage.write(0, 16), chain(stage.write(8, 8), stage.flush())]


@scene(SMALL)
def two_writers_that_need_the_same_new_table(stage: Stage) -> list[Operation[Any]]:
    return [stage.write(0, 8, fua=True), stage.write(24, 8)]


@scene(SMALL)
def a_new_table_for_a_write_a_checkpoint_and_a_trim(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(3, 1), stage.flush())
    return [stage.round(), stage.write(24, 8), stage.trim(0, 4)]


@scene(PAGES)
def release_and_reuse_against_a_slow_reader(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    return [
        chain(stage.read(0, 8), stage.read(0, 8)),
        chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(16, 24)),
    ]


@scene(PAGES)
def release_against_a_commit_and_a_writer_in_need(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    return [chain(stage.trim(0, 8), stage.flush()), stage.release(), stage.write(16, 24)]


@scene(SMALL)
def load_of_a_table_against_its_sectors_going_home(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8), stage.write(64, 8), stage.flush())
    stage.forget_tables()
    return [chain(stage.round(), stage.flush()), stage.read(0, 8), chain(stage.write(16, 8), stage.read(64, 8))]


@scene(SMALL)
def load_of_a_table_against_its_change(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    stage.forget_tables()
    return [stage.read(0, 8), chain(stage.write(8, 8), stage.flush()), stage.read(8, 8)]


def play(name: str, chooser: Chooser) -> None:
    """One order, from the fresh disk to the closed one."""
    shape, in_place, make = SCENES[name]
    stage = Stage(shape, in_place=in_place)
    stepper = Stepper(chooser, whole_steps=True)
    for number, operation in enumerate(make(stage)):
        stepper.add(operation, f"caller {number}")
    try:
        while not stepper.run(limit=1, patience=PATIENCE):
            stage.watch.check(stepper.tasks)
            assert stepper.moves < PATIENCE, "no end"
        stage.watch.check()
        for task in stepper.tasks:
            assert task.error is None, f"{task.name}: {task.error}"
        contents = stage.engine.contents()
        stage.oracle.check(contents, stage.oracle.now)
        stage.do(stage.flush())
        recover(next(stage.sim.crash_states(1, Random(0))), shape, stage.oracle, seed=1, plain=False)
        settle(stage.engine, detach(stage.disk))
        left = next(stage.sim.crash_states(1, Random(0)))
        no_leaks(left, plain=True)
        after = Engine(left, shape, Random(1), read_only=True)
        after.open()
        assert after.contents() == contents, "closing changed what the disk holds"
    except BaseException:
        print(f"{name}, {chooser!r}: {stepper.history}")
        raise


def orders(limit: int) -> Iterator[Chooser]:
    """Every order if they are no more than `limit`; else the first half of that, and as many drawn."""
    seen = 0
    for order in every_order(limit // 2):
        seen += 1
        yield order
    if seen == limit // 2:
        for seed in range(limit - seen):
            yield Random(seed)


@pytest.mark.parametrize("name", SCENES)
def test_every_order_of_callers_gives_what_is_allowed_and_ends(name: str) -> None:
    run_scene(name, LIMIT)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SCENES)
def test_every_order_of_callers_to_a_higher_limit(name: str) -> None:
    run_scene(name, scaled(300))


def run_scene(name: str, limit: int) -> None:
    made = 0
    for chooser in orders(limit):
        play(name, chooser)
        made += 1
    print(f"{name}: {made} orders, {'all there are' if made < limit else 'half of them drawn'}")
    assert made > 1
