"""The host's addresses and routes on the real kernel: read, moved to another device, put back. Needs root.

``ip`` is the second opinion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from offload.errors import KernelError
from offload.kernel.hostnet import HostNet
from offload.kernel.links import Links
from offload.model import Address, Carried, CarriedAddress, Change, Link, Resource, Route, RouteTarget
from offload.takeover import HostNetwork, rank
from tests.lab import Lab, wait_until

DEFAULT4 = Route("0.0.0.0/0", 254, 0, 0)


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A host with IPv6, and a second device ``other`` beside its NIC."""
    made = make_lab(ipv6=True)
    made.host.ip("link add other type veth peer name other-end")
    made.host.ip("link set other up")
    made.host.ip("link set other-end up")
    return made


@pytest.fixture
def hostnet(lab: Lab) -> Iterator[HostNet]:
    with lab.host.call(HostNet) as opened:
        yield opened


def nic(lab: Lab) -> Link:
    with Links(lab.host.path) as links:
        return links.snapshot()[lab.nic]


def read(lab: Lab, hostnet: HostNet) -> HostNetwork:
    link = nic(lab)
    return lab.host.call(lambda: hostnet.read([link], {}))


def execute(lab: Lab, hostnet: HostNet, *changes: Change) -> None:
    for change in sorted(changes, key=rank):
        lab.host.call(lambda change=change: hostnet.execute(change))  # type: ignore[misc]


def observe(lab: Lab, hostnet: HostNet, *wanted: Resource) -> dict[Resource, Any]:
    return lab.host.call(lambda: hostnet.observe(wanted))


def shown(lab: Lab) -> dict[str, Any]:
    """Addresses and routes as ``ip`` shows them, without what changes by itself."""
    addresses = json.loads(lab.host.ip(f"-json address show dev {lab.nic}"))[0]["addr_info"]
    routes = [
        json.dumps({key: value for key, value in route.items() if key != "expires"})
        for family in ("-4", "-6")
        for route in json.loads(lab.host.ip(f"-json {family} route show table all"))
    ]
    return {
        "addresses": [{k: v for k, v in one.items() if "life_time" not in k} for one in addresses],
        "routes": sorted(routes),
    }


def test_all_that_can_be_on_a_nic_is_read_taken_and_put_back(lab: Lab, hostnet: HostNet) -> None:
    host = lab.host
    host.ip(f"address add 192.0.2.1/24 broadcast + dev {lab.nic} label {lab.nic}:main")
    host.ip(f"address add 192.0.2.2/24 dev {lab.nic} valid_lft 3600 preferred_lft 1800")
    host.ip(f"address add 198.51.100.1/25 dev {lab.nic} noprefixroute metric 50")
    host.ip(f"address add 2001:db8::1/64 dev {lab.nic}")
    host.ip(f"address add 2001:db8:1::1/64 dev {lab.nic} nodad valid_lft 3600 preferred_lft 1800")
    host.ip(f"route add 198.51.100.0/25 dev {lab.nic} proto kernel scope link src 198.51.100.1 metric 100")
    host.ip(f"route add default via 192.0.2.254 dev {lab.nic} src 192.0.2.2 proto dhcp mtu 1400")
    host.ip(f"route add default via 198.51.100.126 dev {lab.nic} metric 200")
    host.ip(f"route add 203.0.113.0/24 via 192.0.2.253 dev {lab.nic} table 100 onlink")
    host.ip(f"-6 route add default via 2001:db8::fe dev {lab.nic} pref high")
    host.ip("address add 203.0.113.1/24 dev other")
    host.ip("route add 198.51.100.128/25 dev other")  # not the NIC's
    wait_until(lambda: "tentative" not in host.ip("address"), "IPv6 has its addresses")
    before = shown(lab)

    found = read(lab, hostnet)
    assert {resource.address for resource in found.carried} == {
        "192.0.2.1/24",
        "192.0.2.2/24",
        "198.51.100.1/25",
        "2001:db8::1/64",
        "2001:db8:1::1/64",
    }
    leased = found.addresses(lab.nic)["192.0.2.2/24"]
    assert leased.valid is not None
    assert {(route.to, route.table, route.metric) for route in found.routes} == {
        ("198.51.100.0/25", 254, 100),
        ("0.0.0.0/0", 254, 0),
        ("0.0.0.0/0", 254, 200),
        ("203.0.113.0/24", 100, 0),
        ("::/0", 254, 1024),
    }
    assert not found.unmovable

    moved = [Change(route, value, ("other", *value[1:])) for route, value in found.routes.items()]
    copies = [
        Change(Address("other", one.address), None, "alone" if "100.1/" in one.address else True)
        for one in found.carried
    ]
    removals = [Change(one, value, None) for one, value in found.carried.items()]
    execute(lab, hostnet, *copies)
    execute(lab, hostnet, *moved)
    execute(lab, hostnet, *removals)
    assert set(observe(lab, hostnet, *found.carried).values()) == {None}
    assert observe(lab, hostnet, *(change.resource for change in copies)) == {
        change.resource: change.after for change in copies
    }
    assert observe(lab, hostnet, *found.routes) == {change.resource: change.after for change in moved}
    left = json.loads(host.ip(f"-json -4 route show table all dev {lab.nic}"))
    assert left == []

    execute(lab, hostnet, *(change.inverse() for change in removals))
    execute(lab, hostnet, *(change.inverse() for change in moved))
    execute(lab, hostnet, *(change.inverse() for change in copies))
    assert shown(lab) == before


