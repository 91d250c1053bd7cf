"""What `nbd-qcow2j serve` prints, said by the plugin when it is true.

Before nbdkit runs nobody knows whether the image can be attached, and nobody listens: who reads the address and
connects at once would find nothing. So `serve` leaves the text in the environment under one of two names.
"""

from __future__ import annotations

import contextlib
import os

ONCE_LISTENING = "NBD_QCOW2J_SAY_ONCE_LISTENING"
BEFORE_FORK = "NBD_QCOW2J_SAY_BEFORE_FORK"
"""For a daemon: after the fork its output goes nowhere."""


class Announcement:
    """What was left under a name; nothing for plain nbdkit.

    Made while the standard output is still that of whoever started the server: nbdkit lets go of it before it listens.
    """

    def __init__(self, name: str) -> None:
        self._text = os.environb.pop(name.encode(), b"")
        self._out = -1
        if self._text:
            with contextlib.suppress(OSError):
                self._out = os.dup(1)

    def say(self) -> None:
        """Print it. Nobody may be reading any more: no reason not to serve."""
        if self._out >= 0:
            with contextlib.suppress(OSError):
                os.write(self._out, self._text)
            os.close(self._out)
            self._out = -1
