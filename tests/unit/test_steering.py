"""Hardware queues: who gets one, and what makes the NIC sort frames into it. Pure, no privileges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offload.config import Config, parse
from offload.errors import UnsupportedError
from offload.hardware import Function, Hardware, Rule
from offload.model import (
    AdminUp,
    Change,
    Feature,
    Filter,
    FunctionAddress,
    FunctionPort,
    Functions,
    Ipv6Disabled,
    IrqAffinity,
    Link,
    Member,
    MemberRow,
    NapiAffinity,
    NicAddress,
    PortRecord,
    PortSlot,
    Resource,
    Spread,
    StationRow,
    SteeringRule,
    Uplink,
    Value,
    Xps,
)
from offload.plan import GRO, GRO_TCP, RUNNING, Desired, Facts, desire, difference, without_fast_path
from offload.steering import spread_without

MACS = [f"02:15:5d:00:00:0{number}" for number in range(1, 6)]
RULES = Hardware(
    how="rules",
    rx_queues=4,
    spread=(0, 1, 2, 3) * 2,
    irqs={queue: (40 + queue,) for queue in range(4)},
    affinity=dict.fromkeys(range(40, 44), "0-3"),
    napis={queue: 60 + queue for queue in range(4)},
    xps=(0, 1, 2, 3),
    local_cpus=(2, 3),
)
FUNCTIONS = Hardware(how="functions", total_functions=7)
MADE = replace(
    FUNCTIONS,
    functions=tuple(
        Function(index, "", 0, f"eth1v{index}", 20 + index, (50 + index,), running=True) for index in (0, 1)
    ),
    affinity={50: "0-3", 51: "0-3"},
)
NONE = Hardware(why="it has no steering rules")


def link(name: str, ifindex: int, **changes: Any) -> Link:
    plain = Link(
        ifindex, name, None, f"02:00:00:00:00:{ifindex:02x}", 1500, True, True, False, None, None, None, 4, 4
    )
    return replace(plain, **changes)


def config(*ports: str, queues: str = "vf_xdp_mode: generic") -> Config:
    named = "\n".join(
        f'  p{number}: {{switch: ext0, device: p{number}, mac: "{MACS[number]}", {port}}}'
        for number, port in enumerate(ports)
    )
    return parse(
        f"version: 1\nnics: {{eth1: {{queues: {{{queues}}}}}}}\n"
        f"switches: {{ext0: {{type: external, uplink: eth1}}}}\nports:\n{named}\n"
    )


def facts(hardware: Hardware, count: int, **changes: Any) -> Facts:
    """A host whose ``count`` ports' devices are there and whose addresses have been heard."""
    ports = {f"p{number}": link(f"p{number}", 10 + number, kind="tun") for number in range(count)}
    return replace(
        Facts(
            links={"eth1": link("eth1", 2), **ports},
            online_cpus=(0, 1, 2, 3),
            digest="d1",
            switch_digest="s1",
            hardware={"eth1": hardware},
            held={
                f"p{number}": (number, PortRecord(f"p{number}", 0, None, 0, 0, 0, 0))
                for number in range(count)
            },
            networks={"ext0": 0},
            stations={
                (0, mac, vid): StationRow(number, 10 + number, "here", 1, 5)
                for number, mac in enumerate(MACS[:count])
                for vid in (0, 10)
            },
        ),
        **changes,
    )


def of(desired: Desired, *kinds: type[Resource]) -> dict[Resource, Value]:
    return {resource: value for resource, value in desired.state.items() if isinstance(resource, kinds)}


def kinds(desired: Desired) -> list[tuple[str, int | None] | None]:
    queues = [decision.queue for decision in desired.ports.values()]
    return [(queue.kind, queue.slot) if queue else None for queue in queues]


def test_a_port_steered_by_a_rule_is_all_of_this() -> None:
    desired = desire(config("queue: hardware"), facts(RULES, 1))
    assert not desired.refusals
    assert of(desired, SteeringRule, Spread, IrqAffinity, NapiAffinity, Xps) == {
        SteeringRule("eth1", 2, MACS[0], 0): 3,
        Spread("eth1", 2): (0, 1, 2) * 2 + (0, 1),
        IrqAffinity("eth1", 2, 43): "2",  # the first CPU of the NIC's own node
        NapiAffinity("eth1", 2, 63): "2",
        Xps("eth1", 2, 3): "2",
    }
    assert desired.state[Feature("eth1", 2, "rx-ntuple-filter")] is True
    assert desired.state[Filter("eth1", 2, MACS[0], 0)] == 0
    row = desired.state[PortSlot(0)]
    assert isinstance(row, tuple)
    assert (PortRecord.of(row).cpu, PortRecord.of(row).flags & RUNNING) == (2, RUNNING)


