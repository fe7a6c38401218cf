"""Emulated network cards with their real drivers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.kernels import KERNELS
from tests.vm.machine import Machine
from tests.vm.nics import NICS, near_mac
from tests.vm.options import chosen

pytestmark = pytest.mark.vm


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("nic", chosen(metafunc.config, "nic", dict(NICS)))


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, privilege: None) -> Iterator[Machine]:
    """The newest of the chosen kernels with all chosen cards. Scope: one module."""
    kernel = chosen(request.config, "vm", dict(KERNELS))[-1]
    cards = [NICS[name] for name in chosen(request.config, "nic", dict(NICS))]
    with Machine(KERNELS[kernel], nics=cards) as machine:
        yield machine


def test_the_driver_takes_its_card(machine: Machine, nic: str) -> None:
    addresses = machine.run("ip", "-brief", "link").stdout
    [device] = [line.split()[0] for line in addresses.splitlines() if near_mac(NICS[nic]) in line]
    assert f"driver: {nic}\n" in machine.run("ethtool", "-i", device).stdout
