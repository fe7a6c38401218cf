"""Deciding and comparing: pure, no privileges. Current state, desired state and difference as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from offload.config import Config, parse
from offload.errors import ConfigError, ForeignError, OffloadError, UnsupportedError
from offload.model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    Fdb,
    Feature,
    Filter,
    Guard,
    Ipv6Disabled,
    Link,
    Master,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    QueueCpu,
    Resource,
    Uplink,
    Value,
)
from offload.plan import (
    FRAGS_POSSIBLE,
    NAPI,
    NO_FRAGS,
    RING_SIZE,
    RUNNING,
    Desired,
    Facts,
    desire,
    difference,
    without_fast_path,
)

MAC = "02:15:5d:00:00:01"
CONFIG = """
version: 1
nics: {eth1: {}}
switches: {ext0: {type: external, uplink: eth1}}
ports: {web1: {switch: ext0, device: web1, mac: "02:15:5d:00:00:01"}}
"""


def link(name: str, ifindex: int, **changes: Any) -> Link:
    plain = Link(
        ifindex, name, None, f"02:00:00:00:00:{ifindex:02x}", 1500, True, True, False, None, None, None, 4, 4
    )
    return replace(plain, **changes)


ETH1 = link("eth1", 2)
WEB1 = link("web1", 3, kind="veth", peer_ifindex=2)
TAP1 = link("web1", 3, kind="tun")
FACTS = Facts(
    links={"eth1": ETH1, "web1": WEB1},
    online_cpus=(0, 1),
    digest="d1",
    guard_digest="g1",
    peers={"web1": None},
    features={"eth1": {"rx-vlan-hw-parse": True}},
)


def config(**changes: str) -> Config:
    text = CONFIG
    for old, new in changes.items():
        text = text.replace({"port": "switch: ext0,", "queues": "{eth1: {}}"}[old], new)
    return parse(text)


def facts(**changes: Any) -> Facts:
    return replace(FACTS, **changes)


def with_link(changed: Link) -> Facts:
    return facts(
        links={**FACTS.links, changed.name: changed}, bridges=frozenset({"ext0"} & {changed.master_name})
    )


def record(desired: Desired, port_id: int = 0) -> PortRecord:
    value = desired.state[PortSlot(port_id)]
    assert isinstance(value, tuple)
    return PortRecord.of(value)


def filters(desired: Desired) -> dict[Resource, Value]:
    return {key: value for key, value in desired.state.items() if isinstance(key, Filter)}


def test_a_port_with_a_queue_is_all_of_this() -> None:
    desired = desire(config(), FACTS)
    assert desired.refusals == ()
    assert desired.state == {
        Bridge("ext0"): True,
        Ipv6Disabled("eth1", 2): True,
        Master("eth1", 2): "ext0",
        Promiscuous("eth1", 2): True,
        AdminUp("eth1", 2): True,
        Uplink("eth1", 2): ("native", "d1"),
        Feature("eth1", 2, "rx-vlan-hw-parse"): False,
        QueueCpu("eth1", 2, 0): RING_SIZE,
        Ipv6Disabled("web1", 3): True,
        Guard("web1", 3): (0, 0, "g1"),
        Master("web1", 3): "ext0",
        BridgePort("web1", 3): (False, False),
        AdminUp("web1", 3): True,
        Fdb("web1", 3, MAC): True,
        PeerFeature("web1", 3, NAPI): True,
        PortSlot(0): ("web1", 1, 0, 0, RUNNING, 1514, 3),
        Filter("eth1", 2, MAC, 0): 0,
    }
    assert (desired.ports["web1"].state, desired.ports["web1"].path) == ("active", "queue")
    assert desired.ports["web1"].reason is None


@pytest.mark.parametrize(
    ("given", "facts_now", "state", "path", "reason", "has_filter"),
    [
        pytest.param("queue: off,", FACTS, "active", "bridge", "queue: off", False, id="queue-off"),
        pytest.param("weight: 0,", FACTS, "active", "bridge", "weight: 0", False, id="weight-0"),
        pytest.param(
            "",
            facts(links={"eth1": ETH1}),
            "waiting",
            "bridge",
            "there is no device web1 yet",
            True,
            id="away",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, master=9, master_name="ext0", up=False)),
            "paused",
            "bridge",
            "web1 is down",
            True,
            id="down",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, master=9, master_name="ext0", running=False)),
            "paused",
            "bridge",
            "the other end of web1 is down",
            True,
            id="no-carrier",
        ),
        pytest.param(
            "",
            facts(peers={"web1": "run ethtool -K eth0 rx-gro on"}),
            "active",
            "bridge",
            "run ethtool -K eth0 rx-gro on",
            False,
            id="veth-peer-unreachable",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, kind="macvlan")),
            "active",
            "bridge",
            "web1 is no tap and no veth, so XDP cannot hand frames to it",
            False,
            id="no-redirect-target",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, master=7, master_name="br0")),
            "failed",
            "bridge",
            "web1 is in br0, which is not ours: `ip link set web1 nomaster`",
            True,
            id="foreign-bridge",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, mac="")),
            "failed",
            "bridge",
            "web1 carries no Ethernet frames: a tap is needed, not a tun",
            True,
            id="tun",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, mac=MAC)),
            "failed",
            "bridge",
            f"web1 itself has the VM's MAC {MAC}: give the host's end another one",
            True,
            id="device-has-the-vms-mac",
        ),
        pytest.param(
            "", facts(failed={"web1": "it broke"}), "failed", "bridge", "it broke", False, id="failed-before"
        ),
        pytest.param(
            "",
            facts(detached=True),
            "active",
            "bridge",
            "the fast path is detached: `offload apply FILE` puts it back",
            False,
            id="detached",
        ),
    ],
)
def test_a_port_without_a_queue_says_why(
    given: str, facts_now: Facts, state: str, path: str, reason: str, has_filter: bool
) -> None:
    desired = desire(config(port=f"switch: ext0, {given}"), facts_now)
    decision = desired.ports["web1"]
    assert (decision.state, decision.path, decision.reason) == (state, path, reason)
    assert not record(desired).flags & RUNNING
    assert bool(filters(desired)) == has_filter


def test_a_recycled_tap_name_waits_for_the_right_guest() -> None:
    text = CONFIG.replace("device: web1", "device: vnet3")
    foreign = link("vnet3", 5, kind="tun", mac="fe:54:00:00:00:09")
    fitting = link("vnet3", 5, kind="tun", mac="fe:15:5d:00:00:01")
    waits = desire(parse(text), facts(links={"eth1": ETH1, "vnet3": foreign})).ports["web1"]
    taken = desire(parse(text), facts(links={"eth1": ETH1, "vnet3": fitting})).ports["web1"]
    assert waits.state == "waiting"
    assert "<target dev='web1'/>" in (waits.reason or "")
    assert (taken.state, taken.path) == ("active", "queue")


@pytest.mark.parametrize(
    ("nic", "device", "flags"),
    [
        pytest.param(ETH1, WEB1, RUNNING, id="veth"),
        pytest.param(ETH1, TAP1, RUNNING | NO_FRAGS | FRAGS_POSSIBLE, id="tap-takes-one-buffer"),
        pytest.param(replace(ETH1, mtu=9000), WEB1, RUNNING | FRAGS_POSSIBLE, id="jumbo-nic"),
    ],
)
def test_flags(nic: Link, device: Link, flags: int) -> None:
    assert record(desire(config(), facts(links={"eth1": nic, "web1": device}))).flags == flags


def test_a_kernel_that_cannot_redirect_frags() -> None:
    """Before Linux 6.3. Jumbo frames take the bridge, whatever the device could."""
    jumbo = facts(links={"eth1": replace(ETH1, mtu=9000), "web1": WEB1}, redirects_frags=False)
    assert record(desire(config(), jumbo)).flags == RUNNING | NO_FRAGS | FRAGS_POSSIBLE


def test_what_a_port_holds_it_keeps() -> None:
    held = {
        "web1": (7, PortRecord("web1", 5, 1, 0, RUNNING, 1514, 3)),
        "gone": (0, PortRecord("gone", 1, 0, 0, 0, 0, 0)),
    }
    desired = desire(config(), facts(held=held))
    assert record(desired, 7) == PortRecord("web1", 5, 1, 0, RUNNING, 1514, 3)
    assert PortSlot(0) not in desired.state


def test_a_new_port_gets_no_id_that_is_still_in_the_table() -> None:
    desired = desire(config(), facts(held={"gone": (0, PortRecord("gone", 1, 0, 0, 0, 0, 0))}))
    assert record(desired, 1).name == "web1"


def test_taking_a_device_sets_it_up_once() -> None:
    """Whoever sets a device down later means it."""
    new = desire(config(), with_link(replace(ETH1, up=False)))
    ours = desire(config(), with_link(replace(ETH1, up=False, master=9, master_name="ext0")))
    assert new.state[AdminUp("eth1", 2)] is True
    assert ours.state[AdminUp("eth1", 2)] is False


def test_a_veth_uplink_shows_its_tags() -> None:
    veth = replace(ETH1, kind="veth", peer_ifindex=4)
    state = desire(
        config(), facts(links={"eth1": veth, "web1": WEB1}, peers={"eth1": None, "web1": None})
    ).state
    assert state[PeerFeature("eth1", 2, "tx-vlan-hw-insert")] is False
    assert Feature("eth1", 2, "rx-vlan-hw-parse") not in state


@pytest.mark.parametrize(
    ("facts_now", "kind", "words"),
    [
        pytest.param(facts(links={"web1": WEB1}), ConfigError, "nics.eth1", id="no-such-nic"),
        pytest.param(
            with_link(replace(ETH1, master=7, master_name="br0")),
            ForeignError,
            "ip link set eth1 nomaster",
            id="bridge",
        ),
        pytest.param(
            with_link(replace(ETH1, xdp_prog_id=42)), ForeignError, "program (id 42)", id="foreign-xdp"
        ),
        pytest.param(
            facts(managers={"eth1": ("eth1 is managed by NetworkManager",)}),
            ForeignError,
            "NetworkManager",
            id="nm",
        ),
        pytest.param(
            facts(addresses={"eth1": (("eth1.10", "192.0.2.1/24"),)}),
            ForeignError,
            "ip addr del 192.0.2.1/24 dev eth1.10",
            id="address",
        ),
        pytest.param(
            facts(features={"eth1": {"rx-vlan-hw-parse": False}}),
            UnsupportedError,
            "fixed on",
            id="tags-hidden",
        ),
        pytest.param(
            with_link(link("ext0", 9, kind="bridge")),
            ForeignError,
            "no bridge of ours",
            id="bridge-name-taken",
        ),
    ],
)
def test_refusals_name_the_device_and_the_remedy(
    facts_now: Facts, kind: type[OffloadError], words: str
) -> None:
    desired = desire(config(), facts_now)
    assert [type(refusal) for refusal in desired.refusals] == [kind]
    assert words in str(desired.refusals[0])
    assert not [key for key in desired.state if isinstance(key, Uplink | Master) and key.device == "eth1"]


def test_our_own_program_is_no_obstacle() -> None:
    ours = replace(ETH1, xdp_prog_id=42, xdp_mode="native", master=9, master_name="ext0")
    now = facts(links={"eth1": ours, "web1": WEB1}, programs={2: 42}, bridges=frozenset({"ext0"}))
    assert desire(config(), now).refusals == ()


@pytest.mark.parametrize("vlan_filtering", [True, False])
def test_vlans_are_refused(vlan_filtering: bool) -> None:
    desired = desire(config(port="switch: ext0, vlan: 10,"), facts(vlan_filtering=vlan_filtering))
    assert [type(refusal) for refusal in desired.refusals] == [UnsupportedError]
    assert "ports.web1.vlan" in str(desired.refusals[0])


def test_a_cpu_that_is_not_online_is_named() -> None:
    desired = desire(config(port="switch: ext0, cpu: 5,", queues="{eth1: {queues: {cpus: [0, 9]}}}"), FACTS)
    assert str(desired.refusals[0]).splitlines() == [
        "config: nics.eth1.queues.cpus[1]: 9: a CPU that is online: 0, 1",
        "config: ports.web1.cpu: 5: a CPU that is online: 0, 1",
    ]


FULL: dict[Resource, Value] = {
    Bridge("ext0"): True,
    Master("web1", 3): "ext0",
    BridgePort("web1", 3): (False, False),
    Fdb("web1", 3, MAC): True,
    Guard("web1", 3): (0, 0, "g1"),
    AdminUp("web1", 3): True,
    Uplink("eth1", 2): ("native", "d1"),
    QueueCpu("eth1", 2, 0): 4096,
    PortSlot(0): PortRecord("web1", 1, 0, 0, RUNNING, 1514, 3).as_value(),
    Filter("eth1", 2, MAC, 0): 0,
}


@pytest.mark.parametrize(
    ("observed", "desired", "originals", "expected"),
    [
        pytest.param(FULL, FULL, {}, [], id="nothing"),
        pytest.param({}, {Bridge("b"): True}, {}, [Change(Bridge("b"), None, True)], id="set"),
        pytest.param({Bridge("b"): True}, {}, {}, [Change(Bridge("b"), True, None)], id="ours-goes"),
        pytest.param({AdminUp("x", 1): True}, {}, {}, [], id="setting-never-touched-stays"),
        pytest.param(
            {AdminUp("x", 1): True},
            {},
            {AdminUp("x", 1): False},
            [Change(AdminUp("x", 1), True, False)],
            id="setting-given-back",
        ),
        pytest.param({AdminUp("x", 1): False}, {}, {AdminUp("x", 1): False}, [], id="setting-is-as-it-was"),
        pytest.param({BridgePort("x", 1): (False, False)}, {}, {}, [], id="bridge-port-goes-with-its-bridge"),
        pytest.param(
            {Filter("eth1", 2, MAC, 0): 0},
            {Filter("eth1", 2, MAC, 0): 1},
            {},
            [Change(Filter("eth1", 2, MAC, 0), 0, 1)],
            id="filter-moves-in-one-step",
        ),
    ],
)
def test_difference(
    observed: Mapping[Resource, Value],
    desired: Mapping[Resource, Value],
    originals: Mapping[Resource, Value],
    expected: list[Change],
) -> None:
    assert list(difference(observed, desired, originals)) == expected


def kinds(changes: tuple[Change, ...]) -> list[str]:
    return [type(change.resource).__name__ for change in changes]


def test_a_guard_stands_before_the_bridge_and_filters_come_last() -> None:
    assert kinds(difference({}, FULL, {})) == [
        "Bridge",
        "Guard",
        "Master",
        "BridgePort",
        "Fdb",
        "AdminUp",
        "Uplink",
        "QueueCpu",
        "PortSlot",
        "Filter",
    ]


def test_a_port_stops_first_and_its_guard_goes_after_the_bridge() -> None:
    originals: dict[Resource, Value] = {Master("web1", 3): None, AdminUp("web1", 3): False}
    changes = difference(FULL, {}, originals)
    assert kinds(changes) == [
        "PortSlot",
        "Filter",
        "PortSlot",
        "QueueCpu",
        "Uplink",
        "AdminUp",
        "Fdb",
        "Master",
        "Guard",
        "Bridge",
    ]
    stopped, gone = changes[0], changes[2]
    assert stopped.after == PortRecord("web1", 1, 0, 0, 0, 1514, 3).as_value()
    assert (gone.before, gone.after) == (stopped.after, None)


def test_a_queue_is_taken_away_in_this_order() -> None:
    """Stopped, so that waiting frames are counted as this port's; then unfiltered; then its CPU is free."""
    slot, free = PortSlot(0), PortRecord("web1", 0, None, 0, 0, 1514, 3).as_value()
    kept = {key: value for key, value in FULL.items() if not isinstance(key, Filter | QueueCpu)}
    changes = difference(FULL, {**kept, slot: free}, {})
    stopped = PortRecord("web1", 1, 0, 0, 0, 1514, 3).as_value()
    assert changes == (
        Change(slot, FULL[slot], stopped),
        Change(Filter("eth1", 2, MAC, 0), 0, None),
        Change(slot, stopped, free),
        Change(QueueCpu("eth1", 2, 0), 4096, None),
    )


