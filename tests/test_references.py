"""Counts of references, and refcount blocks of every width in the same shape."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.image.references import CHUNK, MANY, Counts, Memory, decode_refcounts

RANGES = st.lists(
    st.tuples(
        st.integers(0, 4 * CHUNK), st.integers(1, 3 * CHUNK), st.sampled_from((0, 1, 2, 3, 100, 253, 254, 255, 70_000))
    ),
    max_size=12,
)


@given(RANGES)
def test_counts_are_those_of_a_dictionary(ranges: list[tuple[int, int, int]]) -> None:
    counts = Counts(Memory(1 << 30))
    expected: Counter[int] = Counter()
    for first, count, times in ranges:
        counts.add(first, count, times)
        expected.update(dict.fromkeys(range(first, first + count), times))
    clusters = range(8 * CHUNK)
    assert [counts.get(cluster) for cluster in clusters] == [expected[cluster] for cluster in clusters]
    window = counts.window(3, 7 * CHUNK)
    assert list(window) == [min(expected[cluster], MANY) for cluster in range(3, 3 + 7 * CHUNK)]


@given(st.data(), st.integers(0, 6))
def test_refcounts_of_every_width_are_read(data: st.DataObject, order: int) -> None:
    bits = 1 << order
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1) | st.sampled_from((0, 1)), min_size=64, max_size=64))
    # Spec: "Refcount blocks": big endian, and within a byte the first entry in the lowest bits.
    if bits >= 8:
        block = b"".join(value.to_bytes(bits // 8, "big") for value in values)
    else:
        per = 8 // bits
        block = bytes(
            sum(value << bits * at for at, value in enumerate(values[first : first + per]))
            for first in range(0, 64, per)
        )
    low, exact = decode_refcounts(block, order)
    assert list(low) == [min(value, MANY) for value in values]
    assert exact == {index: value for index, value in enumerate(values) if value >= MANY}


def test_memory_is_bounded_for_scattered_references() -> None:
    memory = Memory(100_000)
    counts = Counts(memory)
    with pytest.raises(ImageError, match="scattered too widely"):
        for cluster in range(0, 1 << 40, 1 << 20):
            counts.add(cluster, 1)
    assert len(counts.chunks) < 300
