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
    BridgeVlans,
    Change,
    Conduit,
    Fdb,
    Feature,
    Filter,
    HostPair,
    Ipv6Disabled,
    Link,
    Master,
    Member,
    MemberRow,
    Network,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    PythonBridge,
    QueueCpu,
    Resource,
    Roster,
    Station,
    StationRow,
    Trunk,
    Uplink,
    Value,
)
from offload.plan import (
    BYPASS,
    FRAGS_POSSIBLE,
    GRO,
    GRO_TCP,
    MERGING,
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
    switch_digest="s1",
    held={"web1": (0, PortRecord("web1", 1, 0, 0, RUNNING | BYPASS, 1514, 3))},
    networks={"ext0": 0},
    stations={(0, MAC, 0): StationRow(0, 3, "here", 1, 5)},
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
        links={**FACTS.links, changed.name: changed},
        own=frozenset({"ext0"} & {changed.master_name}),
        members={changed.ifindex: (MemberRow(0, 0, "port"), "")} if changed.master_name == "ext0" else {},
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
        Bridge("ext0"): "plain",
        Network(0): ("ext0", 1, None, 0, False),
        Ipv6Disabled("eth1", 2): True,
        Member("eth1", 2): MemberRow(1, 0, "uplink", bypass=True).as_value("s1"),
        Master("eth1", 2): "ext0",
        BridgePort("eth1", 2): (True, True, 0),
        Promiscuous("eth1", 2): True,
        AdminUp("eth1", 2): True,
        PortSlot(1): ("uplink:eth1", 0, None, 0, BYPASS, 1514, 2),
        Uplink("eth1", 2): ("native", "d1"),
        Feature("eth1", 2, "rx-vlan-hw-parse"): False,
        Feature("eth1", 2, MERGING): True,
        QueueCpu("eth1", 2, 0): RING_SIZE,
        Ipv6Disabled("web1", 3): True,
        Station(0, MAC, 0): (0, 3, "here"),
        Member("web1", 3): MemberRow(0, 0, "port", bypass=True).as_value("s1"),
        Master("web1", 3): "ext0",
        BridgePort("web1", 3): (True, False, 0),
        AdminUp("web1", 3): True,
        Fdb("web1", 3, MAC, 0): True,
        PeerFeature("web1", 3, NAPI): True,
        PortSlot(0): ("web1", 1, 0, 0, RUNNING | BYPASS, 1514, 3),
        Filter("eth1", 2, MAC, 0): 0,
    }
    assert (desired.ports["web1"].state, desired.ports["web1"].path) == ("active", "queue")
    assert desired.ports["web1"].reason is None


@pytest.mark.parametrize(
    ("station", "reason"),
    [
        pytest.param(None, f"nothing has been heard from {MAC} yet", id="never-heard"),
        pytest.param(StationRow(0, 3, "expected"), f"nothing has been heard from {MAC} yet", id="expected"),
        pytest.param(
            StationRow(0, 99, "here", 1, 5), f"nothing has been heard from {MAC} yet", id="device-made-anew"
        ),
        pytest.param(
            StationRow(0, 3, "away", 2, 9),
            f"{MAC} was last heard from eth1: the VM has moved, or another has its address",
            id="moved-away",
        ),
    ],
)
def test_an_address_has_no_filter_before_it_is_heard_here(station: StationRow | None, reason: str) -> None:
    """A VM that is still elsewhere, as before its migration ends, must not be sent to yet."""
    desired = desire(config(), facts(stations={(0, MAC, 0): station} if station else {}))
    state = "away" if station and station.state == "away" else "expected"
    assert not filters(desired)
    assert desired.state[Station(0, MAC, 0)] == (0, 3, state)
    assert Fdb("web1", 3, MAC, 0) not in desired.state
    assert desired.state[BridgePort("web1", 3)] == (True, state == "expected", 0)
    assert (desired.ports["web1"].path, desired.ports["web1"].reason) == ("bridge", reason)


def test_what_was_heard_last_in_any_vlan_counts_for_all() -> None:
    rows = {
        (0, MAC, 10): StationRow(0, 3, "here", 1, 5),
        (0, MAC, 20): StationRow(0, 3, "away", 2, 9),
        (0, MAC, 30): StationRow(0, 3, "expected"),
    }
    trunk = config(port="switch: ext0, vlan: {trunk: [10, 20, 30]},")
    states = stations(desire(trunk, facts(stations=rows, vlan_filtering=True)))
    assert states == {10: "away", 20: "away", 30: "away"}


