"""Coverage-guided fuzzing of what test_fuzz.py draws: `guided.py images|journals CORPUS_OR_OPTION…` (libFuzzer's).

A program of its own: the package has to be imported under atheris, and a finding ends the process. The input that
found something is written to `crash-…` in the working directory; `guided.py images crash-…` plays it again.
"""

from __future__ import annotations

import sys
from collections import Counter

import atheris

with atheris.instrument_imports(include=["nbd_qcow2j"]):
    import test_fuzz

from hypothesis import HealthCheck, given, settings

STRATEGIES = {"images": test_fuzz.changed_images(), "journals": test_fuzz.changed_journals()}


def main() -> None:
    seen: Counter[str] = Counter()
    test_fuzz.images()
    test_fuzz.BASELINE[0] = test_fuzz.peak_kib(reset=True)

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(STRATEGIES[sys.argv.pop(1)])
    def one(drawn: tuple[str, bytes]) -> None:
        test_fuzz.exercise(drawn[1], drawn[0], seen)

    atheris.Setup(sys.argv, one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
