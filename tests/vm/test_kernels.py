"""The same tests on other kernels, in machines that were booted for them.

A skip inside passes only where ``MAY_SKIP`` says that this kernel lacks what the test needs.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field

import pytest

from tests.vm.archive import ROOT
from tests.vm.kernels import KERNELS
from tests.vm.options import FOUND, Found, chosen
from tests.vm.suites import Failed, Job, Suites

pytestmark = [pytest.mark.vm, pytest.mark.timeout(0)]

FEW = "@tests/vm/few.txt"
"""One test of each thing that kernels differ in, for every run: an emulator takes long."""
CHOICE = "@tests/vm/choice.txt"
"""Tests of every file that depends on the kernel, chosen by the time that they take: for ``--vm``."""
MORE = {"6.1": ("tests/netns/test_matrix.py -k kernel",)}
"""The oldest does most: it has VLANs on the bridge and no tcx."""
LONG_SECONDS = 15_000
"""What a file may take with ``--long``, which takes all files, and all that they can do."""


@dataclass(frozen=True)
class Lack:
    """A skip reason (a pattern) that is right on kernels before a version, or from a version on."""

    reason: str
    before: tuple[int, int] = (0, 0)
    since: tuple[int, int] = (1000, 0)


MAY_SKIP = (
    Lack("Linux before 6.3 does not tell", before=(6, 3)),
    Lack("this kernel tells what drivers can do with XDP", since=(6, 3)),
    Lack("this kernel's AF_XDP takes no frames of several buffers", before=(6, 6)),
    Lack("this kernel has no multi-buffer sockets", before=(6, 6)),
    Lack("this kernel has no tcx, whose pins say the version", before=(6, 6)),
    Lack("this kernel's bridge filters VLANs", since=(0, 0)),
    Lack("is refused with bridge: python", since=(0, 0)),
    Lack("igb has no zero copy before Linux 6.14", before=(6, 14)),
    Lack("igb has zero copy since Linux 6.14", since=(6, 14)),
    Lack("igb tells nothing of NAPI before Linux 6.16", before=(6, 16)),
    Lack("before Linux 6.4 no socket is handed over", before=(6, 4)),
    Lack("sockets are handed over since Linux 6.4", since=(6, 4)),
)


def job_of(kernel: str, named: bool, long: bool) -> Job:
    """What runs on a kernel: a few tests; the choice, if it was named; or every file that needs a kernel."""
    if not long:
        return Job(kernel, (CHOICE, *MORE.get(kernel, ())) if named else (FEW,))
    found = [*(ROOT / "tests/bpf").glob("test_*.py"), *(ROOT / "tests/netns").glob("test_*.py")]
    files = sorted(str(file.relative_to(ROOT)) for file in found)
    return Job(kernel, tuple(f"{file} --long" for file in files), seconds=LONG_SECONDS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kernels = chosen(metafunc.config, "vm", dict(KERNELS))
    named, long = (bool(metafunc.config.getoption(option)) for option in ("vm", "long"))
    jobs = [job_of(kernel, named, long) for kernel in kernels]
    cases = [(job, part) for job in jobs for part in job.parts]
    metafunc.parametrize(("job", "part"), cases, ids=[job.title(part) for job, part in cases])


@dataclass
class Outcome:
    """What one file's tests did inside: failures with their text, skips with their reason."""

    passed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    skips: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, report: str) -> Outcome:
        """From JUnit's XML."""
        outcome = cls()
        for case in ElementTree.fromstring(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            bad = [*case.iter("failure"), *case.iter("error")]
            if bad:
                outcome.failures[name] = "\n".join(part.text or part.get("message") or "" for part in bad)
            elif (skipped := case.find("skipped")) is not None:
                outcome.skips[name] = skipped.get("message", "")
            else:
                outcome.passed += 1
        return outcome

    def wrong_skips(self, kernel: str) -> dict[str, str]:
        """Skips that nothing in this kernel excuses."""
        version = tuple(int(part) for part in kernel.split("."))
        excused = [lack.reason for lack in MAY_SKIP if version < lack.before or version >= lack.since]
        return {
            name: reason
            for name, reason in self.skips.items()
            if not any(re.search(known, reason) for known in excused)
        }


def outcome_of(suites: Suites, job: Job, part: str) -> Outcome:
    """Wait for a part of a job."""
    try:
        return Outcome.read(suites.report(job, part))
    except Failed as error:
        pytest.fail(f"Linux {job.kernel}: {error}\n{said(job, part)}", pytrace=False)


def check(outcome: Outcome, job: Job, part: str) -> None:
    """Fail as the tests inside did, or for a skip that nothing excuses."""
    for name, text in outcome.failures.items():
        print(f"---- Linux {job.kernel}: {name}\n{text}\n")
    assert not outcome.failures.keys(), said(job, part)
    assert not outcome.wrong_skips(job.kernel), said(job, part)
    assert outcome.passed > 0, said(job, part)


def said(job: Job, part: str) -> str:
    return f"see {job.log(part)} and {job.console}"


def test_part(suites: Suites, job: Job, part: str, request: pytest.FixtureRequest) -> None:
    outcome = outcome_of(suites, job, part)
    found = request.config.stash[FOUND].setdefault(job.kernel, Found(suites.found(job)))
    found.passed += outcome.passed
    found.failed += len(outcome.failures)
    found.skips.update(outcome.skips.values())
    check(outcome, job, part)