def stations(desired: Desired) -> dict[int, object]:
    return {
        key.vid: value[2]
        for key, value in desired.state.items()
        if isinstance(key, Station) and isinstance(value, tuple)
    }


@pytest.mark.parametrize(
    ("vlan", "member", "at_bridge", "vids"),
    [
        pytest.param("", {"pvid": 0}, (4094, ()), (0,), id="untagged"),
        pytest.param("vlan: 10,", {"pvid": 10}, (0, (10,)), (10,), id="access"),
        pytest.param(
            "vlan: {trunk: [10, '20-21']},",
            {"pvid": None, "trunk": True},
            (0, (10, 20, 21)),
            (10, 20, 21),
            id="trunk",
        ),
        pytest.param(
            "vlan: {trunk: [10], native: 5},",
            {"pvid": 5, "trunk": True},
            (0, (5, 10)),
            (5, 10),
            id="trunk-with-native",
        ),
    ],
)
def test_vlan_modes_on_a_bridge_that_filters(
    vlan: str, member: dict[str, Any], at_bridge: tuple[int, tuple[int, ...]], vids: tuple[int, ...]
) -> None:
    """Inside, every VID but that of untagged frames has its tag: the programs push and pop, no bridge."""
    heard = {(0, MAC, vid): StationRow(0, 3, "here", 1, 5) for vid in vids}
    state = desire(config(port=f"switch: ext0, {vlan}"), facts(vlan_filtering=True, stations=heard)).state
    assert state[Bridge("ext0")] == "vlan"
    assert state[Network(0)] == ("ext0", 1, None, 4094, False)
    assert state[Member("web1", 3)] == MemberRow(0, 0, "port", bypass=True, **member).as_value("s1")
    assert state[BridgeVlans("web1", 3)] == at_bridge
    assert state[BridgeVlans("eth1", 2)] == (4094, tuple(vid for vid in vids if vid))
    assert state.get(Trunk(0)) == (tuple(vid for vid in vids if vid != 5) if member.get("trunk") else None)
    assert {key.vid for key in state if isinstance(key, Filter)} == set(vids)
    assert {key.vid for key in state if isinstance(key, Fdb)} == {vid or 4094 for vid in vids}


def test_untagged_frames_never_share_a_vid_with_a_vlan_in_use() -> None:
    state = desire(
        config(port="switch: ext0, vlan: {trunk: ['4000-4094']},"), facts(vlan_filtering=True)
    ).state
    assert state[BridgeVlans("eth1", 2)] == (3999, tuple(range(4000, 4095)))


def test_a_switch_whose_ports_use_every_vid_is_refused() -> None:
    desired = desire(config(port="switch: ext0, vlan: {trunk: ['1-4094']},"), facts(vlan_filtering=True))
    assert "use every VID" in str(desired.refusals[0])


PYTHON = CONFIG.replace("uplink: eth1}", "uplink: eth1, bridge: python}")


def test_a_python_bridge_is_a_conduit_a_roster_and_a_process() -> None:
    text = PYTHON.replace("device: web1,", "device: web1, vlan: 10,")
    heard = {(0, MAC, 10): StationRow(0, 3, "here", 1, 5)}
    desired = desire(parse(text), facts(stations=heard))
    state = desired.state
    assert desired.refusals == ()
    assert (state[Conduit("ext0", "ext0-py")], state[PythonBridge("ext0")]) == (True, True)
    assert state[Network(0)] == ("ext0", 1, "ext0", 0, False)
    devices = (
        (1, "eth1", "uplink", (0, 10), True, (), False),
        (0, "web1", "port", (10,), False, (MAC,), False),
    )
    assert state[Roster("ext0")] == (devices, "[]")
    assert not [key for key in state if isinstance(key, Bridge | Master | BridgePort | BridgeVlans | Fdb)]


INTERNAL = """
version: 1
switches: {int0: {type: internal, host: {interface: int0-host, addresses: [192.0.2.1/24]}}}
ports: {web1: {switch: int0, device: web1, mac: "02:15:5d:00:00:01"}}
"""
HOST, HOST_AT_SWITCH = link("int0-host", 7, kind="veth"), link("int0-host-sw", 8, kind="veth")


