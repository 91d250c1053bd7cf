"""The tests notice when a rule of the engine is broken: each mutation of mutations.py fails one of them.

Method: a copy of the package is broken in one place, and the engine's tests run on that copy until one fails, each
mutation in a process of its own. What no test notices is a rule that only looks as if it were kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutations import MUTATIONS, PACKAGE, Mutation, apply

TESTS = Path(__file__).resolve().parent
FILES = [
    "test_rules.py", "test_home.py", "test_opening.py", "test_regressions.py", "test_protocol_holes.py",
    "test_no_room.py", "test_tokens.py", "test_unreadable.py", "test_interleavings.py", "test_stateful.py",
    "test_in_place.py", "test_crash.py",
]  # fmt: skip
"""Those that are there, in this order."""
LIMIT_SECONDS = 400


def run_tests(package: Path, *, first: str = "", options: tuple[str, ...] = ()) -> str:
    """What pytest printed; `package` is the directory to import nbd_qcow2j from."""
    names = [first, *FILES] if first else FILES
    files = [str(TESTS / name) for name in names if (TESTS / name).exists()]
    # Without `-P` the directory where pytest starts would come first, and the tests would run on what is not broken.
    words = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short"]
    words += ["-m", "not sweep"]
    done = subprocess.run(
        [*words, *options, *files], text=True, capture_output=True, check=False, timeout=LIMIT_SECONDS,
        cwd=package, env={**os.environ, "PYTHONPATH": str(package), "STATEFUL_UNSHRUNK": "1"},
    )  # fmt: skip
    return done.stdout + done.stderr


def catcher(mutation: Mutation, directory: Path) -> tuple[str | None, float]:
    """The test that fails, None if none does in its time; and how long that took."""
    started = time.monotonic()
    try:
        printed = run_tests(apply(mutation, directory), first=mutation.first)
    except subprocess.TimeoutExpired:
        printed = ""
    found = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py.*?)(?: - |$)", printed, re.MULTILINE)
    return found and found[1], time.monotonic() - started


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_of_a_line_that_is_there(mutation: Mutation) -> None:
    assert (PACKAGE / mutation.file).read_text().count(mutation.old) == 1


def test_a_mutation_is_imported_where_the_tests_look(tmp_path: Path) -> None:
    # A package that cannot be imported must fail every test: else all that follows would test the unbroken one.
    broken = Mutation("broken", "", "geometry.py", "SECTOR = 512\n", "raise ImportError('the copy')\n")
    assert "the copy" in run_tests(apply(broken, tmp_path), options=("--co",))


@pytest.mark.sweep
def test_every_mutation_is_noticed(tmp_path: Path) -> None:
    directories = [tmp_path / str(number) for number in range(len(MUTATIONS))]
    for each in directories:
        each.mkdir()
    missed = []
    with ThreadPoolExecutor(2) as pool:
        for mutation, (test, seconds) in zip(MUTATIONS, pool.map(catcher, MUTATIONS, directories), strict=True):
            print(f"{mutation.name}: {test or 'NOT NOTICED'}, {seconds:.0f} s", flush=True)
            if test is None:
                missed.append(mutation.name)
    print(f"{len(MUTATIONS) - len(missed)} of {len(MUTATIONS)} mutations noticed")
    assert not missed, missed
