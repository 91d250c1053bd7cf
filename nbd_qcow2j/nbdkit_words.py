"""The words of nbdkit's command line, as far as we must understand them. nbdkit(1), "OPTIONS"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# Options whose value is the next word.
_TAKES_A_WORD = frozenset(
    "-D -e -g -i -m -P -p -t -U -u --debug --export --export-name --exportname --filter --group --ip-addr --ipaddr "
    "--log --mask-handshake --pid-file --pidfile --port --run --selinux-label --threads --tls --tls-certificates "
    "--tls-psk --unix --user --vsock-port".split()
)
# -r, alone or among others that take no value: -fr.
_READ_ONLY = re.compile(r"--read-?only|-[fnorsvV]*r[fnorsvV]*")
# Where it listens, and where its process id stands.
_PLACES = re.compile(
    r"-[46fnorvV]*([UpiPs]).*|(--(?:unix|port|ip-?addr|pid-?file|single|stdin|vsock|vsock-port))(?:=.*)?"
)


def split_keys(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """nbdkit's own options, and the `key=value` of its filters: those come after the plugin's name."""
    own: list[str] = []
    keys: list[str] = []
    for word, is_value in _values_marked(words):
        (keys if "=" in word and not word.startswith("-") and not is_value else own).append(word)
    return own, keys


def is_read_only(words: Sequence[str]) -> bool:
    """Whether they ask nbdkit to serve read-only."""
    return any(_READ_ONLY.fullmatch(word) for word, is_value in _values_marked(words) if not is_value)


def places(words: Sequence[str]) -> list[str]:
    """The options among them that say where nbdkit listens, or writes its process id: `serve` has its own for that."""
    found = [_PLACES.fullmatch(word) for word, is_value in _values_marked(words) if not is_value]
    return [match[2] or f"-{match[1]}" for match in found if match]


def own_words() -> list[str]:
    """The command line of this process, without the program's name; nothing where there is no /proc."""
    try:
        line = Path("/proc/self/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="surrogateescape") for word in line.split(b"\0")[1:-1]]


def _values_marked(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each word, and whether it is the value of the option before."""
    is_value = False
    for word in words:
        yield word, is_value
        is_value = not is_value and word in _TAKES_A_WORD
