"""The table cache under pressure: it passes its bound only by tables that are in use, and never loses one of these."""

from __future__ import annotations

from array import array
from functools import partial
from pathlib import Path

import engine
import pytest
from engine import Shape
from simdisk import SimDisk, SimStorage
from test_crash import play

from nbd_qcow2j.disk import Settings
from nbd_qcow2j.image.mapping import l2_table
from nbd_qcow2j.image.tables import Table, TableCache
from nbd_qcow2j.steps import run_simply

SIZE = 512


def small_cache() -> TableCache:
    storage = SimStorage(SimDisk(64 * SIZE), "image")
    return TableCache(storage, table_size=SIZE, limit_bytes=8 * SIZE, home={}, name="image")


def test_a_table_is_not_forgotten_by_the_load_that_brought_it() -> None:
    # All others are pinned or uncommitted: forgotten at once, it would be changed while nobody finds it, and the
    # next load would bring a second one with the old content.
    cache = small_cache()
    for number in range(1, 9):
        table = run_simply(cache.load(number * SIZE, l2_table, what="L2 table"))
        if number % 2:
            table.pins += 1
        else:
            table.uncommitted += 1
    for number in (20, 21):
        loaded = run_simply(cache.load(number * SIZE, l2_table, what="L2 table"))
        assert cache.get(number * SIZE) is loaded
    made = Table(30 * SIZE, array("Q", bytes(SIZE)))
    cache.install(made)
    assert cache.get(30 * SIZE) is made
    # The one before was in nobody's use.
    assert len(cache.tables) == 9


def test_the_cache_comes_back_to_its_bound_when_its_tables_are_let_go() -> None:
    cache = small_cache()
    tables = []
    for number in range(1, 21):
        tables.append(run_simply(cache.load(number * SIZE, l2_table, what="L2 table")))
        tables[-1].pins += 1
    assert len(cache.tables) == 20
    for table in tables:
        table.pins -= 1
    run_simply(cache.load(30 * SIZE, l2_table, what="L2 table"))
    assert len(cache.tables) == 8


SHAPES = [Shape("cluster_size=512", 384 << 10), Shape("cluster_size=512,refcount_bits=64", 384 << 10)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
def test_cuts_lose_nothing_with_more_tables_than_the_cache_holds(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twelve L2 tables and as many refcount blocks or fewer, where eight tables fit.
    monkeypatch.setattr(engine, "Settings", partial(Settings, l2_cache=0))
    image = shape.make(tmp_path)
    states = 0
    for seed in range(20):
        try:
            states += play(seed, image.copy(), shape, probes=3, limit=4)
        except BaseException:
            print(f"seed {seed}, {shape}")
            raise
    print(f"{states} crash states recovered")
    assert states > 10
