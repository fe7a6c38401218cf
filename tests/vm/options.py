"""A pytest plugin: which kernels and NICs to boot, and the table of what they could do.

``pyproject.toml`` loads it, for options must be known before ``tests/vm`` is looked into.
"""

from __future__ import annotations

import pytest

from tests.vm.kernels import KERNELS
from tests.vm.nics import NICS

FOUND = pytest.StashKey[dict[str, dict[str, str]]]()
"""By kernel: what was asked of it, and the answer in a word or two."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("booted kernels")
    group.addoption(
        "--vm",
        action="append",
        choices=[*KERNELS, "all"],
        help="boot this kernel only; may be given several times (default: all)",
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash[FOUND]
    if not found:
        return
    terminalreporter.section("what each booted kernel could do")
    width = max(len(question) for answers in found.values() for question in answers)
    columns = {kernel: max(len(kernel), *map(len, answers.values())) for kernel, answers in found.items()}
    questions = dict.fromkeys(question for answers in found.values() for question in answers)
    for question in ("", *questions):
        cells = [
            found[kernel].get(question, "-" if question else kernel).ljust(columns[kernel])
            for kernel in found
        ]
        terminalreporter.write_line("  ".join([question.ljust(width), *cells]).rstrip())
