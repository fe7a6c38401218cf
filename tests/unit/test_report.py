"""From decisions and counters to what is shown. No privileges: the reading is made here."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from offload.bridge.state import BridgeState, ExtensionState, MemberState, Restarts
from offload.config import QueuesConfig, parse
from offload.hardware import Hardware, Rule
from offload.kernel.host import Answer
from offload.model import Filter, Link, MemberRow, StationRow, StationState
from offload.plan import Desired, PortDecision
from offload.queues import Queue
from offload.report import (
    HeardAddress,
    Reading,
    Views,
    heard_addresses,
    heard_elsewhere,
    python_bridge,
    silent_bridge,
    views,
)
from offload.steering import Nic
from offload.views import (
    CapabilityView,
    HardwareQueues,
    NetworkView,
    PortQueue,
    PortView,
    QueueFilter,
    QueueView,
    StationView,
    SwitchView,
)

MAC = "02:15:5d:00:00:01"
CONFIG = parse("""
version: 1
nics: {eth1: {}}
switches:
  ext0: {type: external, uplink: eth1, host: {interface: ext0-host, vlan: 10, addresses: [192.0.2.1/24]}}
  lab0: {type: private, bridge: python}
ports:
  web1: {switch: ext0, device: web1, mac: "02:15:5d:00:00:01"}
  web2: {switch: ext0, device: web2, mac: "02:15:5d:00:00:02", vlan: 10, queue: "off"}
  db1: {switch: lab0, device: db1, mac: "02:15:5d:00:00:03", vlan: {trunk: ["20-23", 30], native: 30}}
  db2: {switch: lab0, device: db2, mac: "02:15:5d:00:00:04", vlan: 30}
