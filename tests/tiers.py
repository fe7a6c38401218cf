"""A pytest plugin that prints what each test tier took: ``pytest -p tests.tiers``.

A tier is a directory under ``tests/``; its time is the sum of set-up, call and tear-down of its tests.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each tier that ran: tests by outcome, and seconds."""
    seconds: defaultdict[str, float] = defaultdict(float)
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tier = report.nodeid.split("/")[1] if report.nodeid.count("/") > 1 else "tests"
                seconds[tier] += report.duration
                if outcome:  # set-up and tear-down that went well are filed under ""
                    outcomes[tier][outcome] += 1
    if seconds:
        terminalreporter.section("time per tier")
    for tier in sorted(seconds):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes[tier].items()))
        terminalreporter.write_line(f"{tier:8} {seconds[tier]:7.1f} s  {counts}")
