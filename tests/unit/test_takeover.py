"""What a takeover moves, what stands against it, and in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offload import takeover
from offload.config import Config, HostConfig, RouteConfig
from offload.model import (
    Address,
    Carried,
    CarriedAddress,
    Change,
    Link,
    LinkDns,
    Resource,
    Route,
    RouteTarget,
    Value,
)
from offload.takeover import NO_PREFIX_ROUTE, Confirmation, HostNetwork

MAC = "02:aa:00:00:00:02"
NIC = Link(
    ifindex=3,
    name="eth1",
    kind=None,
    mac=MAC,
    mtu=1500,
    up=True,
    running=True,
    promiscuous=False,
    alias=None,
    master=None,
    master_name=None,
    rx_queues=4,
    tx_queues=4,
)
ADDRESS = Carried("eth1", 3, "192.0.2.1/24")
SECOND = Carried("eth1", 3, "2001:db8::1/64")
DEFAULT = Route("0.0.0.0/0", 254, 0, 0)
NETWORK = Route("198.51.100.0/24", 254, 100, 0)
HOST = HostConfig(interface="ext0-host")


def carried(place: int = 0, flags: int = 0, valid: int | None = None) -> tuple[object, ...]:
    return CarriedAddress(place, 0, flags, valid, valid).as_value()


def target(via: str | None = "192.0.2.254", device: str = "eth1", **more: Any) -> tuple[object, ...]:
    return replace(RouteTarget(device, via, None, 4, 0), **more).as_value()


BEFORE = HostNetwork(
    carried={ADDRESS: carried(), SECOND: carried(1)},
    routes={DEFAULT: target(src="192.0.2.1"), NETWORK: target(None)},
    macs={"eth1": MAC},
    may_take=True,
)
"""A NIC with the host's addresses, nothing of them taken."""
AFTER = HostNetwork(
    taken={ADDRESS: carried(), SECOND: carried(1), DEFAULT: target(src="192.0.2.1"), NETWORK: target(None)},
    macs={"eth1": MAC},
)
"""The same when everything has been taken, for a reconciliation that may not begin one."""
MOVED: dict[Resource, Value] = {
    Address("ext0-host", "192.0.2.1/24"): True,
    ADDRESS: None,
    Address("ext0-host", "2001:db8::1/64"): True,
    SECOND: None,
    DEFAULT: target(src="192.0.2.1", device="ext0-host"),
    NETWORK: target(None, device="ext0-host"),
}


@pytest.mark.parametrize("network", [pytest.param(BEFORE, id="before"), pytest.param(AFTER, id="after")])
def test_addresses_and_routes_move_and_stay_moved(network: HostNetwork) -> None:
    assert takeover.desired(HOST, NIC, network) == MOVED


def test_dns_servers_go_with_the_addresses() -> None:
    dns: tuple[object, ...] = (("192.0.2.53",), ("~.",), True)
    network = replace(BEFORE, dns={"eth1": dns})
    assert takeover.desired(HOST, NIC, network) == MOVED | {LinkDns("ext0-host"): dns}
    assert takeover.desired(HOST, NIC, replace(network, carried={}, routes={})) == {}


def test_nothing_moves_without_permission() -> None:
    assert takeover.desired(HOST, NIC, replace(BEFORE, may_take=False)) == {}


def test_what_comes_later_is_not_moved_with_what_was_taken() -> None:
    late = Carried("eth1", 3, "203.0.113.9/24")
    assert takeover.desired(HOST, NIC, replace(AFTER, carried={late: carried()})) == MOVED


def test_an_address_without_a_route_to_its_network_stays_so() -> None:
    network = replace(BEFORE, carried={ADDRESS: carried(flags=NO_PREFIX_ROUTE)}, routes={})
    assert takeover.desired(HOST, NIC, network)[Address("ext0-host", "192.0.2.1/24")] == "alone"


def test_other_nics_are_left_alone() -> None:
    other = Carried("eth2", 4, "203.0.113.1/24")
    network = HostNetwork(
        carried={other: carried()}, routes={DEFAULT: target(device="eth2")}, taken={other: carried()}
    )
    assert takeover.desired(HOST, NIC, replace(network, may_take=True)) == {}


def test_an_internal_switch_has_what_the_config_says() -> None:
    host = HostConfig(
        interface="int0-host",
        addresses=("192.0.2.1/24",),
        routes=(
            RouteConfig(to="default", via="192.0.2.254"),
            RouteConfig(to="default", via="2001:db8::fe"),
            RouteConfig(to="203.0.113.0/24"),
        ),
    )
    assert takeover.desired(host, None, BEFORE) == {
        Address("int0-host", "192.0.2.1/24"): True,
        DEFAULT: RouteTarget("int0-host", "192.0.2.254", None, 4, 0).as_value(),
        Route("::/0", 254, 1024, 0): RouteTarget("int0-host", "2001:db8::fe", None, 4, 0).as_value(),
        Route("203.0.113.0/24", 254, 0, 0): RouteTarget("int0-host", None, None, 4, 253).as_value(),
    }


def test_a_route_of_the_config_wins_over_one_that_moves() -> None:
    host = HostConfig(interface="ext0-host", routes=(RouteConfig(to="default", via="192.0.2.253"),))
    moved = takeover.desired(host, NIC, BEFORE)
    assert moved[DEFAULT] == RouteTarget("ext0-host", "192.0.2.253", None, 4, 0).as_value()