def test_a_port_on_a_virtual_function_is_all_of_this() -> None:
    desired = desire(config("queue: hardware, vlan: 10"), facts(MADE, 1, vlan_filtering=True))
    assert not desired.refusals
    member = MemberRow(1, 0, "function", pvid=10)
    assert of(desired, Functions, FunctionPort, FunctionAddress, IrqAffinity) == {
        Functions("eth1", 2): 2,
        FunctionPort("eth1v0", 20): ("eth1", 0, 10, "generic", "d1"),
        FunctionPort("eth1v1", 21): ("eth1", None, 0, "generic", "d1"),
        FunctionAddress("eth1", 2, 0): (MACS[0], 10),
        IrqAffinity("eth1v0", 20, 50): "0",
    }
    assert desired.state[Member("eth1v0", 20)] == member.as_value("s1")
    assert desired.state[Member("eth1v1", 21)] == replace(member, pvid=0).as_value("s1")
    assert desired.ports["p0"].queue_device == "eth1v0"


@pytest.mark.parametrize("delivery", ["gro", "auto"])
def test_nothing_is_merged_on_its_way_from_a_virtual_function(delivery: str) -> None:
    asked = config(f"queue: hardware, delivery: {delivery}")
    desired = desire(asked, facts(MADE, 1, merging={"p0": True}))
    port, row = desired.ports["p0"], desired.state[PortSlot(0)]
    assert isinstance(row, tuple)
    assert (port.delivery, port.adapts, PortRecord.of(row).flags & (GRO | GRO_TCP)) == ("frames", False, 0)
    why = "delivery: frames: a virtual function has no way from GRO past the bridge"
    assert port.reason == (why if delivery == "gro" else None)
    steered = desire(asked, facts(RULES, 1, merging={"p0": True})).ports["p0"]
    assert (steered.delivery, steered.reason) == ("gro" if delivery == "gro" else "tcp", None)


def test_functions_are_made_first_and_used_when_they_are_there() -> None:
    desired = desire(config("queue: hardware", queues="vf_xdp_mode: generic, vfs: 3"), facts(FUNCTIONS, 1))
    assert of(desired, Functions, FunctionPort, FunctionAddress) == {Functions("eth1", 2): 3}
    order = [type(change.resource) for change in difference({}, desired.state, {})]
    assert order.index(Functions) < order.index(Uplink)
    up = [
        type(change.resource)
        for change in difference({}, desired.state, {})
        if change.resource in (AdminUp("eth1", 2), Ipv6Disabled("eth1", 2), Functions("eth1", 2))
    ]
    assert up == [Ipv6Disabled, AdminUp, Functions]


def test_nothing_is_sorted_into_a_function_without_a_link() -> None:
    """Its port keeps it, and its frames come by the NIC."""
    down = replace(MADE, functions=tuple(replace(one, running=False, serves=0) for one in MADE.functions[:1]))
    desired = desire(
        config(""), facts(down, 1, held={"p0": (0, PortRecord("p0", 1, 0, 0, RUNNING, 1514, 10))})
    )
    assert kinds(desired) == [("hardware", 0)]
    assert not of(desired, FunctionAddress)
    assert not desired.ports["p0"].queue_standing


def test_an_address_that_is_elsewhere_is_not_steered() -> None:
    away = {(0, MACS[0], 0): StationRow(0, 10, "away", 1, 5)}
    assert not of(desire(config(""), facts(RULES, 1, stations=away)), SteeringRule)
    assert not of(desire(config(""), facts(MADE, 1, stations=away)), FunctionAddress)


@pytest.mark.parametrize(
    ("hardware", "ports", "queues", "expected"),
    [
        pytest.param(
            RULES,
            ["weight: 10", "weight: 90", "", "", "weight: 50"],
            "",
            [("software", None), ("hardware", 1), ("hardware", 3), ("hardware", 2), ("software", None)],
            id="by-weight-then-age",
        ),
        pytest.param(
            MADE, ["", "", ""], "", [("hardware", 0), ("hardware", 1), ("software", None)], id="functions"
        ),
        pytest.param(
            MADE,
            ["queue: hardware, weight: 1", "queue: hardware", "queue: hardware"],
            "",
            [None, ("hardware", 0), ("hardware", 1)],
            id="hardware-or-nothing",
        ),
        pytest.param(
            RULES, ["", "queue: software"], "", [("hardware", 3), ("software", None)], id="as-asked"
        ),
        pytest.param(
            RULES, ["", "", "weight: 1"], "max: 2", [("hardware", 3), ("hardware", 2), None], id="max"
        ),
        pytest.param(
            MADE, ["vlan: {trunk: [10]}", ""], "", [("software", None), ("hardware", 0)], id="trunk"
        ),
        pytest.param(NONE, [""], "", [("software", None)], id="no-hardware"),
    ],
)
def test_who_gets_a_hardware_queue(
    hardware: Hardware, ports: list[str], queues: str, expected: list[object]
) -> None:
    wanted = config(*ports, queues=f"vf_xdp_mode: generic, {queues}" if queues else "vf_xdp_mode: generic")
    desired = desire(wanted, facts(hardware, len(ports), vlan_filtering=True))
    assert kinds(desired) == expected
    waiting = [decision for decision in desired.ports.values() if decision.queue is None]
    assert all(decision.wants_queue and decision.path == "bridge" for decision in waiting)


