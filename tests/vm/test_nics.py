"""Emulated network cards with their real drivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.vm.kernels import KERNELS
from tests.vm.nics import NICS
from tests.vm.options import chosen
from tests.vm.suites import Job, Suites
from tests.vm.test_kernels import LONG_SECONDS, check, outcome_of

pytestmark = [pytest.mark.vm, pytest.mark.timeout(0)]

INSIDE = {
    "igb": (
        "tests/vm/inside/igb.py",
        "tests/vm/inside/igb_port.py",
        "tests/vm/inside/igb_irqs.py",
        "tests/vm/inside/igb_spread.py",
        "tests/vm/inside/igbvf.py",
        "tests/vm/inside/igb_queues.py",
        "tests/vm/inside/igb_exhaustion.py",
        "tests/vm/inside/chaos.py",
    )
}
"""Files of tests that run in the machine, by the card that they are for: with ``--long`` whole."""
FEW = {"igb": ("tests/vm/inside/igb_irqs.py -k interrupt", "tests/vm/inside/igb_queues.py -k mac")}
"""For every run, on the newest kernel: an emulator takes long."""
OF_THE_OLDEST = {"igb": ("tests/vm/inside/igb_port.py -k refused", "tests/vm/inside/igb_irqs.py")}
OF_THE_NEWEST = {
    "igb": (
        "tests/vm/inside/igb.py",
        "tests/vm/inside/igb_port.py -k auto",
        "tests/vm/inside/igb_irqs.py",
        "tests/vm/inside/igb_spread.py",
        "tests/vm/inside/igbvf.py",
        "tests/vm/inside/igb_queues.py",
        "tests/vm/inside/igb_exhaustion.py",
        "tests/vm/inside/chaos.py",
    )
}
"""For a kernel or a card that was named."""
TAKEN, PROBE = "tests/vm/inside/taken.py", "tests/vm/inside/nic_probe.py"
"""Files of tests that look at whatever cards there are."""


def job_of(kernel: str, files: Mapping[str, Sequence[str]], nics: tuple[str, ...], long: bool) -> Job:
    """Tests of all cards and ``files`` on a kernel, in a machine with these cards."""
    words = "".join(f" --nic {nic}" for nic in nics) + " --long" * long
    common = (TAKEN,) if files is FEW else (TAKEN, PROBE)
    own = (file for nic in nics for file in files.get(nic, ()))
    parts = tuple(file + words for file in (*common, *own))
    return Job(kernel, parts, nics, LONG_SECONDS) if long else Job(kernel, parts, nics)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The newest of the kernels; where they or cards were named, or with ``--long``, the oldest too."""
    kernels = chosen(metafunc.config, "vm", dict(KERNELS))
    nics = tuple(chosen(metafunc.config, "nic", dict(NICS)))
    named = metafunc.config.getoption("vm") or metafunc.config.getoption("nic")
    long = bool(metafunc.config.getoption("long"))
    files: dict[str, Mapping[str, Sequence[str]]] = {kernels[-1]: FEW}
    if named or long:
        files = {kernels[0]: OF_THE_OLDEST} | {kernels[-1]: OF_THE_NEWEST}
    jobs = [job_of(kernel, INSIDE if long else of_kernel, nics, long) for kernel, of_kernel in files.items()]
    cases = [(job, part) for job in jobs for part in job.parts]
    metafunc.parametrize(("job", "part"), cases, ids=[job.title(part) for job, part in cases])


def test_part(suites: Suites, job: Job, part: str) -> None:
    check(outcome_of(suites, job, part), job, part)