def test_no_route_is_missing_while_it_is_replaced(lab: Lab, hostnet: HostNet) -> None:
    """Every lookup while the default route goes to and fro finds it, on one device or the other."""
    for device in (lab.nic, "other"):
        lab.host.ip(f"address add 192.0.2.1/24 dev {device}")
    here = RouteTarget(lab.nic, "192.0.2.254", None, 4, 0).as_value()
    there = ("other", *here[1:])
    execute(lab, hostnet, Change(DEFAULT4, None, here))
    with lab.host.popen("ip", "monitor", "route") as monitor:
        for _ in range(50):
            execute(lab, hostnet, Change(DEFAULT4, here, there), Change(DEFAULT4, there, here))
        monitor.terminate()
        heard, _ = monitor.communicate(timeout=10)
    assert "Deleted default" not in heard


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        pytest.param(
            "add default nexthop via 192.0.2.254 dev {nic} nexthop via 192.0.2.253 dev {nic}",
            "a route to 0.0.0.0/0 over several next hops",
            id="multipath",
        ),
        pytest.param(
            "add 203.0.113.0/24 nhid 7",
            "a route to 203.0.113.0/24 over a next hop object",
            id="nexthop object",
        ),
        pytest.param(
            "add 203.0.113.0/24 encap ip id 7 dst 192.0.2.253 dev {nic}",
            "a route to 203.0.113.0/24 with an encapsulation",
            id="encapsulation",
        ),
        pytest.param(
            "append default via 192.0.2.253 dev {nic}",
            "several routes to 0.0.0.0/0 with the metric 0",
            id="two of one metric",
        ),
    ],
)
def test_a_route_that_cannot_be_set_again_stands_in_the_way(
    lab: Lab, hostnet: HostNet, route: str, reason: str
) -> None:
    lab.host.ip(f"address add 192.0.2.1/24 dev {lab.nic}")
    if "multi" not in reason and "append" in route:
        lab.host.ip(f"route add default via 192.0.2.254 dev {lab.nic}")
    if "nhid" in route:
        lab.host.ip(f"nexthop add id 7 via 192.0.2.254 dev {lab.nic}")
    lab.host.ip("route " + route.format(nic=lab.nic))
    assert read(lab, hostnet).unmovable == {lab.nic: (reason,)}


def test_a_far_end_stands_in_the_way(lab: Lab, hostnet: HostNet) -> None:
    lab.host.ip(f"address add 192.0.2.1 peer 192.0.2.2 dev {lab.nic}")
    assert read(lab, hostnet).unmovable == {lab.nic: ("a point-to-point address, 192.0.2.1/32",)}


def test_link_local_addresses_of_ipv6_stay(lab: Lab, hostnet: HostNet) -> None:
    found = read(lab, hostnet)
    assert not found.carried
    assert not found.routes


def test_an_address_whose_lifetime_has_ended_stays_away(lab: Lab, hostnet: HostNet) -> None:
    resource = Carried(lab.nic, nic(lab).ifindex, "192.0.2.1/24")
    execute(lab, hostnet, Change(resource, None, CarriedAddress(0, 0, 0, 1, 1).as_value()))
    assert observe(lab, hostnet, resource) == {resource: None}


def test_what_is_not_there_can_be_removed(lab: Lab, hostnet: HostNet) -> None:
    target = RouteTarget(lab.nic, None, None, 4, 253).as_value()
    execute(
        lab,
        hostnet,
        Change(Address("other", "192.0.2.1/24"), True, None),
        Change(Route("203.0.113.0/24", 254, 0, 0), target, None),
    )


def test_what_the_kernel_refuses_is_told_with_the_device(lab: Lab, hostnet: HostNet) -> None:
    """The default route's gateway is in no network of the device."""
    target = RouteTarget(lab.nic, "192.0.2.254", None, 4, 0).as_value()
    with pytest.raises(KernelError, match=rf"{lab.nic}: cannot lead the route to 0\.0\.0\.0/0 through it"):
        execute(lab, hostnet, Change(DEFAULT4, None, target))


def test_a_nic_is_known_by_its_permanent_mac(lab: Lab, hostnet: HostNet) -> None:
    """A veth has none: there it is the one it has."""
    link = nic(lab)
    assert lab.host.call(lambda: hostnet.permanent_mac(link)) == link.mac


def test_for_no_nic_nothing_is_listed(lab: Lab, hostnet: HostNet) -> None:
    lab.host.ip(f"route add 203.0.113.0/24 dev {lab.nic}")
    hostnet.close()  # whoever asks the kernel now fails
    assert lab.host.call(lambda: hostnet.read([], {})) == HostNetwork()
    with pytest.raises(KernelError):
        read(lab, hostnet)
