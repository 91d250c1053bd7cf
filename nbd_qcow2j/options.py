"""The options of a served image: one table, from which parsing, bounds, help and defaults all come.

An option is written `key=value`, as nbdkit hands it over; `-` and `_` in a key are the same. The table is
the order of the help. Sizes take K, M, G, T (powers of 1024), times are seconds and take `ms` and `s`.

The defaults of the engine were measured where they act; the comment there says so.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import OptionError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_SECONDS = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|)", re.IGNORECASE | re.ASCII)
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def parse_size(text: str) -> int:
    """The bytes `text` means: a number, with or without K, M, G or T; a fraction with one (1.5G). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] and _UNITS[match[3].lower()] == 1):
        raise ValueError("a size: a whole number of bytes, or a number with K, M, G or T")
    decimals = match[2] or ""
    tenths: int = 10 ** len(decimals)
    return int(match[1] + decimals) * _UNITS[match[3].lower()] // tenths


def format_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that divides it: 33554432 is 32M."""
    for letter, unit in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{letter}"
    return str(size_bytes)


def _parse_seconds(text: str) -> float:
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise ValueError("a time: seconds such as 0.5 or 2s, or milliseconds such as 500ms")
    return float(match[1]) / (1000 if match[2].lower() == "ms" else 1)


def _parse_percent(text: str) -> float:
    number = text.strip().removesuffix("%").strip()
    if not number.isascii() or not number.isdigit():
        raise ValueError("a whole number of percent, such as 50%")
    return int(number) / 100


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("true or false")
    return word in _TRUE


def _parse_path(text: str) -> str:
    # At once: the directory of a daemon is `/`.
    if not text:
        raise ValueError("a path")
    if "\0" in text:
        raise ValueError("a path without zero bytes")
    # nbdkit hands text over as UTF-8, whatever the locale; in C, Python's names of files are ASCII.
    return os.path.abspath(os.fsdecode(text.encode(errors="surrogateescape")))


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, [HOST]:PORT, :PORT or PORT; the loopback address if no host is named.

    Raises ValueError.
    """
    host, colon, port = text.strip().rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError("HOST:PORT with a port from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address in brackets, as in [::1]:9809")
    return (host or "127.0.0.1") if colon else "127.0.0.1", int(port)


def _parse_metrics(text: str) -> str:
    host, port = parse_address(text)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_word(text: str) -> str:
    return text.strip().lower()


def _parse_cpu(text: str) -> int | str:
    word = text.strip().lower()
    if word in {"auto", "any"}:
        return word
    if not word.isascii() or not word.isdigit():
        raise ValueError("auto, any, or the number of a CPU")
    if int(word) not in os.sched_getaffinity(0):
        raise ValueError(f"a CPU this process may use: {', '.join(map(str, sorted(os.sched_getaffinity(0))))}")
    return int(word)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the values of an option are written and read."""

    metavar: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str]


_SIZE_KIND = _Kind("SIZE", parse_size, format_size)
_TIME_KIND = _Kind("SECONDS", _parse_seconds, lambda value: f"{value:g} s")
_PERCENT_KIND = _Kind("PERCENT", _parse_percent, lambda value: f"{value:.0%}")
_BOOL_KIND = _Kind("true|false", _parse_bool, lambda value: str(value).lower())
_PATH_KIND = _Kind("PATH", _parse_path, str)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: how `key` is parsed, what it may be, what it is for."""

    kind: _Kind
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


def _option(default: Any, kind: _Kind, help: str, **bounds: Any) -> Any:
    return field(default=default, metadata={"option": Option(kind, help, **bounds)})