def steered_to(slot: int, number: int = 0) -> Hardware:
    return replace(RULES, rules=(Rule(0, MACS[number], None, slot),))


OWN = {"eth1": frozenset({(MACS[0], 0)})}
HELD = {
    "p0": (0, PortRecord("p0", 5, 1, 0, RUNNING, 1514, 10)),
    "p1": (1, PortRecord("p1", 6, 0, 0, 0, 0, 11)),
}


def test_a_port_keeps_its_hardware_queue() -> None:
    """However light it is, and whichever queue would be the first."""
    ports = config("weight: 1", "")
    desired = desire(ports, facts(steered_to(1), 2, own_rules=OWN, held=HELD))
    first, second = (decision.queue for decision in desired.ports.values())
    assert first
    assert (first.id, first.cpu, first.slot) == (5, 1, 1)
    assert second
    assert (second.id, second.slot) == (6, 3)
    shown = [(port.rx_queue, port.queue_standing) for port in desired.ports.values()]
    assert shown == [(1, True), (None, False)], "what was read back, and not what is to come"


def test_a_freed_hardware_queue_goes_to_who_waits_and_then_to_software_queues() -> None:
    two = replace(steered_to(1), rx_queues=2)
    ports = ["queue: hardware", "", "queue: hardware, weight: 5"]
    desired = desire(config(*ports), facts(two, 3, own_rules=OWN, held=HELD))
    assert kinds(desired) == [("hardware", 1), ("software", None), None]
    assert desired.ports["p2"].reason == "all 1 hardware queues of eth1 are taken"
    ports[0] = "queue: off"
    freed = desire(config(*ports), facts(two, 3, own_rules=OWN, held=HELD))
    assert kinds(freed) == [None, ("software", None), ("hardware", 1)]
    ports[2] = "queue: off"
    left = desire(config(*ports), facts(two, 3, own_rules=OWN, held=HELD))
    assert kinds(left) == [None, ("hardware", 1), None]


def test_rules_of_others_are_worked_around() -> None:
    theirs = replace(
        RULES, rules=(Rule(7, MACS[0], None, 2), Rule(8, "02:00:00:00:00:99", 10, 3), Rule(9, "", None, -1))
    )
    desired = desire(config("", ""), facts(theirs, 2))
    assert kinds(desired) == [("software", None), ("hardware", 1)]
    refused = desire(config("queue: hardware"), facts(theirs, 1)).refusals
    assert [str(refusal) for refusal in refused] == [
        "ports.p0.queue: hardware: eth1 has none for it: a rule that is not ours steers "
        f"{MACS[0]} to RX queue 2: `ethtool -N eth1 delete 7`; or `queue: auto`"
    ]


@pytest.mark.parametrize(
    ("hardware", "port", "why"),
    [
        pytest.param(NONE, "", "it has no steering rules", id="nic"),
        pytest.param(MADE, "vlan: {trunk: [10]}, ", "this port is a trunk", id="trunk"),
    ],
)
def test_a_hardware_queue_that_cannot_be_had_is_refused(hardware: Hardware, port: str, why: str) -> None:
    desired = desire(config(f"{port}queue: hardware"), facts(hardware, 1, vlan_filtering=True))
    [refusal] = desired.refusals
    assert isinstance(refusal, UnsupportedError)
    assert why in str(refusal)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("eth1: {queues", "eth1: {xdp_mode: generic, queues", id="generic"),
        pytest.param("uplink: eth1", "uplink: eth1, bridge: python", id="python-bridge"),
    ],
)
def test_where_virtual_functions_are_left_alone(old: str, new: str) -> None:
    text = (
        "version: 1\nnics: {eth1: {queues: {vf_xdp_mode: generic}}}\n"
        "switches: {ext0: {type: external, uplink: eth1}}\n"
        f'ports: {{p0: {{switch: ext0, device: p0, mac: "{MACS[0]}"}}}}\n'
    )
    assert kinds(desire(parse(text), facts(MADE, 1))) == [("hardware", 0)]
    desired = desire(parse(text.replace(old, new)), facts(MADE, 1))
    assert kinds(desired) == [("software", None)]
    assert not of(desired, Functions, FunctionPort)