def test_the_host_is_a_port_of_its_own() -> None:
    ours = {"int0-host", "int0-host-sw"}
    links = {"web1": WEB1, "int0-host": HOST, "int0-host-sw": HOST_AT_SWITCH}
    desired = desire(parse(INTERNAL), facts(links=links, own=frozenset(ours), networks={"int0": 0}))
    state = desired.state
    assert desired.refusals == ()
    assert state[HostPair("int0-host", "int0-host-sw")] == (HOST.mac, 1500)
    assert state[Master("int0-host-sw", 8)] == "int0"
    assert state[Station(0, HOST.mac, 0)] == (1, 8, "here")
    assert state[PortSlot(1)] == ("host:int0", 0, None, 0, BYPASS, 1514, 8)
    assert MemberRow.of(state[Member("int0-host-sw", 8)]).role == "host"  # type: ignore[arg-type]
    assert not filters(desired)
    assert desired.ports["web1"].reason is None


def test_a_queue_that_no_nic_can_fill_is_named_only_where_it_was_asked_for() -> None:
    asked = INTERNAL.replace("device: web1,", "device: web1, queue: software,")
    now = facts(links={"web1": WEB1}, networks={"int0": 0})
    assert desire(parse(INTERNAL), now).ports["web1"].reason is None
    assert desire(parse(asked), now).ports["web1"].reason == "its switch has no NIC that could sort frames"


def test_the_hosts_interface_is_planned_before_it_is_there() -> None:
    """So that a dry run tells all of it; the number 0 is filled in when it has been made."""
    state = desire(parse(INTERNAL), facts(links={"web1": WEB1}, networks={"int0": 0})).state
    assert state[HostPair("int0-host", "int0-host-sw")] == ("auto", 1500)
    assert Member("int0-host-sw", 0) in state
    assert Master("int0-host-sw", 0) in state


@pytest.mark.parametrize("taken", ["int0", "int0-host", "int0-host-sw"])
def test_a_name_that_somebody_else_has(taken: str) -> None:
    desired = desire(parse(INTERNAL), facts(links={"web1": WEB1, taken: link(taken, 9)}))
    assert f"there is a device {taken} already, and it is not ours" in str(desired.refusals[0])
    assert desired.ports["web1"].state == "failed"


def test_guards_and_learning_ports() -> None:
    given = "switch: ext0, allow: {mac_spoofing: true, link_local_protocols: true},"
    state = desire(config(port=given), FACTS).state
    row = MemberRow.of(state[Member("web1", 3)])  # type: ignore[arg-type]
    assert row.allow == {"mac_spoofing", "link_local_protocols"}
    assert state[Network(0)] == ("ext0", 1, None, 0, True)  # unknown unicast asks the bridge
    assert state[BridgePort("web1", 3)] == (True, True, 0xFFFD)
    assert state[BridgePort("eth1", 2)] == (True, True, 0xFFFD)


