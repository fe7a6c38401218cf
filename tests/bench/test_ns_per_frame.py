"""Nanoseconds per frame of the program alone: see ``classification.py``. Needs root.

Asserts what the programs decide, and nothing about time; the figures are printed, and recorded
as properties of the test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.bench.classification import BARE, NANOSECONDS, comparison
from tests.bench.contest import contend
from tests.bench.machine import sentence
from tests.bench.tables import table

SECONDS, ROUNDS = 20, 25


@pytest.mark.slow
def test_ns_per_frame(
    privilege: None, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as held:
        [outcome] = contend(comparison(held, SECONDS, ROUNDS))
    assert not outcome.missing
    bare = outcome.score(BARE)
    assert bare
    with capsys.disabled():
        print(f"\n{sentence()}\n\n{table(outcome)}")
        for score in outcome.scores:
            taken = score.figures[NANOSECONDS.key].median
            record_property(score.name, taken)
            print(
                f"  {score.name}: {taken - bare.figures[NANOSECONDS.key].median:+.0f} ns over bare redirect"
            )
