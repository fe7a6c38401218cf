"""Emulated network cards with their real drivers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.kernels import KERNELS
from tests.vm.machine import Machine
from tests.vm.nics import NICS, near_mac
from tests.vm.options import chosen
from tests.vm.test_kernels import run_file

pytestmark = [pytest.mark.vm, pytest.mark.timeout(0)]

INSIDE = {"igb": ("tests/vm/inside/igb.py", "tests/vm/inside/igb_port.py")}
"""Files of tests that run in the machine, by the card that they are for: with ``--long`` whole."""
OF_THE_OLDEST = {"igb": ("tests/vm/inside/igb_port.py -k refused",)}
OF_THE_NEWEST = {"igb": ("tests/vm/inside/igb.py", "tests/vm/inside/igb_port.py -k auto")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The oldest and the newest of the chosen kernels; of the chosen cards those that the test is for."""
    kernels = chosen(metafunc.config, "vm", dict(KERNELS))
    nics = chosen(metafunc.config, "nic", dict(NICS))
    metafunc.parametrize("kernel", dict.fromkeys((kernels[0], kernels[-1])), scope="module")
    if metafunc.function is test_what_its_driver_can_do:
        nics = [nic for nic in nics if nic in INSIDE]
    metafunc.parametrize("nic", nics)


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, privilege: None, kernel: str) -> Iterator[Machine]:
    """A machine with all chosen cards. Scope: the tests of one kernel."""
    cards = [NICS[name] for name in chosen(request.config, "nic", dict(NICS))]
    with Machine(KERNELS[kernel], nics=cards) as machine:
        yield machine


def test_the_driver_takes_its_card(machine: Machine, nic: str) -> None:
    addresses = machine.run("ip", "-brief", "link").stdout
    [device] = [line.split()[0] for line in addresses.splitlines() if near_mac(NICS[nic]) in line]
    assert f"driver: {nic}\n" in machine.run("ethtool", "-i", device).stdout
    machine.run("ip", "link", "set", device, "up")  # igb says then how many it has
    queues = machine.run("ls", f"/sys/class/net/{device}/queues").stdout.split()
    assert sum(queue.startswith("rx-") for queue in queues) == NICS[nic].queues


def test_what_its_driver_can_do(
    machine: Machine, kernel: str, nic: str, request: pytest.FixtureRequest
) -> None:
    long = bool(request.config.getoption("long"))
    newest = kernel == chosen(request.config, "vm", dict(KERNELS))[-1]
    for file in (INSIDE if long else OF_THE_NEWEST if newest else OF_THE_OLDEST)[nic]:
        outcome = run_file(machine, file, long)
        for name, text in outcome.failures.items():
            print(f"---- Linux {kernel}, {nic}: {name}\n{text}\n")
        assert not outcome.failures.keys(), f"on Linux {kernel}"
        assert not outcome.wrong_skips(kernel)
        assert outcome.passed > 0
