"""A pytest plugin: which kernels and NICs to boot, and the table of what each kernel could do.

``pyproject.toml`` loads it, for options must be known before ``tests/vm`` is looked into.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.vm.kernels import KERNELS
from tests.vm.nics import NICS

SAME = ("tests/bpf/", "tests/netns/")
"""The tests that run on every kernel."""


@dataclass
class Found:
    """What a kernel can do, a word or two by question; and what became of the ``SAME`` tests on it."""

    answers: dict[str, str]
    passed: int = 0
    failed: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    """How many tests were skipped, by reason."""

    @property
    def rows(self) -> dict[str, str]:
        tests = {
            "tests passed": self.passed,
            "tests failed": self.failed,
            "tests skipped": self.skips.total(),
        }
        return self.answers | {name: str(number) for name, number in tests.items()}


FOUND = pytest.StashKey[dict[str, Found]]()
"""By kernel."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("booted kernels")
    group.addoption(
        "--vm",
        action="append",
        choices=[*KERNELS, "all"],
        help="boot this kernel for a choice of the tests; several times (default: all, for a few)",
    )
    group.addoption(
        "--nic", action="append", choices=[*NICS, "all"], help="with this emulated NIC only; likewise"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {}


def chosen(config: pytest.Config, option: str, all_of: dict[str, object]) -> list[str]:
    """What ``--vm`` or ``--nic`` chose."""
    names = config.getoption(option) or ["all"]
    return [name for name in all_of if name in names or "all" in names]


def abilities() -> dict[str, str]:
    """The release of the running kernel, and what ``offload doctor`` finds, by check."""
    shown = subprocess.run(
        [sys.executable, "-m", "offload", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    findings = json.loads(shown.stdout)["findings"]
    return {"release": os.uname().release} | {finding["check"]: finding["level"] for finding in findings}


def _here(reporter: pytest.TerminalReporter) -> Found:
    """The machine's own kernel, as this test run saw it."""
    found = Found(abilities())
    for outcome, reports in reporter.stats.items():
        same = [
            report
            for report in reports
            if isinstance(report, pytest.TestReport) and report.nodeid.startswith(SAME)
        ]
        match outcome:
            case "passed":
                found.passed = len(same)
            case "failed" | "error":
                found.failed += len(same)
            case "skipped":
                found.skips.update(_reason(report) for report in same)
    return found


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    booted = terminalreporter.config.stash[FOUND]
    if not booted:
        return
    found = {"here": _here(terminalreporter), **booted}
    rows = {kernel: one.rows for kernel, one in found.items()}
    terminalreporter.section("what each kernel could do")
    questions = dict.fromkeys(question for answers in rows.values() for question in answers)
    width = max(map(len, questions))
    columns = {kernel: max(len(kernel), *map(len, answers.values())) for kernel, answers in rows.items()}
    for question in ("", *questions):
        cells = [
            rows[kernel].get(question, "-" if question else kernel).ljust(columns[kernel]) for kernel in rows
        ]
        terminalreporter.write_line("  ".join([question.ljust(width), *cells]).rstrip())
    for kernel, one in found.items():
        for reason, number in sorted(one.skips.items()):
            terminalreporter.write_line(f"skipped on {kernel}: {number} x {reason}")


if __name__ == "__main__":  # asked inside a machine
    print(json.dumps(abilities()))
