"""What a check found: counts for programs, messages for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import ImageError, printable

MAX_MESSAGES: Final = 200
MAX_FAILURES: Final = 20
"""Limit: what could not be checked is said even where findings have filled the messages."""


class Incomplete(ImageError):
    """What is known of an image is not enough to go on with its check."""


@dataclass
class CheckReport:
    """What was found. Counts as in qemu's report; `messages` hold the first of the findings, in words."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    messages: list[str] = field(default_factory=list)
    messages_left_out: int = 0
    failures: int = 0
    image_end_offset: int = 0
    """One past the last cluster in use, in bytes."""
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0

    @property
    def exit_code(self) -> int:
        """As of `qemu-img check`: 0 well, 1 could not be checked, 2 corrupt, 3 leaks only."""
        return 1 if self.check_errors else 2 if self.corruptions else 3 if self.leaks else 0

    def to_json(self, filename: str) -> dict[str, Any]:
        """With the names of `qemu-img check --output=json`; like there, zeros are left out."""
        counts = {
            "image-end-offset": self.image_end_offset, "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters, "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters, "corruptions": self.corruptions, "leaks": self.leaks,
        }  # fmt: skip
        return {"filename": filename, "format": "qcow2", "check-errors": self.check_errors} | {
            key: value for key, value in counts.items() if value
        }

    def corrupt(self, message: str, times: int = 1) -> None:
        """Count a corruption, `times` where as many entries say the same."""
        self.corruptions += times
        self.say(f"ERROR {message}")

    def leak(self, message: str) -> None:
        """Count a leaked cluster."""
        self.leaks += 1
        self.say(f"Leaked {message}")

    def fail(self, message: str, times: int = 1) -> None:
        """Count what could not be checked."""
        self.check_errors += times
        self.failures += 1
        if self.failures <= MAX_FAILURES:
            self.messages.append(printable(f"ERROR {message}"))
        else:
            self.messages_left_out += 1

    @property
    def is_full(self) -> bool:
        """Whether a message would only be counted: on the way of hostile tables nobody need write it."""
        return len(self.messages) >= MAX_MESSAGES

    def say(self, message: str) -> None:
        """Keep a message, or count it where there are enough."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(printable(message))
        else:
            self.messages_left_out += 1
