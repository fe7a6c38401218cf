"""TCP with offloads on: checksums and segments stay to be made while frames cross a switch. Needs root.

How fast it goes is told by ``tests.bench.streams``; here each flow must arrive complete, and a packet
on its way to a VM, to the host or to the NIC must be larger than a frame of the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.instance import Instance
from tests.lab import Lab
from tests.tcp import FLOWS, SHARED_FLOWS, End, config_of, ends_of, sent_to, transfer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BLOCKS = 32


@dataclass(frozen=True)
class Site:
    lab: Lab
    ends: dict[str, End]


WAYS = [(bridge, queue) for bridge in ("kernel", "python") for queue in ("auto", "off")]
UNTAGGED = [pytest.param((*way, None), id="-".join(way)) for way in WAYS]
SHARING = [pytest.param((*way, None), id="-".join(way)) for way in WAYS if way[0] == "kernel"]
"""Where the host can share the adapter; it is refused on a Python bridge."""
IN_VLAN = [pytest.param((*way, 10), id="-".join(way)) for way in WAYS]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, privilege: None, bridge_filters_vlans: bool) -> Iterator[Site]:
    """Both switches: which bridge, queues or not, everybody's VLAN. Scope: all of a test's flows."""
    bridge, queue, vlan = request.param
    if vlan and bridge == "kernel" and not bridge_filters_vlans:
        pytest.skip("this kernel's bridge has no VLAN filtering")
    with Lab() as lab:
        ends = ends_of(lab)
        config = config_of(lab, bridge, queue, shared=bridge == "kernel", vlan=vlan)
        with Instance(lab.host, config) as instance:
            instance.start()
            for name in config["ports"]:
                instance.wait_port(name, state="active")
            yield Site(lab, ends)


@pytest.mark.parametrize("site", UNTAGGED, indirect=True)
@pytest.mark.parametrize("flow", FLOWS)
def test_flow(site: Site, flow: str) -> None:
    assert_carried(site, flow, *FLOWS[flow])


@pytest.mark.parametrize("site", SHARING, indirect=True)
@pytest.mark.parametrize("flow", SHARED_FLOWS)
def test_flow_of_a_host_that_shares_the_adapter(site: Site, flow: str) -> None:
    assert_carried(site, flow, *SHARED_FLOWS[flow])


@pytest.mark.parametrize("site", IN_VLAN, indirect=True)
@pytest.mark.parametrize("flow", [flow for flow, ends in FLOWS.items() if "wire" not in ends])
def test_flow_in_a_vlan(site: Site, flow: str) -> None:
    """Segments that carry a tag inside the switch. A peer on the wire would need VLAN devices."""
    assert_carried(site, flow, *FLOWS[flow])


def assert_carried(site: Site, flow: str, start: str, target: str) -> None:
    """All bytes arrive, and the packets on their way are larger than frames if the wire did not send them."""
    source, sink = site.ends[start], site.ends[target]
    packets, octets = sent_to(site.lab, sink)
    seconds = transfer(source, sink, BLOCKS)
    more_packets, more_octets = sent_to(site.lab, sink)
    mean = (more_octets - octets) / (more_packets - packets)
    print(f"{flow}: {(more_octets - octets) * 8 / seconds / 1e9:.1f} Gbit/s, {mean:.0f} bytes a packet")
    if start != "wire":
        assert mean > 2 * site.lab.mtu