@pytest.mark.parametrize(
    ("given", "detached"), [("queue: off,", False), ("", True)], ids=["queue-off", "detached"]
)
def test_nothing_passes_by_the_bridge(given: str, detached: bool) -> None:
    """What the bridge's own rules say then holds for every frame of the port."""
    desired = desire(config(port=f"switch: ext0, {given}"), facts(detached=detached))
    assert not MemberRow.of(desired.state[Member("web1", 3)]).bypass  # type: ignore[arg-type]
    assert not record(desired).flags & BYPASS


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
            False,
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
            False,
            id="foreign-bridge",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, mac="")),
            "failed",
            "bridge",
            "web1 carries no Ethernet frames: a tap is needed, not a tun",
            False,
            id="tun",
        ),
        pytest.param(
            "",
            with_link(replace(WEB1, mac=MAC)),
            "failed",
            "bridge",
            f"web1 itself has the VM's MAC {MAC}: give the host's end another one",
            False,
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
    assert taken.state == "active"


@pytest.mark.parametrize(
    ("nic", "device", "flags"),
    [
        pytest.param(ETH1, WEB1, RUNNING | BYPASS, id="veth"),
        pytest.param(ETH1, TAP1, RUNNING | BYPASS | NO_FRAGS | FRAGS_POSSIBLE, id="tap-takes-one-buffer"),
        pytest.param(replace(ETH1, mtu=9000), WEB1, RUNNING | BYPASS | FRAGS_POSSIBLE, id="jumbo-nic"),
    ],
)
def test_flags(nic: Link, device: Link, flags: int) -> None:
    assert record(desire(config(), facts(links={"eth1": nic, "web1": device}))).flags == flags


def test_a_kernel_that_cannot_redirect_frags() -> None:
    """Before Linux 6.3. Jumbo frames take the bridge, whatever the device could."""
    jumbo = facts(links={"eth1": replace(ETH1, mtu=9000), "web1": WEB1}, redirects_frags=False)
    assert record(desire(config(), jumbo)).flags == RUNNING | BYPASS | NO_FRAGS | FRAGS_POSSIBLE


def test_what_a_port_holds_it_keeps() -> None:
    held = {
        "web1": (7, PortRecord("web1", 5, 1, 0, RUNNING, 1514, 3)),
        "gone": (0, PortRecord("gone", 1, 0, 0, 0, 0, 0)),
    }
    desired = desire(config(), facts(held=held))
    assert record(desired, 7) == PortRecord("web1", 5, 1, 0, RUNNING | BYPASS, 1514, 3)
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
            "it is not ours",
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
    now = facts(links={"eth1": ours, "web1": WEB1}, programs={2: 42}, own=frozenset({"ext0"}))
    assert desire(config(), now).refusals == ()


def test_vlans_on_a_bridge_that_filters_none_are_refused() -> None:
    desired = desire(config(port="switch: ext0, vlan: 10,"), FACTS)
    assert [type(refusal) for refusal in desired.refusals] == [UnsupportedError]
    assert str(desired.refusals[0]).startswith("ports.web1.vlan: 10: this kernel's bridge has no VLAN")
    assert "VLAN 10 would leak: use `bridge: python`" in str(desired.refusals[0])


def test_a_cpu_that_is_not_online_is_named() -> None:
    desired = desire(config(port="switch: ext0, cpu: 9,", queues="{eth1: {queues: {cpus: [0, 9]}}}"), FACTS)
    assert str(desired.refusals[0]).splitlines() == [
        "config: nics.eth1.queues.cpus[1]: 9: a CPU that is online: 0, 1",
        "config: ports.web1.cpu: 9: a CPU that is online: 0, 1",
    ]


FULL: dict[Resource, Value] = {
    Bridge("ext0"): "plain",
    Master("web1", 3): "ext0",
    BridgePort("web1", 3): (True, False, 0),
    Fdb("web1", 3, MAC, 0): True,
    Station(0, MAC, 0): (0, 3, "here"),
    Member("web1", 3): MemberRow(0, 0, "port", bypass=True).as_value("s1"),
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
        pytest.param({}, {Bridge("b"): "plain"}, {}, [Change(Bridge("b"), None, "plain")], id="set"),
        pytest.param({Bridge("b"): "plain"}, {}, {}, [Change(Bridge("b"), "plain", None)], id="ours-goes"),
        pytest.param({AdminUp("x", 1): True}, {}, {}, [], id="setting-never-touched-stays"),
        pytest.param(
            {AdminUp("x", 1): True},
            {},
            {AdminUp("x", 1): False},
            [Change(AdminUp("x", 1), True, False)],
            id="setting-given-back",
        ),
        pytest.param({AdminUp("x", 1): False}, {}, {AdminUp("x", 1): False}, [], id="setting-is-as-it-was"),
        pytest.param(
            {BridgePort("x", 1): (True, False, 0)}, {}, {}, [], id="bridge-port-goes-with-its-bridge"
        ),
        pytest.param(
            {Filter("eth1", 2, MAC, 0): 0},
            {Filter("eth1", 2, MAC, 0): 1},
            {},
            [Change(Filter("eth1", 2, MAC, 0), 0, 1)],
            id="filter-moves-in-one-step",
        ),
        pytest.param(
            {Master("x", 1): "b", BridgeVlans("x", 1): (4094, (10,))},
            {Master("x", 1): "c", BridgeVlans("x", 1): (4094, (10,))},
            {},
            [
                Change(Master("x", 1), "b", None),
                Change(Master("x", 1), None, "c"),
                Change(BridgeVlans("x", 1), None, (4094, (10,))),
            ],
            id="vlans-of-the-old-bridge-are-left-behind",
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


def test_programs_stand_before_the_bridge_and_filters_come_last() -> None:
    assert kinds(difference({}, FULL, {})) == [
        "Bridge",
        "Station",
        "Member",
        "Master",
        "Fdb",
        "BridgePort",
        "AdminUp",
        "Uplink",
        "QueueCpu",
        "PortSlot",
        "Filter",
    ]


def test_frames_reach_a_vm_that_is_heard_after_every_step_of_it() -> None:
    """By flooding, until the bridge knows where it is: the daemon may stand still between two steps."""
    expected, here = (desire(config(), facts(stations=found)).state for found in ({}, FACTS.stations))
    state = dict(expected)
    steps = difference(expected, here, {})
    assert {"BridgePort", "Fdb", "Filter"} <= set(kinds(steps))
    for step in steps:
        if step.after is None:
            del state[step.resource]
        else:
            state[step.resource] = step.after
        assert state[BridgePort("web1", 3)] == (True, True, 0) or Fdb("web1", 3, MAC, 0) in state


def test_a_port_stops_first_and_its_programs_go_after_the_bridge() -> None:
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
        "Member",
        "Station",
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
    after: dict[Resource, Value] = {Bridge("ext0"): "plain"}
    assert kinds(difference(before, after, {})) == ["Filter", "Bridge"]


def test_detach_leaves_the_bridge_forwarding_all_of_it() -> None:
    left = without_fast_path(FULL)
    gone = {type(resource).__name__ for resource in FULL if resource not in left}
    assert gone == {"Uplink", "QueueCpu", "Filter"}
    value = left[PortSlot(0)]
    assert isinstance(value, tuple)
    assert not PortRecord.of(value).flags & RUNNING
    assert left[Member("web1", 3)] == MemberRow(0, 0, "port").as_value("s1")


# Delivery


def held_with(flags: int) -> dict[str, tuple[int, PortRecord]]:
    return {"web1": (0, PortRecord("web1", 1, 0, 0, RUNNING | BYPASS | flags, 1514, 3))}


@pytest.mark.parametrize(
    ("delivery", "changes", "flags", "shown", "adapts"),
    [
        pytest.param("auto", {}, 0, "frames", True, id="auto-begins-with-frames"),
        pytest.param("auto", {"merging": {"web1": True}}, GRO_TCP, "tcp", True, id="auto-tcp-from-now-on"),
        pytest.param("auto", {"held": held_with(GRO_TCP)}, GRO_TCP, "tcp", True, id="auto-goes-on-as-it-was"),
        pytest.param(
            "auto",
            {"held": held_with(GRO_TCP), "merging": {"web1": False}},
            0,
            "frames",
            True,
            id="auto-frames-from-now-on",
        ),
        pytest.param("auto", {"held": held_with(GRO)}, 0, "frames", True, id="auto-after-gro"),
        pytest.param("gro", {}, GRO, "gro", False, id="gro"),
        pytest.param("frames", {"held": held_with(GRO_TCP)}, 0, "frames", False, id="frames"),
    ],
)
def test_which_frames_are_merged(
    delivery: str, changes: dict[str, Any], flags: int, shown: str, adapts: bool
) -> None:
    desired = desire(config(port=f"switch: ext0, delivery: {delivery},"), facts(**changes))
    assert record(desired).flags & (GRO | GRO_TCP) == flags
    port = desired.ports["web1"]
    assert (port.delivery, port.adapts, port.reason) == (shown, adapts, None)
    assert desired.state[Feature("eth1", 2, MERGING)] is True


@pytest.mark.parametrize("delivery", ["gro", "auto"])
def test_generic_xdp_merges_nothing(delivery: str) -> None:
    """Whoever asked for it is told; nothing is tried."""
    asked = config(port=f"switch: ext0, delivery: {delivery},", queues="{eth1: {xdp_mode: generic}}")
    desired = desire(asked, facts(merging={"web1": True}))
    decided = desired.ports["web1"]
    assert not record(desired).flags & (GRO | GRO_TCP)
    assert (decided.delivery, decided.adapts) == ("frames", False)
    assert Feature("eth1", 2, MERGING) not in desired.state
    if delivery == "gro":
        assert (decided.reason or "").startswith("delivery: frames: eth1 has XDP in generic mode")
    else:
        assert decided.reason is None


def test_a_port_that_does_not_run_has_nothing_merged() -> None:
    desired = desire(config(port="switch: ext0, delivery: gro, queue: 'off',"), FACTS)
    assert not record(desired).flags & (GRO | GRO_TCP)
    assert (desired.ports["web1"].delivery, desired.ports["web1"].adapts) == (None, False)