def test_a_queue_moves_before_its_old_cpu_is_released() -> None:
    moved = PortRecord("web1", 1, 1, 0, RUNNING, 1514, 3).as_value()
    kept = {key: value for key, value in FULL.items() if not isinstance(key, QueueCpu)}
    changes = difference(FULL, {**kept, PortSlot(0): moved, QueueCpu("eth1", 2, 1): 4096}, {})
    assert changes == (
        Change(QueueCpu("eth1", 2, 1), None, 4096),
        Change(PortSlot(0), FULL[PortSlot(0)], moved),
        Change(QueueCpu("eth1", 2, 0), 4096, None),
    )


def test_what_goes_precedes_what_comes() -> None:
    before: dict[Resource, Value] = {Filter("eth1", 2, MAC, 0): 0}
    after: dict[Resource, Value] = {Bridge("ext0"): True}
    assert kinds(difference(before, after, {})) == ["Filter", "Bridge"]


def test_detach_leaves_the_bridge_forwarding() -> None:
    left = without_fast_path(FULL)
    gone = {type(resource).__name__ for resource in FULL if resource not in left}
    assert gone == {"Uplink", "QueueCpu", "Filter"}
    value = left[PortSlot(0)]
    assert isinstance(value, tuple)
    assert not PortRecord.of(value).flags & RUNNING
