"""The same tests on other kernels: each file of the list runs in a machine that was booted for its kernel.

A skip inside passes only where ``MAY_SKIP`` says that this kernel lacks what the test needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.vm.archive import CACHE, ROOT
from tests.vm.kernels import KERNELS
from tests.vm.machine import MEMORY, Machine, MachineError
from tests.vm.options import FOUND, chosen

pytestmark = [pytest.mark.vm, pytest.mark.timeout(0)]

FILE_SECONDS = 1500
"""The longest that one file may take in a machine, outside's time; ``--long`` gives ten times that."""

SUITES: dict[str, tuple[str, ...]] = {
    "6.1": (
        "tests/bpf/test_switch.py",
        "tests/netns/test_bridge_vlans.py",
        "tests/netns/test_matrix.py -k kernel",
    ),
    "6.12": ("tests/netns/test_bridge_vlans.py",),
    "7.2": ("tests/netns/test_bridge_vlans.py",),
}
"""Files by kernel, some with a word that a test's id must have, chosen by the time they take. The oldest
does most: it has VLANs on the bridge and no tcx.
``--long`` takes all files, and all that they can do.
"""


@dataclass(frozen=True)
class Lack:
    """A skip reason (a pattern) that is right on kernels before a version, or from a version on."""

    reason: str
    before: tuple[int, int] = (0, 0)
    since: tuple[int, int] = (1000, 0)


MAY_SKIP = (
    Lack("Linux before 6.3 does not tell", before=(6, 3)),
    Lack("this kernel tells what drivers can do with XDP", since=(6, 3)),
    Lack("this kernel's bridge filters VLANs", since=(0, 0)),
    Lack("is refused with bridge: python", since=(0, 0)),
    Lack("igb has no zero copy before Linux 6.14", before=(6, 14)),
    Lack("igb has zero copy since Linux 6.14", since=(6, 14)),
    Lack("sockets are handed over since Linux 6.4", since=(6, 4)),
)


def files_of(kernel: str, long: bool) -> Sequence[str]:
    """What runs on a kernel: its suite, or every file that needs a kernel."""
    if not long:
        return SUITES[kernel]
    found = [*(ROOT / "tests/bpf").glob("test_*.py"), *(ROOT / "tests/netns").glob("test_*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    kernels = chosen(config, "vm", dict(KERNELS))
    cases = [(kernel, file) for kernel in kernels for file in files_of(kernel, config.getoption("long"))]
    metafunc.parametrize(
        ("kernel", "file"), cases, ids=[f"{kernel}-{Path(file.split()[0]).stem}" for kernel, file in cases]
    )


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


class Runs:
    """The machines of a test run: one per kernel, side by side where memory and CPUs allow."""

    def __init__(self, wanted: dict[str, list[str]], found: dict[str, dict[str, str]], long: bool) -> None:
        self._found = found
        self._long = long
        self.outcomes: dict[tuple[str, str], Future[Outcome]] = {
            (kernel, file): Future() for kernel, files in wanted.items() for file in files
        }
        self._stopping = False
        self._machines: dict[str, Machine] = {}
        self._pool = ThreadPoolExecutor(max_workers=side_by_side())
        for kernel, files in wanted.items():
            self._pool.submit(self._run, kernel, files)

    def _run(self, kernel: str, files: list[str]) -> None:
        """Fill in the outcomes of one kernel. A machine that fails costs a file; then there is a new one."""
        left = list(files)
        while left and not self._stopping:
            log = CACHE / "logs" / f"{kernel}.console"
            try:
                with Machine(KERNELS[kernel], log=log) as machine:
                    self._machines[kernel] = machine
                    if kernel not in self._found:
                        self._found[kernel] = abilities(machine)
                    while left and not self._stopping:
                        outcome = run_file(machine, left[0], self._long)
                        self.outcomes[kernel, left.pop(0)].set_result(outcome)
            except Exception as error:  # noqa: BLE001  # it is the test's to raise
                if left:
                    self.outcomes[kernel, left.pop(0)].set_exception(error)

    def close(self) -> None:
        """End what still runs; outcomes that nobody has asked for are lost."""
        self._stopping = True
        for machine in self._machines.values():
            machine.kill()
        self._pool.shutdown()


def side_by_side() -> int:
    """How many machines at once: an emulator keeps about one CPU busy, whatever it emulates."""
    info = Path("/proc/meminfo").read_text()
    available = int(re.search(r"^MemAvailable:\s+(\d+) kB", info, re.MULTILINE)[1]) >> 10  # type: ignore[index]
    return max(1, min(len(os.sched_getaffinity(0)), available // (MEMORY + 512)))


def run_file(machine: Machine, file: str, long: bool) -> Outcome:
    """Run one file's tests inside; what they did. MachineError when pytest did not come to an end."""
    report = "/run/report.xml"
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *file.split()]
    if long:
        command.append("--long")
    done = machine.run(*command, timeout=FILE_SECONDS * (10 if long else 1))
    read = machine.run("cat", report)
    machine.run("rm", "-f", report)
    machine.keep_compiled()
    if read.exit_code != 0:
        raise MachineError(f"{machine}: pytest has not come to a report\n{done.stdout}{done.stderr}")
    return Outcome.read(read.stdout)


def abilities(machine: Machine) -> dict[str, str]:
    """What ``offload doctor`` finds inside, by check."""
    document = json.loads(machine.run("python", "-m", "offload", "doctor", "--json").stdout)
    release = machine.run("uname", "-r").stdout.strip()
    return {"release": release} | {finding["check"]: finding["level"] for finding in document["findings"]}


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, privilege: None) -> Iterator[Runs]:
    """All machines of the tests that were chosen, started together. Scope: the test run."""
    if missing := [
        name for name in ("qemu-system-x86_64", "busybox", "modprobe") if shutil.which(name) is None
    ]:
        pytest.fail(f"{', '.join(missing)}: not installed; run deploy/setup.sh --dev")
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_file:
            case = item.callspec.params
            wanted.setdefault(str(case["kernel"]), []).append(str(case["file"]))
    runs = Runs(wanted, request.config.stash[FOUND], request.config.getoption("long"))
    yield runs
    runs.close()


def test_file(runs: Runs, kernel: str, file: str) -> None:
    outcome = runs.outcomes[kernel, file].result()
    for name, text in outcome.failures.items():
        print(f"---- Linux {kernel}: {name}\n{text}\n")
    assert not outcome.failures.keys(), f"on Linux {kernel}"
    assert not outcome.wrong_skips(kernel)
    assert outcome.passed > 0
