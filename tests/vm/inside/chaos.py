"""Chaos on the Intel 82576, by its real driver: see ``tests/chaos.py``. With ``--long`` ten minutes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from offload.kernel import irq
from tests import chaos
from tests.chaos import Event, Site
from tests.lab import NIC_MAC, wait_until
from tests.mishaps import OF_THE_NIC, OF_THE_SWITCH
from tests.vm.inside.cards import Cards, cards

pytestmark = pytest.mark.timeout(1500)

DRIVER = "igb"
LONG = 600.0
PATIENCE = 40.0
VID = 10


@contextmanager
def driver_unbound(site: Site, rng: Random) -> Iterator[str]:
    """The device goes, and comes back as another one, with another name and in another namespace."""
    host, nic = site.lab.host, site.lab.nic
    [bus] = re.findall(r"bus-info: (\S+)", host.run("ethtool", "-i", nic).stdout)
    driver = Path("/sys/bus/pci/drivers", DRIVER)
    (driver / "unbind").write_text(bus)
    site.wait_bridged()
    yield bus
    (driver / "bind").write_text(bus)
    wait_until(lambda: bool(cards(DRIVER)), "there is a card again", PATIENCE)
    [found] = cards(DRIVER)
    moved = ("ip", "link", "set", found, "netns", host.name)
    host.run("nsenter", "--target=1", "--net", *moved)
    host.ip(f"link set {found} down name {nic} address {NIC_MAC}")
    host.ip(f"link set {nic} up")


@contextmanager
def channels(site: Site, rng: Random) -> Iterator[str]:
    change = ("ethtool", "-L", site.lab.nic, "combined")
    site.lab.host.run(*change, "1")
    yield ""
    site.lab.host.run(*change, "2")


@contextmanager
def spread(site: Site, rng: Random) -> Iterator[str]:
    """The RSS table is another one."""
    how = rng.choice((("equal", "1"), ("weight", "0", "1"), ("weight", "1", "3"), ("default",)))
    site.lab.host.run("ethtool", "-X", site.lab.nic, *how)
    yield " ".join(how)


@contextmanager
def interrupts_moved(site: Site, rng: Random) -> Iterator[str]:
    at = (site.lab.nic, site.lab.host.ifindex(site.lab.nic))
    found = site.lab.host.call(lambda: irq.queue_irqs(*at))
    cpus = rng.choice(("0", "1", "0-1"))
    for numbers in found.values():
        for number in numbers:
            irq.set_affinity(number, cpus, site.lab.nic)
    yield cpus


@contextmanager
def tags_stripped(site: Site, rng: Random) -> Iterator[str]:
    """Before XDP sees them."""
    site.lab.host.run("ethtool", "-K", site.lab.nic, "rxvlan", "on")
    yield ""


EVENTS = (
    *OF_THE_NIC,
    Event(driver_unbound, cut=True),
    Event(channels),
    Event(spread),
    Event(interrupts_moved),
    Event(tags_stripped, opens=True),
)


def test_chaos(long: bool) -> None:
    with Cards(DRIVER) as lab, chaos.site(lab, VID, PATIENCE) as site:
        events = (*EVENTS, *OF_THE_SWITCH) if long else EVENTS
        chaos.run(site, events, chaos.seed(), LONG if long else 0)
