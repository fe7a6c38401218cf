"""The machines of a test run: they start with the first test outside that is not a benchmark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.vm.suites import Job, Suites


class Beside:
    """A pytest plugin that starts the jobs that tests were collected for."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._suites: Suites | None = None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if os.geteuid() == 0 and not item.nodeid.startswith("tests/bench/"):
            self.suites()

    def suites(self) -> Suites:
        if self._suites is None:
            self._suites = Suites(self._jobs)
        return self._suites

    def close(self) -> None:
        if self._suites is not None:
            self._suites.close()
            self._suites = None

    def pytest_unconfigure(self) -> None:
        self.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    parts: dict[Job, list[str]] = {}
    for item in session.items:
        call = getattr(item, "callspec", None)
        match call and call.params:
            case {"job": Job() as job, "part": str(part)}:
                parts.setdefault(job, []).append(part)
    jobs = [replace(job, parts=tuple(chosen)) for job, chosen in parts.items()]
    if jobs and not session.config.option.collectonly:
        session.config.pluginmanager.register(Beside(jobs), Beside.__name__)


@pytest.fixture(scope="session")
def suites(request: pytest.FixtureRequest, privilege: None) -> Iterator[Suites]:
    """The jobs of the tests that were chosen, already at work. Scope: the test run."""
    if missing := [
        name for name in ("qemu-system-x86_64", "busybox", "modprobe") if shutil.which(name) is None
    ]:
        pytest.fail(f"{', '.join(missing)}: not installed; run deploy/setup.sh --dev")
    beside = request.config.pluginmanager.get_plugin(Beside.__name__)
    assert isinstance(beside, Beside)
    yield beside.suites()
    beside.close()