@pytest.mark.parametrize(
    ("host", "network", "joined", "told"),
    [
        pytest.param(HOST, BEFORE, False, [], id="it may be taken"),
        pytest.param(HOST, AFTER, True, [], id="it is taken"),
        pytest.param(None, HostNetwork(), False, [], id="it has no address"),
        pytest.param(None, BEFORE, False, ["add `host:` to the switch, which takes it over"], id="no host"),
        pytest.param(None, BEFORE, True, [], id="an uplink already"),
        pytest.param(HOST, replace(BEFORE, may_take=False), True, [], id="came later"),
        pytest.param(None, AFTER, True, ["keep `host:`, or take the whole switch out"], id="host goes"),
        pytest.param(
            HOST,
            replace(BEFORE, may_take=False),
            False,
            ["has to be confirmed: `offload apply"],
            id="not asked",
        ),
        pytest.param(
            HostConfig(interface="ext0-host", vlan=10), BEFORE, False, ["`host:` is in VLAN 10"], id="VLAN"
        ),
        pytest.param(
            HOST,
            replace(BEFORE, unmovable={"eth1": ("a route of lead", "two of them")}),
            False,
            ["eth1 has a route of lead: put it right", "eth1 has two of them: put it right"],
            id="unmovable",
        ),
    ],
)
def test_what_stands_against_an_uplink(
    host: HostConfig | None, network: HostNetwork, joined: bool, told: list[str]
) -> None:
    refusals = takeover.refusals("eth1", host, network, joined=joined)
    assert len(refusals) == len(told)
    assert all(part in refusal for part, refusal in zip(told, refusals, strict=True))


@pytest.mark.parametrize(
    ("record", "carries", "confirmed"),
    [
        pytest.param(("192.0.2.1/24", "2001:db8::1/64"), BEFORE.carried, True, id="the same"),
        pytest.param(("192.0.2.1/24", "2001:db8::1/64"), {ADDRESS: carried()}, True, id="fewer"),
        pytest.param(("192.0.2.1/24",), BEFORE.carried, False, id="one more"),
        pytest.param((), {ADDRESS: carried(valid=3600)}, True, id="a lease"),
        pytest.param((), {ADDRESS: carried()}, False, id="a lasting one"),
    ],
)
def test_what_counts_as_confirmed(
    record: tuple[str, ...], carries: dict[Carried, tuple[object, ...]], confirmed: bool
) -> None:
    rows = frozenset({Confirmation(MAC, frozenset(record))})
    network = replace(BEFORE, carried=carries, confirmed=rows, may_take=False)
    assert network.permits("eth1") is confirmed
    assert not replace(network, macs={"eth1": "02:aa:00:00:00:03"}).permits("eth1")


def test_changes_of_a_kind_are_in_an_order_that_the_kernel_takes() -> None:
    primary, secondary = Change(ADDRESS, carried(0), None), Change(SECOND, carried(1), None)
    on_link = Change(NETWORK, target(None), target(None, device="ext0-host"))
    gateway = Change(DEFAULT, target(), target(device="ext0-host"))
    removals = sorted([primary, secondary], key=takeover.rank)
    assert removals == [secondary, primary]
    assert sorted([change.inverse() for change in removals], key=takeover.rank) == [
        primary.inverse(),
        secondary.inverse(),
    ]
    assert sorted([gateway, on_link], key=takeover.rank) == [on_link, gateway]
    gone = [replace(change, after=None) for change in (on_link, gateway)]
    assert sorted(gone, key=takeover.rank) == gone[::-1]


def test_a_gateway_of_the_other_family_is_one_too() -> None:
    other = Change(NETWORK, None, target(None, attributes=((takeover.RTA_VIA, "0a00"),)))
    assert takeover.rank(other) == 1


def test_the_addresses_that_a_plan_takes() -> None:
    changes = [Change(resource, value, MOVED[resource]) for resource, value in BEFORE.carried.items()]
    back = [change.inverse() for change in changes]
    assert takeover.taking([*changes, *back]) == {"eth1": ("192.0.2.1/24", "2001:db8::1/64")}


def test_warnings_name_what_will_not_last() -> None:
    host = HostConfig(interface="ext0-host", addresses=("192.0.2.1/24",))
    assert takeover.warnings(host, "eth1", HostNetwork(carried={ADDRESS: carried()})) == []
    leased = HostNetwork(carried={ADDRESS: carried(valid=3600)})
    (warning,) = takeover.warnings(host, "eth1", leased)
    assert "192.0.2.1/24 has a lifetime" in warning
    (warning,) = takeover.warnings(HOST, "eth1", HostNetwork(taken={ADDRESS: carried()}))
    assert "ext0-host has 192.0.2.1/24, and its routes, from eth1 alone" in warning


CONFIG = Config.model_validate(
    {
        "version": 1,
        "nics": {"eth1": {}, "eth2": {}},
        "switches": {
            "ext0": {"type": "external", "uplink": "eth1", "host": {"interface": "ext0-host"}},
            "ext1": {"type": "external", "uplink": "eth2"},
            "int0": {"type": "internal", "host": {"interface": "int0-host"}},
        },
        "ports": {
            "web1": {"switch": "ext0", "device": "web1", "mac": "02:15:5d:00:00:01"},
            "web2": {"switch": "ext1", "device": "web2", "mac": "02:15:5d:00:00:02"},
        },
    }
)


def test_without_a_nic_its_switch_and_ports_are_gone() -> None:
    rest = takeover.without(CONFIG, {"eth1"})
    assert [*rest.switches] == ["ext1", "int0"]
    assert [*rest.ports] == ["web2"]


def test_a_nic_is_shared_where_the_host_is_on_its_switch() -> None:
    assert takeover.shared(CONFIG) == {"eth1"}
    assert len(takeover.all_warnings(CONFIG, BEFORE)) == 1
