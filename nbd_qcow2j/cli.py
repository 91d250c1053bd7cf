"""`nbd-qcow2j COMMAND …`: the command line. What a command does stands in `commands/COMMAND.py`.

Only the module of the command that is asked for is imported: `serve` is on the way to every start.
An error that was foreseen is one line and exit code 1; what argparse refuses is 2, but 1 for `check`, as it is for
`qemu-img check`: there 2 means that the image is corrupt.
"""

from __future__ import annotations

import argparse
import importlib
import io
import pkgutil
import sys
from collections.abc import Sequence

from . import __version__, commands
from .errors import Error, OptionError, explain_os_error, printable

# The order of the help; what is not named here comes after.
_ORDER = ("serve", "create", "info", "check", "recover", "journal")


def _names() -> list[str]:
    there = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    return sorted(there, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def _parse(words: list[str], names: Sequence[str], command: str | None) -> argparse.Namespace:
    """The arguments, where `command` is the first word, if that is one of `names`."""
    parser = argparse.ArgumentParser(
        prog="nbd-qcow2j", description="Serve a qcow2 image over NBD with a journal, and look after such images."
    )
    parser.add_argument("--version", action="version", version=f"nbd-qcow2j {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in [command] if command else names:
        importlib.import_module(f"{commands.__name__}.{name}").add_parser(subparsers)
    if not command:
        return parser.parse_args(words)
    # Options may stand anywhere: without "intermixed" an option between IMAGE and SIZE would be the end of both.
    found: argparse.ArgumentParser = subparsers.choices[command]
    return found.parse_intermixed_args(words[1:], argparse.Namespace(command=command))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name of a file need not be text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    words = list(sys.argv[1:] if argv is None else argv)
    command: str | None = None
    passed_on: list[str] = []
    try:
        names = _names()
        command = words[0] if words and words[0] in names else None
        if command == "serve" and "--" in words:
            # argparse would mix what follows with our own arguments.
            split = words.index("--")
            words, passed_on = words[:split], words[split + 1 :]
        arguments = _parse(words, names, command)
        arguments.passed_on = passed_on
        if arguments.image == "":
            raise OptionError("IMAGE: the name is empty")
        code: int = importlib.import_module(f"{commands.__name__}.{arguments.command}").run(arguments)
        # None: whoever started us has closed it.
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as refused:
        if command == "check" and refused.code:
            return 1
        raise
    except BrokenPipeError:
        # Whoever read our output has enough. Python must not flush into the closed pipe once more.
        sys.stderr.close()
        return 1
    except Error as error:
        print(f"nbd-qcow2j: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"nbd-qcow2j: {explain_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
