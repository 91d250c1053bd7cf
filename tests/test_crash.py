"""Random interleavings of clients and the writer on a simulated disk, cut anywhere, recovered, checked.

Method: a seed draws an image, clients and an order of their steps (stepper.py). At random moves the states that
a power cut may leave are recovered, each on a copy; now and then the server is killed or the power is cut for
good, and the next generation goes on with what was left. Promised: a flushed sector is never lost; an
unflushed one holds the flushed version or a newer one; refcounts equal references after the next clean close.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from random import Random

import pytest
from engine import (
    Engine,
    Oracle,
    Shape,
    background,
    client,
    committer,
    engine_wakes,
    initial_contents,
    reference_counts,
    settle,
    verify,
)
from scale import scaled
from simdisk import SimDisk
from stepper import Stepper

from nbd_qcow2j.attaching import detach

SHAPES = [
    Shape("cluster_size=512", 32 << 10),
    Shape("cluster_size=512,refcount_bits=1", 24 << 10, backed=True),
    Shape("cluster_size=4096", 64 << 10),
    Shape("cluster_size=4096,refcount_bits=64", 64 << 10, backed=True),
    Shape("cluster_size=16384,extended_l2=on", 64 << 10),
    Shape("cluster_size=65536", 256 << 10, journal=1 << 17, backed=True),
]


def play(seed: int, image: SimDisk, shape: Shape, *, probes: int = 4, limit: int = 24) -> int:
    """One run of a few generations; returns how many crash states were recovered."""
    rng = Random(seed)
    oracle = Oracle(initial_contents(shape))
    numbers = count(1)
    states = 0
    for _ in range(rng.choice((1, 2, 3))):
        engine = Engine(image, shape, rng)
        stepper = Stepper(rng, whole_steps=rng.random() < 0.3)
        opening = stepper.add(engine.opening(), "open")
        cut_early = rng.random() < 0.15
        if stepper.run(opening, limit=rng.randrange(40) if cut_early else None):
            assert opening.error is None, opening.error
            engine.disk = opening.result
            oracle.forget(engine.contents())
            for number in range(rng.choice((1, 2, 3))):
                stepper.add(client(engine, oracle, rng, rng.randint(1, 12), numbers), f"client {number}")
            stepper.add(background(engine, rng), "writer", daemon=True)
            stepper.add(committer(engine), "committer", daemon=True)
            for _ in range(probes):
                done = run_on(stepper, rng.randint(1, 120))
                for state in image.crash_states(limit, rng):
                    verify(state, shape, oracle, Random(seed))
                    states += 1
                if done:
                    break
            for task in stepper.tasks:
                assert task.error is None, f"{task.name}: {task.error}"
            if all(task.done or task.daemon for task in stepper.tasks) and rng.random() < 0.5:
                settle_writer(stepper)
                settle(engine, detach(engine.disk))
                reference_counts(image)
                oracle.flushed = oracle.tick()
        image = rng.choice((killed, cut))(image, rng)
        copy = image.copy()
        verify(copy, shape, oracle, Random(seed))
    return states


def run_on(stepper: Stepper, moves: int) -> bool:
    """Some moves; the writer, which never ends, is given a turn whenever it waits for one."""
    for _ in range(moves):
        for gate in engine_wakes:
            gate.open()  # type: ignore[attr-defined]
        engine_wakes.clear()
        if all(task.done for task in stepper.tasks if not task.daemon):
            return True
        stepper.run(limit=1)
    return False


def settle_writer(stepper: Stepper) -> None:
    """Let the writer come to the end of its turn."""
    for task in stepper.tasks:
        while task.daemon and not task.waits_for and not task.done:
            stepper.move(task)


def killed(image: SimDisk, rng: Random) -> SimDisk:
    image.kill(rng)
    return image


def cut(image: SimDisk, rng: Random) -> SimDisk:
    return rng.choice(list(image.crash_states(16, rng)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options + (",backed" if shape.backed else ""))
def test_a_cut_anywhere_loses_nothing_that_was_flushed_and_leaks_nothing(shape: Shape, tmp_path: Path) -> None:
    image = shape.make(tmp_path)
    states = 0
    for seed in range(12):
        try:
            states += play(seed, image.copy(), shape)
        except BaseException:
            print(f"seed {seed}, {shape}")
            raise
    print(f"{states} crash states recovered")
    assert states > 100


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options + (",backed" if shape.backed else ""))
def test_a_cut_anywhere_with_many_seeds(shape: Shape, tmp_path: Path) -> None:
    image = shape.make(tmp_path)
    for seed in range(1000, 1000 + scaled(30)):
        try:
            play(seed, image.copy(), shape)
        except BaseException:
            print(f"seed {seed}, {shape}")
            raise