def test_two_ports_with_one_mac_are_told_apart_by_the_rules() -> None:
    same = parse(
        "version: 1\nnics: {eth1: {}}\nswitches: {ext0: {type: external, uplink: eth1}}\nports:\n"
        f'  p0: {{switch: ext0, device: p0, mac: "{MACS[0]}", vlan: 10}}\n'
        f'  p1: {{switch: ext0, device: p1, mac: "{MACS[0]}"}}\n'
    )
    there = {
        (0, MACS[0], 10): StationRow(0, 10, "here", 1, 5),
        (0, MACS[0], 0): StationRow(1, 11, "here", 1, 5),
    }
    desired = desire(same, facts(RULES, 2, vlan_filtering=True, stations=there))
    assert of(desired, SteeringRule) == {
        SteeringRule("eth1", 2, MACS[0], 10): 3,
        SteeringRule("eth1", 2, MACS[0], 0): 2,
    }


def test_a_queue_whose_cpu_went_offline_waits_on_the_bridge() -> None:
    desired = desire(config("cpu: 3"), facts(NONE, 1, online_cpus=(0, 1, 2)))
    assert desired.ports["p0"].path == "bridge"
    assert desired.ports["p0"].reason == "CPU 3, which shall serve its queue, is offline"


def test_a_queue_that_moves_takes_its_interrupt_along() -> None:
    held = {"p0": (0, PortRecord("p0", 1, 2, 0, RUNNING, 1514, 10))}
    desired = desire(config(""), facts(steered_to(3), 1, own_rules=OWN, held=held, moved={"p0": 3}))
    assert desired.state[IrqAffinity("eth1", 2, 43)] == "3"
    assert desired.ports["p0"].queue
    assert desired.ports["p0"].queue.cpu == 3


def test_the_nic_sorts_last_and_is_stopped_first() -> None:
    desired = desire(config(""), facts(MADE, 1))
    put = difference({}, desired.state, {})
    assert isinstance(put[-1].resource, FunctionAddress)
    gone = difference(desired.state, {}, {})
    running = next(index for index, change in enumerate(gone) if isinstance(change.resource, Filter))
    assert [type(change.resource) for change in gone[:running]].count(FunctionAddress) == 1


def test_a_function_changes_its_port_with_nothing_sorted_into_it() -> None:
    """And the addresses that come and go are the NIC's or the function's at any time."""
    address = FunctionAddress("eth1", 2, 0)
    out, back = (NicAddress("eth1", 2, mac) for mac in MACS[:2])
    port = FunctionPort("eth1v0", 20)
    before: dict[Resource, Value] = {address: (MACS[0], 0), port: ("eth1", 0, 0, "generic", "d1"), back: True}
    after: dict[Resource, Value] = {address: (MACS[1], 0), port: ("eth1", 1, 0, "generic", "d1"), out: True}
    assert difference(before, after, {back: None}) == (
        Change(out, None, True),
        Change(address, (MACS[0], 0), None),
        Change(port, before[port], after[port]),
        Change(address, None, (MACS[1], 0)),
        Change(back, True, None),
    )


def test_detaching_leaves_nothing_in_the_nic() -> None:
    desired = desire(config("", ""), facts(MADE, 2))
    left = without_fast_path(desired.state)
    assert not [
        resource
        for resource, value in left.items()
        if isinstance(resource, (Functions, FunctionPort, FunctionAddress, IrqAffinity))
        or (isinstance(resource, Member) and "function" in str(value))
    ]
    detached = desire(config("", ""), facts(MADE, 2, detached=True))
    assert not of(detached, Functions, FunctionPort, FunctionAddress, IrqAffinity)


def test_others_rules_survive_and_ours_go() -> None:
    ours = SteeringRule("eth1", 2, MACS[0], 0)
    theirs = SteeringRule("eth1", 2, MACS[1], 0)
    assert difference({ours: 3, theirs: 2}, {}, {ours: None}) == (Change(ours, 3, None),)


@pytest.mark.parametrize(
    ("queues", "rx_queues", "slots", "expected"),
    [
        pytest.param({3}, 4, 8, (0, 1, 2, 0, 1, 2, 0, 1), id="even"),
        pytest.param({1}, 2, 4, (0, 0, 0, 0), id="one-left"),
        pytest.param({0, 1}, 2, 2, (0, 0), id="never-none"),
        pytest.param(set(), 2, 4, (0, 1, 0, 1), id="all"),
    ],
)
def test_spread_without(queues: set[int], rx_queues: int, slots: int, expected: tuple[int, ...]) -> None:
    assert spread_without(queues, rx_queues, slots) == expected
