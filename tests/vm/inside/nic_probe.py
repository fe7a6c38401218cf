"""What is told of the emulated cards, beside what their drivers really do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload import xsk
from offload.config import QueuesConfig
from offload.kernel import irq, nics
from offload.kernel.ethtool import Ethtool
from offload.kernel.links import Links
from offload.model import Link
from tests.lab import VERSION, wait_until
from tests.vm.inside.cards import LINK_SECONDS, cards
from tests.vm.nics import NICS

Version = tuple[int, int]

NEVER: Version = (1000, 0)
TOLD_SINCE: Version = (6, 3)
"""Since when the kernel tells what drivers can do with XDP."""
NATIVE_SINCE = {"igb": (5, 10), "virtio_net": (4, 10), "vmxnet3": (6, 6), "e1000e": NEVER}
ZERO_COPY_SINCE = {"igb": (6, 14), "virtio_net": (6, 13)}
FRAGS = {"virtio_net"}
TARGETS = {"vmxnet3"}
"""Drivers that are a target of redirection at any time."""
NAPI_SETTINGS_SINCE: Version = (6, 13)

ALL = {
    "rss_contexts": "no",
    "steering_rules": "no",
    "vlan_in_frame": "yes",
    "msix": "yes",
    "numa": "no",
    "mtu": "yes",
    "xdp_mtu": "unknown",
    "irq_affinity": "yes",
    "irqs_stay": "yes",
    "napi_threads": "yes",
}
OF_ONE = {
    "igb": {"channels": "yes", "rss_table": "yes", "sriov": "yes"},
    "virtio_net": {"channels": "yes", "rss_table": "no", "sriov": "no"},
    "e1000e": {"channels": "no", "rss_table": "no", "sriov": "no"},
    "vmxnet3": {"channels": "yes", "rss_table": "yes", "sriov": "no"},
}
TOLD = {
    "igb": (
        "2 of at most 8",
        "128 slots",
        "5 vectors in use of 10",
        "68 to 9216 bytes",
        "7 virtual functions",
    ),
    "virtio_net": ("2 of at most 4", "9 vectors in use of 10", "68 to 65535 bytes"),
    "e1000e": ("1, a number that its driver cannot change", "3 vectors in use of 5", "68 to 9212 bytes"),
    "vmxnet3": ("2 of at most 2", "128 slots", "3 vectors in use of 25", "60 to 9000 bytes"),
}
"""Numbers, each in one of the answers."""

DRIVERS = [driver for driver in OF_ONE if cards(driver)]


def since(version: Version) -> bool:
    return version <= VERSION


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


def expected(driver: str) -> dict[str, str]:
    """The right answers of this kernel and driver."""
    native = since(NATIVE_SINCE[driver])
    of_xdp = {
        "native_xdp": yes(native),
        "xdp_frags": yes(driver in FRAGS),
        "xdp_redirect_target": "unknown" if native and driver not in TARGETS else yes(native),
        "zero_copy": yes(since(ZERO_COPY_SINCE.get(driver, NEVER))),
    }
    if not since(TOLD_SINCE):
        of_xdp = dict.fromkeys(of_xdp, "unknown")
    return {**ALL, **OF_ONE[driver], **of_xdp, "napi_settings": yes(since(NAPI_SETTINGS_SINCE))}


@pytest.fixture(scope="module")
def near() -> dict[str, str]:
    """The near card of each driver, up and with a link. Scope: the module."""
    for driver in DRIVERS:
        for device in cards(driver):
            subprocess.run(["ip", "link", "set", device, "up"], check=True)
    found = {driver: cards(driver)[0] for driver in DRIVERS}
    wait_until(
        lambda: all(_file(device, "carrier") == "1" for device in found.values()),
        "the cards have a link",
        LINK_SECONDS,
    )
    return found


@pytest.fixture(scope="module")
def findings(near: dict[str, str]) -> list[dict[str, Any]]:
    """What `offload doctor` finds. Scope: the module."""
    command = [sys.executable, "-m", "offload", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return found


@pytest.fixture
def ethtool() -> Iterator[Ethtool]:
    with Ethtool() as ethtool:
        yield ethtool


@pytest.fixture
def links() -> Iterator[Links]:
    with Links() as links:
        yield links


def link(links: Links, device: str) -> Link:
    found = links.find(device)
    assert found is not None
    return found


def _file(device: str, name: str) -> str:
    return Path("/sys/class/net", device, name).read_text().strip()


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_doctor_tells_what_is_so(
    near: dict[str, str], findings: list[dict[str, Any]], driver: str
) -> None:
    about = {found["check"]: found["message"] for found in findings if found["subject"] == near[driver]}
    states = {
        check: about[check].split(": ")[1].replace("could not tell", "unknown") for check in expected(driver)
    }
    assert states == expected(driver)
    assert about["driver"] == f"driver {driver}"
    assert [told for told in TOLD[driver] if not any(told in message for message in about.values())] == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_probe_tells_of_native_xdp_and_changes_nothing(
    near: dict[str, str], ethtool: Ethtool, links: Links, driver: str
) -> None:
    """On every kernel; then a program is attached, to see whether it is true."""
    device = near[driver]
    nic = link(links, device)

    def settings() -> tuple[object, ...]:
        served = irq.queue_irqs(device, nic.ifindex)
        by = {number: irq.affinity(number) for numbers in served.values() for number in numbers}
        return ethtool.features(device), by, _file(device, "carrier_changes"), link(links, device).xdp_prog_id

    before = settings()
    answer = nics.capabilities(nic, ethtool, probe=True)["native_xdp"]
    assert settings() == before
    assert answer.state == yes(since(NATIVE_SINCE[driver]))
    try:
        with xsk.Redirect(device, "native"):
            really = "yes"
    except xsk.UnsupportedError:
        really = "no"
    assert answer.state == really


@pytest.mark.parametrize("driver", DRIVERS)
def test_virtual_functions_are_hardware_queues_where_they_are_asked_for(
    near: dict[str, str], ethtool: Ethtool, links: Links, driver: str
) -> None:
    nic = link(links, near[driver])
    left_alone, asked = (
        nics.hardware(nic, ethtool, links, settings, functions_are_ours=False)
        for settings in (QueuesConfig(), QueuesConfig(vf_xdp_mode="generic"))
    )
    assert left_alone.how is None
    assert "it has no steering rules (rx-ntuple-filter is off, and fixed), and" in left_alone.why
    if driver == "igb":
        assert f"nics.{nic.name}.queues.vf_xdp_mode: generic would use its 7" in left_alone.why
        assert (asked.how, asked.why, asked.total_functions, asked.functions) == ("functions", "", 7, ())
    else:
        assert "no virtual functions" in left_alone.why
        assert asked == left_alone
    assert asked.rx_queues == NICS[driver].queues


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_fingerprint_tells_that_somebody_changed_something(
    near: dict[str, str], ethtool: Ethtool, links: Links, driver: str
) -> None:
    nic = link(links, near[driver])
    affinity = f"/proc/irq/{irq.queue_irqs(nic.name, nic.ifindex)[0][0]}/smp_affinity_list"
    changes = {"an interrupt": (f"echo 1 > {affinity}", f"echo 0-1 > {affinity}")}
    if driver == "igb":
        changes["RSS"] = (f"ethtool -X {nic.name} weight 0 1", f"ethtool -X {nic.name} default")
        changes["channels"] = (f"ethtool -L {nic.name} combined 1", f"ethtool -L {nic.name} combined 2")
    noticed = {}
    for what, (there, back) in changes.items():
        before = nics.fingerprint(nic, ethtool, links)
        assert nics.fingerprint(nic, ethtool, links) == before
        subprocess.run(there, shell=True, check=True)
        noticed[what] = nics.fingerprint(nic, ethtool, links) != before
        subprocess.run(back, shell=True, check=True)
    assert noticed == dict.fromkeys(changes, True)
