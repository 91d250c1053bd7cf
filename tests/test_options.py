"""Options: what is accepted, what is refused and how it is said, and that the help knows every key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_qcow2j.errors import OptionError
from nbd_qcow2j.options import (
    OPTIONS,
    Options,
    describe_options,
    format_size,
    parse_address,
    parse_option,
    parse_options,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("4k", 4096), ("4KiB", 4096), ("32M", 32 << 20), ("1 G", 1 << 30), ("2TB", 2 << 40),
        ("1.5M", 3 << 19), ("0.1K", 102),
    ],
)
def test_a_size_takes_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5", "1.5B", "1.M", ".5M", "1X", "0x10", "1MM", "٣", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_size_is_read_as_it_is_shown(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("commit-interval", "0.5", 0.5),
        ("commit-interval", "500ms", 0.5),
        ("commit_interval", "2 s", 2.0),
        ("Commit-Interval", "60", 60.0),
        ("discard", "off", False),
        ("discard", "YES", True),
        ("read_only", "1", True),
        ("backing", "deny", "deny"),
        ("metrics", "9809", "127.0.0.1:9809"),
        ("metrics", ":9809", "127.0.0.1:9809"),
        ("metrics", "[::1]:9809", "[::1]:9809"),
        ("metrics", "0.0.0.0:9809", "0.0.0.0:9809"),
        ("cpu", "any", "any"),
        ("pending-limit", "1G", 1 << 30),
    ],
)
def test_a_value_is_read(key: str, text: str, value: Any) -> None:
    name, found = parse_option(key, text)
    assert found == value
    assert name == key.lower().replace("-", "_")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("journal-size", "255K", "option journal-size: expected 256K to 1G, found '255K'"),
        ("journal-size", "1025M", "option journal-size: expected 256K to 1G, found '1025M'"),
        ("journal_size", "big", "option journal-size: expected a size"),
        ("commit-interval", "0.049", "expected 0.05 s to 60 s"),
        ("commit-interval", "nan", "option commit-interval: expected a time"),
        ("commit-size", "1K", "expected 64K to 1G"),
        ("pending-limit", "0", "expected 1M to 1G"),
        ("direct-write", "4095", "expected 4K to 1G"),
        ("l2-cache", "1K", "expected 1M to 16G"),
        ("checkpoint-interval", "601", "expected 0.1 s to 600 s"),
        ("discard", "perhaps", "option discard: expected true or false, found 'perhaps'"),
        ("backing", "guess", "option backing: expected allow or deny, found 'guess'"),
        ("metrics", "localhost", "expected HOST:PORT"),
        ("metrics", "::1:9809", "brackets"),
        ("metrics", "localhost:0", "port from 1 to 65535"),
        ("cpu", "100000", "option cpu: expected a CPU this process may use"),
        ("file", "", "option file: expected a path"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_what_is_allowed(key: str, text: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_option(key, text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_refused_by_name_with_the_nearest_known_one() -> None:
    with pytest.raises(OptionError, match=r"^unknown option jurnal_size: did you mean journal-size\?$"):
        parse_options([("file", "x"), ("jurnal_size", "1M")])
    with pytest.raises(OptionError, match=r"^unknown option zzz: known are file, read-only, "):
        parse_options([("file", "x"), ("zzz", "1M")])


def test_a_key_given_twice_is_refused_in_either_spelling() -> None:
    with pytest.raises(OptionError, match="option l2-cache is given twice"):
        parse_options([("file", "x"), ("l2-cache", "1M"), ("l2_cache", "2M")])


def test_the_image_must_be_named() -> None:
    with pytest.raises(OptionError, match="file=PATH"):
        parse_options([("discard", "true")])


def test_a_relative_path_is_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A daemon's directory is `/`: the path must mean what it meant where the command was typed.
    monkeypatch.chdir(tmp_path)
    options = parse_options([("file", "disk.qcow2")])
    monkeypatch.chdir("/")
    assert options.file == str(tmp_path / "disk.qcow2")


def test_every_default_is_within_its_own_bounds() -> None:
    defaults = Options(file="x")
    for key, option in OPTIONS.items():
        value = getattr(defaults, key.replace("-", "_"))
        if option.minimum is not None:
            assert option.minimum <= value <= option.maximum, key  # type: ignore[operator]
            name, parsed = parse_option(key, option.kind.show(value))
            assert (name, parsed) == (key.replace("-", "_"), value)


def test_the_help_names_every_key_its_default_and_its_bounds() -> None:
    lines = {key: text for key, _, text in describe_options()}
    assert set(lines) == set(OPTIONS)
    assert "default 32M, 256K to 1G" in lines["journal-size"]
    assert "default 1 s, 0.05 s to 60 s" in lines["commit-interval"]


def test_an_address_without_a_host_is_loopback() -> None:
    assert parse_address("9809") == ("127.0.0.1", 9809)
    assert parse_address("[::]:1") == ("::", 1)


def test_cpu_takes_only_what_the_process_may_use() -> None:
    for cpu in os.sched_getaffinity(0):
        assert parse_option("cpu", str(cpu)) == ("cpu", cpu)
