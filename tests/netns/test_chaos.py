"""Chaos on a veth NIC: see ``tests/chaos.py``. Needs root. With ``--long`` ten minutes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from tests import chaos
from tests.chaos import Event, Site
from tests.lab import Lab
from tests.mishaps import OF_THE_NIC, OF_THE_SWITCH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LONG = 600.0
PATIENCE = 20.0
QUEUES = 4
VID = 10


@contextmanager
def nic_made_anew(site: Site, rng: Random) -> Iterator[str]:
    lab = site.lab
    lab.host.ip(f"link delete {lab.nic}")
    site.wait_bridged()
    yield ""
    lab.add_nic(lab.nic, lab.wire_end, queues=QUEUES)


@contextmanager
def channels(site: Site, rng: Random) -> Iterator[str]:
    """With XDP the NIC has at least as many RX queues as the other end has TX queues."""
    count = rng.randint(1, QUEUES - 1)
    ends = ((site.lab.wire, site.lab.wire_end), (site.lab.host, site.lab.nic))
    for ns, device in ends:
        ns.run("ethtool", "-L", device, "rx", str(count), "tx", str(count))
    yield str(count)
    for ns, device in reversed(ends):
        ns.run("ethtool", "-L", device, "rx", str(QUEUES), "tx", str(QUEUES))


@contextmanager
def tags_beside_the_frames(site: Site, rng: Random) -> Iterator[str]:
    """Where the sender's end of the wire leaves the tags that a VLAN device makes."""
    site.lab.wire.run("ethtool", "-K", site.lab.wire_end, "txvlan", "on")
    yield ""


EVENTS = (
    *OF_THE_NIC,
    *OF_THE_SWITCH,
    Event(nic_made_anew, cut=True),
    Event(channels),
    Event(tags_beside_the_frames, untold=True),
)


def test_chaos(lab: Lab, bridge_filters_vlans: bool, long: bool) -> None:
    with chaos.site(lab, VID if bridge_filters_vlans else 0, PATIENCE) as site:
        chaos.run(site, EVENTS, chaos.seed(), LONG if long else 0)