@dataclass(frozen=True, slots=True)
class Options:
    """What the person who started the server asked for; every value is within its bounds."""

    file: str = _option("", _PATH_KIND, "the qcow2 image to serve")
    read_only: bool = _option(False, _BOOL_KIND, "serve without writing to the image, even if its journal is attached")
    metrics: str | None = _option(
        None,
        _Kind("HOST:PORT", _parse_metrics, str),
        "serve Prometheus metrics over HTTP there; a port alone means 127.0.0.1",
    )
    backing: str = _option(
        "allow",
        _Kind("allow|deny", _parse_word, str),
        "whether an image with a backing file is served",
        choices=("allow", "deny"),
    )
    journal_size: int = _option(
        32 * MIB,
        _SIZE_KIND,
        "size of the journal, used when it is attached; what it holds is read again after a crash",
        minimum=256 * KIB,
        maximum=GIB,
    )
    commit_interval: float = _option(
        1.0,
        _TIME_KIND,
        "how long a write may wait for a commit when no flush asks for one",
        minimum=0.05,
        maximum=60,
    )
    commit_size: int = _option(
        MIB,
        _SIZE_KIND,
        "commit without a flush when this much waits",
        minimum=64 * KIB,
        maximum=GIB,
    )
    pending_limit: int = _option(
        64 * MIB,
        _SIZE_KIND,
        "memory for written pages that have no cluster yet",
        minimum=MIB,
        maximum=GIB,
    )
    direct_write: int = _option(
        64 * KIB,
        _SIZE_KIND,
        "writes of whole clusters of at least this size go straight into the image, past the journal",
        minimum=4 * KIB,
        maximum=GIB,
    )
    in_place: bool = _option(
        True,
        _BOOL_KIND,
        "smaller writes into clusters that the image has already go straight there; false takes them into the journal",
    )
    l2_cache: int = _option(
        16 * MIB,
        _SIZE_KIND,
        "memory for the tables that say where clusters are",
        minimum=MIB,
        maximum=16 * GIB,
    )
    discard: bool = _option(True, _BOOL_KIND, "give the space of freed clusters back to the host file system")
    checkpoint_interval: float = _option(
        5.0,
        _TIME_KIND,
        "send pending pages home when the disk was idle for this long",
        minimum=0.1,
        maximum=600,
    )
    checkpoint_start: float = _option(
        0.5,
        _PERCENT_KIND,
        "send pages home at full pace from this fill of the journal, or of the memory for pages",
        minimum=0.05,
        maximum=0.7,
    )
    cpu: int | str = _option(
        "auto",
        _Kind("auto|any|N", _parse_cpu, str),
        "the CPU that answers requests: auto is one while they queue or where that is found faster; any is never one",
    )
    remove_socket: str | None = _option(
        None,
        _PATH_KIND,
        "remove this listening socket when the server ends, which nbdkit does not; `nbd-qcow2j serve` asks for it",
    )


# The attribute of a key is the key with `_`.
OPTIONS: Mapping[str, Option] = {entry.name.replace("_", "-"): entry.metadata["option"] for entry in fields(Options)}


def _show_default(key: str) -> str:
    default = next(entry.default for entry in fields(Options) if entry.name == key.replace("-", "_"))
    return "" if default in (None, "") else OPTIONS[key].kind.show(default)


def _range(option: Option) -> str:
    show = option.kind.show
    return f"{show(option.minimum)} to {show(option.maximum)}" if option.minimum is not None else ""


def parse_option(key: str, text: str) -> tuple[str, Any]:
    """The attribute of `Options` that `key` names, and the value `text` gives it. Raises OptionError."""
    name = key.lower().replace("_", "-")
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(OPTIONS)}"
        raise OptionError(f"unknown option {key}: {hint}")
    try:
        value = option.kind.parse(text)
    except ValueError as error:
        raise OptionError(f"option {name}: expected {error}, found {text!r}") from None
    if option.choices and value not in option.choices:
        raise OptionError(f"option {name}: expected {' or '.join(option.choices)}, found {text!r}")
    if option.minimum is not None and option.maximum is not None and not option.minimum <= value <= option.maximum:
        raise OptionError(f"option {name}: expected {_range(option)}, found {text!r}")
    return name.replace("-", "_"), value


def parse_options(pairs: Iterable[tuple[str, str]]) -> Options:
    """The options that `pairs` of key and value ask for; what is not named has its default. Raises OptionError."""
    values: dict[str, Any] = {}
    for key, text in pairs:
        name, value = parse_option(key, text)
        if name in values:
            raise OptionError(f"option {name.replace('_', '-')} is given twice")
        values[name] = value
    if "file" not in values:
        raise OptionError("option file is missing: name the image as file=PATH")
    return Options(**values)


UNITS = "SIZE is in bytes, or with K, M, G or T in powers of 1024; SECONDS may also be written as 500ms"


def describe_options() -> Iterator[tuple[str, str, str]]:
    """(key, how its value is written, what it is for with default and bounds), for each option."""
    for key, option in OPTIONS.items():
        facts = [
            fact
            for fact in (
                f"default {_show_default(key)}" if _show_default(key) else "",
                _range(option),
            )
            if fact
        ]
        yield key, option.kind.metavar, option.help + (f" ({', '.join(facts)})" if facts else "")