""")
IDS = {"web1": 0, "web2": 1, "db1": 2, "db2": 3, "host:ext0": 4, "uplink:eth1": 5}
DESIRED = Desired(
    state={},
    ports={
        name: PortDecision(name, IDS[name], "active", "bridge", None, None, "no queue is left", False)
        for name in CONFIG.ports
    },
    nic_problems={"eth1": ()},
    refusals=(),
    shares={name: {} for name in CONFIG.ports},
)
WEB1_LINK = Link(7, "web1", "veth", "02:aa:00:00:00:07", 1500, True, True, False, None, 3, "ext0", 4, 4)
PATHS = (
    "socket",
    "direct",
    "queued",
    "handed",
    "returned",
    "left",
    "merged",
    "bridged",
    "local",
    "tx_local",
    "tx_direct",
    "tx_bridge",
)
DROPS = (
    *("vlan_nic", "vlan_queue", "vlan_bridge", "vlan_sent"),
    *("spoofed", "guard_dhcp", "guard_ra", "link_local", "host"),
)


def row(**counted: int) -> dict[str, Any]:
    """A row of port_counters: frames of 100 bytes."""
    tallies = {name: {"packets": counted.get(name, 0), "bytes": counted.get(name, 0) * 100} for name in PATHS}
    return {**tallies, **{name: counted.get(name, 0) for name in DROPS}}


def shown(**fields: Any) -> Views:
    rows = {port_id: row() for port_id in IDS.values()} | fields.pop("ports", {})
    return views(CONFIG, DESIRED, Reading(ids=IDS, ports=rows, **fields), {})


def port(name: str, **fields: Any) -> PortView:
    return next(view for view in shown(**fields).ports if view.name == name)


def switch(name: str, **fields: Any) -> SwitchView:
    return next(view for view in shown(**fields).switches if view.name == name)


def packets(counted: dict[Any, Any]) -> dict[str, int]:
    assert all(traffic.bytes == 100 * traffic.packets for traffic in counted.values())
    return {path: traffic.packets for path, traffic in counted.items()}


def test_a_port_s_paths_come_from_its_row() -> None:
    counted = row(
        direct=1,
        handed=2,
        merged=128,
        left=999,
        bridged=4,
        local=8,
        tx_local=16,
        tx_direct=32,
        tx_bridge=64,
    )
    link = replace(WEB1_LINK, rx_packets=999, rx_bytes=999)
    counters = port("web1", ports={0: counted}, links={"web1": link}).counters
    assert packets(dict(counters.rx)) == {"queue": 3, "gro": 128, "local": 8, "bridge": 4}
    assert packets(dict(counters.tx)) == {"local": 16, "direct": 32, "bridge": 64}
    assert counters.drops == {}


def test_a_port_without_a_wire_has_no_paths_to_it() -> None:
    counters = port("db1").counters
    assert list(counters.rx) == ["local", "bridge"]
    assert list(counters.tx) == ["local", "bridge"]


def test_drops_are_told_by_reason() -> None:
    counted = row(**{name: 2**place for place, name in enumerate(DROPS)})
    view = port(
        "web1", ports={0: counted}, links={"web1": replace(WEB1_LINK, tx_dropped=1000)}, lost={0: 2000}
    )
    assert view.counters.drops == {
        "vlan": 1 + 2 + 4 + 8,
        "spoofed": 16,
        "guard_dhcp": 32,
        "guard_ra": 64,
        "link_local": 128,
        "host": 256,
        "ring_full": 2000,
        "device_full": 1000,
    }


def test_the_default_queue_drops_what_the_wire_may_not_say() -> None:
    queue, *_ = shown(ports={5: row(vlan_sent=3, tx_bridge=9)}).queues
    assert (queue.id, queue.drops, queue.drops_by_reason) == (0, 3, {"vlan": 3})


def queue_of_web1(queue: Queue, **decided: Any) -> tuple[QueueView, PortView]:
    """Queue and port of web1; frames have come to it by XDP, and to virtual function eth1v0."""
    decision = PortDecision("web1", 0, "active", "queue", "eth1", queue, None, False, **decided)
    desired = replace(
        DESIRED,
        ports={**DESIRED.ports, "web1": decision},
        shares={**DESIRED.shares, "web1": {Filter("eth1", 4, MAC, 10): 0}},
    )
    function = {
        name: {"packets": n, "bytes": 60 * n} for n, name in enumerate(("group", "stranger", "passed"), 7)
    }
    reading = Reading(ids=IDS, ports={0: row(direct=1, queued=2)}, functions={"eth1v0": function})
    shown = views(CONFIG, desired, reading, {}, {("eth1", 3): MOMENT})
    _, queue_view = shown.queues
    return queue_view, shown.ports[0]


MOMENT = datetime(2024, 5, 17, 12, 30, tzinfo=UTC)
PLACE = ("kind", "state", "device", "rx_queue", "standing", "vlan_by")
LOST = {"ring_full": 0, "vlan": 0}


@pytest.mark.parametrize(
    ("slot", "decided", "place"),
    [
        pytest.param(None, {}, ("software", "running", None, None, None, "xdp"), id="software"),
        pytest.param(
            5,
            {"rx_queue": 5, "queue_standing": True},
            ("hardware", "running", None, 5, True, "xdp"),
            id="rule",
        ),
        pytest.param(5, {"rx_queue": 6}, ("hardware", "set", None, 6, False, "xdp"), id="rule-elsewhere"),
        pytest.param(5, {}, ("hardware", "set", None, None, False, "xdp"), id="still-to-come"),
        pytest.param(
            1,
            {"queue_device": "eth1v0", "queue_standing": True},
            ("hardware", "running", "eth1v0", None, True, "nic"),
            id="function",
        ),
    ],
)
def test_what_a_queue_is_and_where(
    slot: int | None, decided: dict[str, Any], place: tuple[object, ...]
) -> None:
    queue, its_port = queue_of_web1(Queue(3, 2, slot), **decided)
    assert tuple(getattr(queue, key) for key in PLACE) == place
    assert (queue.id, queue.cpu, queue.since, queue.packets) == (3, 2, MOMENT, 3)
    assert queue.filters == [QueueFilter(mac=MAC, vlan=10)]
    assert its_port.queue == PortQueue(
        id=3, kind="software" if slot is None else "hardware", cpu=2, state=queue.state
    )


def test_what_a_virtual_function_did_not_take_is_no_loss() -> None:
    queue, _ = queue_of_web1(Queue(3, 2, 1), queue_device="eth1v0", queue_standing=True)
    assert (queue.drops, queue.drops_by_reason) == (8, LOST | {"stranger": 8})
    assert queue.not_taken == {"group": 7, "passed": 9}
    software, _ = queue_of_web1(Queue(3, 2))
    assert (software.drops, software.drops_by_reason, software.not_taken) == (0, LOST, {})


def uplink(hardware: Hardware) -> Nic:
    return Nic(
        link=replace(WEB1_LINK, name="eth1", ifindex=4),
        hardware=hardware,
        settings=QueuesConfig(),
        own=frozenset(),
        member=MemberRow(5, 1, "function"),
        digests=("", ""),
    )


@pytest.mark.parametrize(
    ("hardware", "told"),
    [
        pytest.param(
            Hardware("rules", rx_queues=4, rules=(Rule(0, "", None, 3),)),
            HardwareQueues(how="rules", total=2, in_use=1, why=None),
            id="rules-beside-those-of-others",
        ),
        pytest.param(
            Hardware("functions", rx_queues=4, total_functions=7),
            HardwareQueues(how="functions", total=7, in_use=1, why=None),
            id="functions",
        ),
        pytest.param(
            Hardware(None, "it has none", rx_queues=4),
            HardwareQueues(how=None, total=0, in_use=0, why="it has none"),
            id="none",
        ),
    ],
)
def test_hardware_queues_of_a_nic(hardware: Hardware, told: HardwareQueues) -> None:
    queues = {"web1": Queue(1, 0, 2 if hardware.how else None), "web2": Queue(2, 0), "db1": None}
    ports = {name: replace(DESIRED.ports[name], nic="eth1", queue=queue) for name, queue in queues.items()}
    desired = replace(DESIRED, ports={**DESIRED.ports, **ports}, nics={"eth1": uplink(hardware)})
    [nic] = views(CONFIG, desired, Reading(ids=IDS, ports={0: row()}), {}).nics
    assert (nic.rx_queues, nic.hardware_queues) == (4, told)


def test_what_a_nic_answered_is_shown() -> None:
    answers = {"eth1": {"sriov": Answer("no", "none here", "the firmware")}}
    [nic] = shown(capabilities=answers, numa_nodes={"eth1": 1}).nics
    assert nic.capabilities == {"sriov": CapabilityView(state="no", why="none here", remedy="the firmware")}
    assert (nic.numa_node, nic.rx_queues, nic.hardware_queues) == (1, None, None)


def test_what_was_asked_is_shown_beside_what_is() -> None:
    assert (port("web1").queue_asked, port("web2").queue_asked) == ("auto", "off")


def station(state: StationState, moves: int, since: int = 0, port_id: int = 0) -> StationRow:
    return StationRow(port=port_id, ifindex=7, state=state, moves=moves, since=since)


@pytest.mark.parametrize(
    ("state", "moves", "expected"),
    [
        pytest.param("expected", 0, 0, id="not-heard"),
        pytest.param("here", 1, 0, id="here"),
        pytest.param("away", 2, 1, id="here-away"),
        pytest.param("here", 3, 1, id="here-away-here"),
        pytest.param("away", 1, 1, id="first-from-the-wire"),
        pytest.param("here", 2, 1, id="away-here"),
    ],
)
def test_how_often_an_address_went_to_the_wire(state: StationState, moves: int, expected: int) -> None:
    assert heard_addresses({(0, MAC, 0): station(state, moves)}) == {0: {MAC: HeardAddress(state, expected)}}


def test_of_several_vlans_the_newest_state_counts_and_no_move_twice() -> None:
    rows = {
        (0, MAC, 10): station("here", 3, since=100),
        (0, MAC, 20): station("away", 2, since=200),
        (0, MAC, 30): station("here", 1, since=50),
        (1, MAC, 10): station("here", 1, since=300, port_id=2),
    }
    for order in (rows, dict(reversed(rows.items()))):
        assert heard_addresses(order) == {
            0: {MAC: HeardAddress("away", 1, 200)},
            2: {MAC: HeardAddress("here", 0, 300)},
        }


def test_stations_and_moves_of_a_port() -> None:
    view = port("web1", heard={0: {MAC: HeardAddress("away", 2, 5)}}, moves={0: 7})
    assert view.stations == [StationView(mac=MAC, state="away", moves=2)]
    assert view.moves == 7
    assert port("web2").stations == []


@pytest.mark.parametrize(
    ("heard", "told"),
    [
        pytest.param(HeardAddress("here", 0), [], id="here"),
        pytest.param(
            HeardAddress("away", 1),
            [
                f"{MAC} of port web1 is heard from eth1: its VM has moved there, "
                "or another machine has the same address"
            ],
            id="away",
        ),
        pytest.param(
            HeardAddress("here", 2),
            [
                f"{MAC} of port web1 was also heard from eth1, 2 times: its VM was there meanwhile, "
                "or another machine has the same address"
            ],
            id="both",
        ),
    ],
)
def test_an_address_that_the_wire_has_too_is_a_warning(heard: HeardAddress, told: list[str]) -> None:
    assert heard_elsewhere(shown(heard={0: {MAC: heard}})) == told


def test_the_host_s_interface() -> None:
    link = replace(WEB1_LINK, name="ext0-host", mac="02:aa:00:00:00:02")
    view = switch(
        "ext0",
        links={"ext0-host": link},
        ports={4: row(local=1, bridged=2, tx_local=3, tx_direct=4, tx_bridge=5, vlan_bridge=6, link_local=7)},
        host_addresses={"ext0-host": ("192.0.2.1/24",)},
    )
    host = view.host_interface
    assert host is not None
    assert (view.host, host.interface, host.present, host.mac) == ("ext0-host", "ext0-host", True, link.mac)
    assert (host.vlan, host.addresses) == (10, ["192.0.2.1/24"])
    assert packets(dict(host.counters.rx)) == {"local": 1, "bridge": 2}
    assert packets(dict(host.counters.tx)) == {"local": 3, "direct": 4, "bridge": 5}
    assert host.counters.drops == {"vlan": 6, "link_local": 7}


def test_a_host_s_interface_that_is_not_there_yet() -> None:
    view = views(CONFIG, DESIRED, Reading(), {}).switches[0]
    host = view.host_interface
    assert host is not None
    assert (host.present, host.mac, host.addresses, host.counters.rx) == (False, None, [], {})
    assert shown().switches[1].host_interface is None


def test_networks_are_vlans_with_the_same_members() -> None:
    assert switch("ext0").networks == [
        NetworkView(vlan=None, ports=["web1"], host=False),
        NetworkView(vlan="10", ports=["web2"], host=True),
    ]
    assert switch("lab0").networks == [
        NetworkView(vlan="20-23", ports=["db1"], host=False),
        NetworkView(vlan="30", ports=["db1", "db2"], host=False),
    ]


def test_the_default_path_is_what_went_over_the_bridge() -> None:
    rows = {
        0: row(tx_bridge=1, bridged=10, local=7, tx_direct=7),
        1: row(tx_bridge=2, bridged=20),
        2: row(tx_bridge=500, bridged=500),
        4: row(tx_bridge=4, bridged=40),
        5: row(tx_bridge=100, tx_local=7),
    }
    path = switch("ext0", ports=rows).default_path
    assert (path.from_ports.packets, path.from_wire.packets, path.to_ports.packets) == (7, 100, 70)


def test_the_vid_of_untagged_frames_is_shown_where_there_is_one() -> None:
    untagged = {"ext0": 4094, "lab0": 0}
    assert switch("ext0", untagged=untagged).untagged_vid == 4094
    assert switch("lab0", untagged=untagged).untagged_vid is None


BRIDGE = BridgeState(
    switch="lab0",
    pid=4711,
    written=0.0,
    inner="lab0-py",
    bound=True,
    restarts=Restarts(extension=1, other=2),
    drops={"ring": 5},
    members=(
        MemberState(2, "db1", rx_packets=10, drops={"vlan": 1, "nowhere": 2}),
        MemberState(3, "db2", rx_packets=20, tx_packets=9, drops={"vlan": 3}),
    ),
    extensions=(ExtensionState("mirror", "off", "it failed", 7, 1, 0, 0),),
)


def test_a_python_bridge_that_runs() -> None:
    view = python_bridge(replace(BRIDGE, written=time.time()))
    assert (view.running, view.problem, view.frames, view.restarts) == (True, None, 30, 3)
    assert view.drops == {"ring": 5, "vlan": 4, "nowhere": 2}
    (extension,) = view.extensions
    assert (extension.name, extension.state, extension.reason, extension.failures) == (
        *("mirror", "off", "it failed"),
        1,
    )


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        pytest.param(BRIDGE, "its process does not run, or is stuck", id="silent"),
        pytest.param(replace(BRIDGE, bound=False), "lab0-py is not there", id="no-device"),
        pytest.param(replace(BRIDGE, config_error="members: damaged"), "members: damaged", id="config"),
    ],
)
def test_a_python_bridge_with_a_problem(state: BridgeState, problem: str) -> None:
    view = switch("lab0", bridges={"lab0": python_bridge(state)})
    assert view.python_bridge is not None
    assert (view.python_bridge.running, view.problems) == (False, [f"Python bridge: {problem}"])


def test_a_python_bridge_of_which_nothing_can_be_read() -> None:
    view = switch("lab0", bridges={"lab0": silent_bridge("cannot be read")})
    assert view.problems == ["Python bridge: cannot be read"]
