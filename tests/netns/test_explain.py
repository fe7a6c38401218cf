"""What `offload explain` says of a frame, against what then really happens to it. Needs root.

Every case is asked first, and the very frame of the answer is sent afterwards: the counters that the
answer names must move, each by one, and who gets the frame must be who the verdict says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from offload.explain import MADE_UP, Sample
from offload.kernel.dataplane import Dataplane
from offload.kernel.explain import Question, explain
from offload.model import News
from offload.views import ExplainView
from tests.bpf.loaded import flat
from tests.instance import Instance
from tests.lab import AS_NOBODY, VERSION, Capture, Lab, Vm, tag, wait_until
from tests.netns.consumer import Consumer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

NIC, HOST_NIC = "eth1", "eth2"
WIRES = {NIC: "wire0", HOST_NIC: "wire1"}
QUEUE_CPU, OTHER_CPU = 1, 0
HOST_MAC = "02:15:5d:00:00:f0"
NOBODY = "02:15:5d:00:00:99"
BROADCAST, MULTICAST, LLDP = "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "01:80:c2:00:00:0e"

NAMES = [
    *("web1", "web2", "acc1", "acc2", "trunk1", "quiet1", "off1", "small1"),
    *("lone1", "free1", "hv1", "db1", "db2", "gro1"),
]
MACS = {name: f"02:15:5d:00:00:{number:02x}" for number, name in enumerate(NAMES, 1)}
SOCKETS = ("db1", "db2")
SMALL_MTU = 1000


def config() -> dict[str, Any]:
    """A switch with every kind of port, one with the host, and a private one.

    VLANs are on the Python bridge, which has them on every kernel; the host is on the kernel's.
    """
    keys: dict[str, dict[str, Any]] = {
        "acc1": {"vlan": 10},
        "acc2": {"vlan": 10, "cpu": "nic"},
        "gro1": {"vlan": 10, "cpu": "nic", "delivery": "gro"},
        "trunk1": {"vlan": {"trunk": [10, 20]}},
        "off1": {"queue": "off"},
        "lone1": {"switch": "prv0"},
        "hv1": {"switch": "ext1"},
        "free1": {"switch": "prv0", "allow": {"mac_spoofing": True}},
        "db1": {"af_xdp": {"mode": "software"}},
        "db2": {"af_xdp": {"mode": "hardware"}},
    }
    host = {"interface": "host0", "mac": HOST_MAC}
    return {
        "version": 1,
        "metrics": None,
        "nics": {nic: {"queues": {"cpus": [QUEUE_CPU]}} for nic in WIRES},
        "switches": {
            "ext0": {"type": "external", "uplink": NIC, "bridge": "python"},
            "ext1": {"type": "external", "uplink": HOST_NIC, "host": host},
            "prv0": {"type": "private"},
        },
        "ports": {
            name: {
                "switch": "ext0",
                "mac": mac,
                **({} if name in SOCKETS else {"device": name}),
                **keys.get(name, {}),
            }
            for name, mac in MACS.items()
        },
    }


Moves = dict[tuple[str, str], int]


@dataclass
class Site:
    lab: Lab
    instance: Instance
    vms: dict[str, Vm]
    consumers: dict[str, Consumer] = field(default_factory=dict)

    def ask(self, **fields: Any) -> ExplainView:
        question = Question(**{"nic": None, "port": None} | fields)
        return self.lab.host.call(lambda: explain(question, self.instance.paths))

    def counters(self) -> Moves:
        """Packets by row of the port table and counter; of the NIC's own under its name."""

        def read() -> Moves:
            paths = self.instance.paths
            with Dataplane(paths.objects, paths.cache, keep=False) as plane:
                ports = plane.ports()
                rows = plane.port_counters(max(ports) + 1)
                found = {
                    (record.name, name.removesuffix(".packets")): value
                    for port_id, record in ports.items()
                    for name, value in flat(rows[port_id])
                    if not name.endswith(".bytes")
                }
                for nic in WIRES:
                    for name, tally in plane.nic_counters(self.lab.host.ifindex(nic)).items():
                        found[nic, name] = tally["packets"]
            return found

        return self.lab.host.call(read)

    def unchanged(self) -> tuple[object, ...]:
        """Everything that asking must leave alone."""

        def read() -> tuple[object, ...]:
            paths = self.instance.paths
            with Dataplane(paths.objects, paths.cache, keep=False) as plane:
                return plane.stations(), plane.ports()

        return self.counters(), *self.lab.host.call(read)

    def on_other_cpu(self, work: Callable[[], object]) -> None:
        """A veth receives on the CPU that sends: on another one than the queues'."""
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {OTHER_CPU})  # threads that are started now have it too
        try:
            work()
        finally:
            os.sched_setaffinity(0, allowed)

    def send(self, question: dict[str, Any], frame: bytes) -> None:
        port = question.get("port")
        if port is None:
            self.on_other_cpu(lambda: self.lab.wire.send(WIRES[question["nic"]], [frame]))
        elif port == "host:ext1":
            self.lab.host.send("host0", [frame])
        elif port in self.vms:
            self.vms[port].send([frame])
        else:
            self.consumers[port].send([frame])

    def ends(self, held: ExitStack) -> dict[str, Capture]:
        """Captures at every place where a frame can come out."""
        found = {name: held.enter_context(vm.capture()) for name, vm in self.vms.items()}
        found |= {each: held.enter_context(self.lab.wire.capture(each)) for each in WIRES.values()}
        found["host"] = held.enter_context(self.lab.host.capture("host0"))
        return found


@pytest.fixture(scope="module")
def site(privilege: None) -> Iterator[Site]:
    """Every VM but quiet1 was heard. Scope: module; tests change nothing but counters."""
    yield from made()


@pytest.fixture
def own_site(privilege: None) -> Iterator[Site]:
    """The same for one test, which may change it."""
    yield from made()


def made() -> Iterator[Site]:
    with Lab() as lab:
        vms = {name: lab.vm(name, mac) for name, mac in MACS.items() if name not in SOCKETS}
        lab.host.ip(f"link set small1 mtu {SMALL_MTU}")
        lab.add_nic(HOST_NIC, WIRES[HOST_NIC], number=1)
        with Instance(lab.host, config()) as instance, ExitStack() as held:
            instance.start(speaking=[vm for name, vm in vms.items() if name not in ("quiet1", "trunk1")])
            for vid in (10, 20):
                vms["trunk1"].announce(tag(vid))
            site = Site(lab, instance, vms)
            for name in SOCKETS:
                site.consumers[name] = held.enter_context(Consumer(instance, name))
                site.consumers[name].announce(MACS[name])
            instance.wait_heard(*(MACS[name] for name in NAMES if name != "quiet1"))
            yield site


@dataclass(frozen=True)
class Case:
    """A question, its verdict and the counters of its steps; and who gets the frame, ``None`` for anybody."""

    question: dict[str, Any]
    verdict: str
    counters: tuple[str, ...]
    gets: str | None = ""
    vlan_action: str = "none"
    reason: str = ""


def wire(dst: str, **more: Any) -> dict[str, Any]:
    return {"nic": NIC, "dst": MACS.get(dst, dst)} | more


def vm(port: str, dst: str, **more: Any) -> dict[str, Any]:
    return {"port": port, "dst": MACS.get(dst, dst), **more}


STACKED = (10, 20)
CASES = {
    "wire-queue": Case(wire("web1"), "queue", ("web1.queued", "web1.handed"), "web1", reason="CPU 1"),
    "wire-queue-strip": Case(
        wire("acc1", vids=(10,)), "queue", ("acc1.queued", "acc1.handed"), "acc1", "strip"
    ),
    "wire-queue-on-the-nic-s-cpu": Case(
        wire("acc2", vids=(10,)), "queue", ("acc2.direct",), "acc2", "strip", "the CPU of the NIC's RX queue"
    ),
    "wire-queue-merged": Case(
        wire("gro1", vids=(10,), kind="tcp"),
        "queue",
        ("gro1.left", "wire.tx_local", "gro1.merged"),
        "gro1",
        "strip",
        "which has it merged with its neighbours",
    ),
    "wire-queue-priority-tag": Case(
        wire("web1", vids=(0,)), "queue", ("web1.queued", "web1.handed"), "web1", "strip"
    ),
    "wire-queue-trunk": Case(
        wire("trunk1", vids=(20,)), "queue", ("trunk1.queued", "trunk1.handed"), "trunk1"
    ),
    "wire-queue-trunk-stacked": Case(
        wire("trunk1", vids=STACKED), "queue", ("trunk1.queued", "trunk1.handed"), "trunk1"
    ),
    "wire-af_xdp": Case(wire("db1"), "af_xdp", ("db1.queued", "db1.handed", "channel:handed"), "db1"),
    "wire-host": Case(
        wire(HOST_MAC, nic=HOST_NIC), "host", ("nic.no_filter", "wire.tx_local", "host.local"), "host"
    ),
    "wire-bridge-broadcast": Case(wire(BROADCAST), "bridge", ("nic.broadcast", "wire.tx_bridge"), None),
    "wire-bridge-multicast": Case(wire(MULTICAST), "bridge", ("nic.multicast", "wire.tx_bridge"), None),
    "wire-bridge-nobody": Case(
        wire(NOBODY), "bridge", ("nic.no_filter", "wire.tx_bridge"), None, reason="no port of ext0"
    ),
    "wire-bridge-other-vlan": Case(
        wire("web1", vids=(10,)),
        "bridge",
        ("nic.no_filter", "wire.tx_bridge"),
        None,
        reason="is an address of port web1 untagged",
    ),
    "wire-bridge-quiet": Case(
        wire("quiet1"),
        "bridge",
        ("nic.no_filter", "wire.tx_bridge"),
        None,
        reason="nothing was heard from port quiet1",
    ),
    "wire-bridge-off": Case(
        wire("off1"),
        "bridge",
        ("nic.no_filter", "wire.tx_bridge"),
        None,
        reason="port off1 gets nothing past the bridge",
    ),
    "wire-bridge-too-big": Case(
        wire("small1", size=1400),
        "bridge",
        ("nic.too_big", "wire.tx_bridge"),
        None,
        reason="1400 bytes are more than the MTU of port small1 has room for (1014 bytes)",
    ),
    "wire-drop-stacked": Case(wire("acc1", vids=STACKED), "drop", ("acc1.vlan_nic",), reason="second tag"),
    "wire-drop-802.1ad": Case(
        wire("web1", vids=(10,), service=True), "drop", ("web1.vlan_nic",), reason="802.1ad tag"
    ),
    "wire-drop-802.1ad-nobody": Case(
        wire(NOBODY, vids=(10,), service=True), "drop", ("nic.no_filter", "wire.vlan_sent"), reason="802.1ad"
    ),
    "vm-queue": Case(vm("web1", "web2"), "queue", ("web1.tx_local", "web2.local"), "web2"),
    "vm-queue-access": Case(vm("acc1", "acc2"), "queue", ("acc1.tx_local", "acc2.local"), "acc2"),
    "vm-queue-push": Case(vm("acc1", "trunk1"), "queue", ("acc1.tx_local", "trunk1.local"), "trunk1", "push"),
    "vm-queue-strip": Case(
        vm("trunk1", "acc1", vids=(10,)), "queue", ("trunk1.tx_local", "acc1.local"), "acc1", "strip"
    ),
    "vm-af_xdp": Case(vm("web1", "db1"), "af_xdp", ("web1.tx_local", "db1.local", "channel:handed"), "db1"),
    "vm-host": Case(vm("hv1", HOST_MAC), "host", ("hv1.tx_local", "host.local"), "host"),
    "vm-uplink": Case(vm("web1", NOBODY), "uplink", ("web1.tx_direct",), "wire0"),
    "vm-uplink-full-size": Case(vm("web1", NOBODY, size=1514), "uplink", ("web1.tx_direct",), "wire0"),
    "vm-uplink-full-size-tagged": Case(
        vm("trunk1", NOBODY, vids=(20,), size=1514), "uplink", ("trunk1.tx_direct",), "wire0"
    ),
    "vm-uplink-push": Case(vm("acc1", NOBODY), "uplink", ("acc1.tx_direct",), "wire0", "push"),
    "vm-uplink-priority-tag": Case(
        vm("web1", NOBODY, vids=(0,)), "uplink", ("web1.tx_direct",), "wire0", "strip"
    ),
    "af_xdp-uplink": Case(vm("db1", NOBODY), "uplink", ("db1.tx_direct",), "wire0"),
    "host-queue": Case(vm("host:ext1", "hv1", src=HOST_MAC), "queue", ("host.tx_local", "hv1.local"), "hv1"),
    "vm-bridge-broadcast": Case(vm("web1", BROADCAST), "bridge", ("web1.tx_bridge",), None),
    "vm-bridge-quiet": Case(vm("web1", "quiet1"), "bridge", ("web1.tx_bridge",), None, reason="nothing was"),
    "vm-bridge-off": Case(vm("off1", "web1"), "bridge", ("off1.tx_bridge",), None, reason="queue: off"),
    "vm-bridge-to-off": Case(
        vm("web1", "off1"), "bridge", ("web1.tx_bridge",), None, reason="port off1 is handed nothing"
    ),
    "vm-bridge-too-big": Case(
        vm("web1", "small1", size=1400), "bridge", ("web1.tx_bridge",), None, reason="(1014 bytes): raise it"
    ),
    "vm-bridge-spoofers": Case(
        vm("lone1", NOBODY), "bridge", ("lone1.tx_bridge",), None, reason="may send from any address"
    ),
    "vm-drop-spoofed": Case(
        vm("web1", NOBODY, src=NOBODY), "drop", ("web1.spoofed",), reason="allow mac_spoofing"
    ),
    "vm-drop-spoofed-neighbour": Case(vm("web1", NOBODY, src=MACS["web2"]), "drop", ("web1.spoofed",)),
    "vm-drop-vlan": Case(vm("web1", NOBODY, vids=(10,)), "drop", ("web1.vlan_sent",), reason="VLAN 10"),
    "vm-drop-vlan-trunk": Case(
        vm("trunk1", NOBODY, vids=(30,)), "drop", ("trunk1.vlan_sent",), reason="its trunk has not that VLAN"
    ),
    "vm-drop-vlan-native": Case(
        vm("trunk1", NOBODY), "drop", ("trunk1.vlan_sent",), reason="has no native VLAN"
    ),
    "vm-drop-vlan-at-the-other": Case(
        vm("trunk1", "acc1", vids=STACKED),
        "drop",
        ("trunk1.tx_local", "acc1.vlan_bridge"),
        reason="port acc1 must not get a second tag",
    ),
    "vm-drop-dhcp": Case(
        vm("web1", BROADCAST, kind="dhcp-server"), "drop", ("web1.guard_dhcp",), reason="allow dhcp_server"
    ),
    "vm-drop-ra": Case(
        vm("web1", MULTICAST, kind="router-advertisement"),
        "drop",
        ("web1.guard_ra",),
        reason="allow router_advertisement",
    ),
    "vm-drop-link-local": Case(
        vm("web1", LLDP), "drop", ("web1.link_local",), reason="allow link_local_protocols"
    ),
    "vm-drop-own": Case(
        vm("web1", "web1"), "drop", ("web1.tx_local",), reason="an address of port web1 itself"
    ),
}


def counted(view: ExplainView) -> list[str]:
    """The steps of an answer as ``Case.counters`` has them."""
    short: dict[str | None, str] = {None: "nic", "host:ext1": "host"}
    short |= {f"uplink:{nic}": "wire" for nic in WIRES}
    return [
        f"channel:{step.counter}"
        if step.program == "channel"
        else f"{short.get(step.port, step.port)}.{step.counter}"
        for step in view.steps
    ]


def moved(site: Site, view: ExplainView, before: Moves) -> bool:
    """Whether the counters of an answer have moved since, each by one, and its ports' others have not."""
    after = site.counters()
    expected = {(step.port or step.device, step.counter) for step in view.steps if step.program != "channel"}
    concerned = {row for row, _ in expected}
    found = {at: after[at] - before[at] for at in after if at[0] in concerned and after[at] != before[at]}
    found = {at: count for at, count in found.items() if at[1] != "merged_buffers"}  # beside merged
    if view.verdict == "bridge":  # who gets it from there is the bridge's business
        found = {at: count for at, count in found.items() if at[1] not in ("bridged", "vlan_bridge")}
    return set(found) == expected and set(found.values()) == {1}


@pytest.mark.parametrize("name", CASES)
def test_what_is_explained_is_what_happens(name: str, site: Site) -> None:
    case = CASES[name]
    before = site.unchanged()
    view = site.ask(**case.question)
    assert site.unchanged() == before, "asking changes nothing"
    assert (view.verdict, view.vlan_action) == (case.verdict, case.vlan_action), view
    assert counted(view) == list(case.counters)
    assert case.reason in view.reason
    asked = dict(case.question)
    sender = asked.pop("port", None)
    asked.pop("nic", None)
    sample = Sample(**{"src": MACS.get(sender or "", MADE_UP), **asked})
    with ExitStack() as held:
        ends = site.ends(held)
        for consumer in site.consumers.values():
            consumer.take()
        counters = site.counters()
        site.send(case.question, sample.octets())
        wait_until(lambda: moved(site, view, counters), f"what {view} says")
        if case.gets is None:
            return
        longer = {"none": 0, "strip": -4, "push": 4}[view.vlan_action]
        if case.gets in ends:
            ends[case.gets].wait_for(1)
        elif case.gets:
            assert site.consumers[case.gets].socket.wait(5), "the consumer has it"
        came = {end: seen.frames() for end, seen in ends.items()}
        came |= {end: consumer.take() for end, consumer in site.consumers.items()}
        got = {end: [len(frame) for frame in frames] for end, frames in came.items() if frames}
        assert got == ({case.gets: [len(sample.octets()) + longer]} if case.gets else {})


# What only a consumer's coming and going shows


def test_a_channel_without_a_consumer_is_a_drop(own_site: Site) -> None:
    site = own_site
    before = site.instance.port("db1")["counters"]["drops"].get("no_consumer", 0)
    site.consumers["db1"].close()
    for question in (wire("db1"), vm("web1", "db1")):
        view = site.ask(**question)
        assert (view.verdict, view.port) == ("drop", "db1")
        assert "consumer has put no socket" in view.reason
        assert counted(view)[-1] == "channel:no_consumer"
    site.lab.wire.send(WIRES[NIC], [Sample(MACS["db1"], MADE_UP).octets()])

    def counted_as_drop() -> bool:
        now = site.instance.port("db1")["counters"]["drops"].get("no_consumer", 0)
        return bool(now == before + 1)

    wait_until(counted_as_drop, "the drop is counted")


def test_a_socket_on_the_nic_is_found_by_its_queue(own_site: Site) -> None:
    site = own_site
    with Consumer(site.instance, "db2", queue=1):
        there = site.ask(**wire("db2", rx_queue=1))
        assert (there.verdict, there.port, there.cpu) == ("af_xdp", "db2", None)
        assert "RX queue 1 of eth1" in there.reason
        assert counted(there) == ["db2.socket"]
        other = site.ask(**wire("db2", rx_queue=0))
        assert (other.verdict, other.cpu) == ("af_xdp", QUEUE_CPU)
        assert counted(other) == ["db2.queued", "db2.handed", "channel:handed"]
        with ExitStack() as held:
            for queue in (0, 2, 3):
                held.enter_context(Consumer(site.instance, "db2", queue=queue))
            before = site.counters()
            site.lab.wire.send(WIRES[NIC], [Sample(MACS["db2"], MADE_UP).octets()])
            wait_until(lambda: moved(site, there, before), "a NIC's socket has it")


# What only a daemon that is dead leaves so


def test_with_the_daemon_dead(own_site: Site) -> None:
    site = own_site
    site.instance.stop(signal.SIGKILL)
    assert site.ask(**wire("web1")).verdict == "queue"
    site.ask(**wire(NOBODY, src=MACS["web1"]))
    assert news(site) == [], "that was no news to tell"
    assert site.ask(**vm("web1", "web2")).verdict == "queue"

    # A row of the port table is paused by whoever sees its address on the wire.
    site.lab.wire.send(WIRES[NIC], [Sample(NOBODY, MACS["web2"]).octets()])
    happens(site, wire("web2"), "bridge", ["nic.paused", "wire.tx_bridge"], "port web2 was last heard")

    happens(site, vm("web1", "web2"), "uplink", ["web1.tx_direct"], "port web2 was last heard")

    site.lab.unplug(site.vms["trunk1"])
    returned = ["trunk1.queued", "trunk1.returned", "wire.tx_bridge"]
    happens(site, wire("trunk1", vids=(10,)), "bridge", returned, "the device of port trunk1 is away")
    site.lab.unplug(site.vms["acc2"])
    happens(site, wire("acc2", vids=(10,)), "bridge", ["nic.no_device", "wire.tx_bridge"], "acc2 is away")
    happens(site, vm("acc1", "acc2"), "bridge", ["acc1.tx_bridge"], "the device of port acc2 is away")
    refused = site.instance.cli("explain", "--port", "acc2", "--dst", NOBODY, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "port acc2 sends nothing: its device is away" in refused.stderr

    forget_cpu(site)
    happens(site, wire("web1"), "bridge", ["nic.no_cpu", "wire.tx_bridge"], "a CPU that does not serve eth1")

    site.instance.start()
    site.instance.cli("detach")
    view = site.ask(**wire("web1"))
    assert (view.verdict, counted(view)) == ("bridge", ["wire.tx_bridge"])
    assert "the fast path of eth1 is detached" in view.reason
    assert "is detached" in site.ask(**vm("web1", NOBODY)).reason


def happens(site: Site, question: dict[str, Any], verdict: str, counters: list[str], reason: str) -> None:
    """Ask, then do, and see that the counters are those."""
    before = site.unchanged()
    view = site.ask(**question)
    assert site.unchanged() == before
    assert (view.verdict, counted(view)) == (verdict, counters), view
    assert reason in view.reason
    at = site.counters()
    asked = {key: value for key, value in question.items() if key not in ("nic", "port")}
    sample = Sample(**{"src": MACS.get(question.get("port", ""), MADE_UP), **asked})
    site.send(question, sample.octets())
    wait_until(lambda: moved(site, view, at), f"what {view} says")


def news(site: Site) -> list[News]:
    """What nobody was told yet. Only without a daemon, from which this would take it."""

    def read() -> list[News]:
        paths = site.instance.paths
        with Dataplane(paths.objects, paths.cache, keep=False) as plane:
            return plane.drain_news()

    return site.lab.host.call(read)


def forget_cpu(site: Site) -> None:
    """Take the service of a NIC's queues away from their CPU."""

    def take() -> None:
        paths = site.instance.paths
        with Dataplane(paths.objects, paths.cache, keep=False) as plane:
            plane.set_queue_cpu(site.lab.host.ifindex(NIC), QUEUE_CPU, None)

    site.lab.host.call(take)


def test_a_station_that_speaks_on_the_wire_is_not_moved_by_asking(site: Site) -> None:
    """The program `wire` would pause the port at once."""
    before = site.unchanged()
    view = site.ask(**wire(NOBODY, src=MACS["web1"]))
    assert counted(view) == ["nic.no_filter", "wire.tx_bridge"]
    assert site.unchanged() == before
    assert site.ask(**wire("web1")).verdict == "queue"


# The command


def test_the_command_prints_one_document(site: Site) -> None:
    before = site.instance.json("ports")
    shown = site.instance.json("explain", "--nic", NIC, "--dst", MACS["acc1"].upper(), "--vlan", "10")
    assert shown == {
        "verdict": "queue",
        "port": "acc1",
        "queue": site.instance.port("acc1")["queue"]["id"],
        "cpu": QUEUE_CPU,
        "vlan_action": "strip",
        "reason": f"a filter on eth1 gives {MACS['acc1']} in VLAN 10 to port acc1: "
        "its queue is served by CPU 1",
        "steps": [
            {"program": "uplink", "device": NIC, "counter": "queued", "port": "acc1"},
            {"program": "queue", "device": NIC, "counter": "handed", "port": "acc1"},
        ],
    }
    assert site.instance.json("ports") == before


def test_the_command_tells_people(site: Site) -> None:
    shown = site.instance.cli("explain", "--port", "web1", "--dst", NOBODY, "--src", NOBODY).stdout
    assert shown.splitlines() == [
        "verdict    drop",
        "port       web1",
        f"reason     {NOBODY} untagged is no address of port web1: add it to the port's `mac`, "
        "or allow mac_spoofing",
        "program 1  sent on web1: spoofed",
    ]


REFUSED = {
    "neither": (["--dst", NOBODY], 2, "Give either --nic or --port"),
    "both": (["--nic", NIC, "--port", "web1", "--dst", NOBODY], 2, "Give either --nic or --port"),
    "no-dst": (["--nic", NIC], 2, "Missing option '--dst'"),
    "bad-mac": (["--nic", NIC, "--dst", "02:15"], 2, "02:15: a MAC as"),
    "no-such-nic": (
        ["--nic", "eth9", "--dst", NOBODY],
        2,
        "eth9: there is no such nic; there is: eth1, eth2",
    ),
    "no-such-port": (["--port", "web9", "--dst", NOBODY], 2, "web9: there is no such port; there is: acc1"),
    "no-such-queue": (["--nic", NIC, "--dst", NOBODY, "--rx-queue", "4"], 2, "eth1 has 4, numbered from 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, site: Site) -> None:
    arguments, code, told = REFUSED[case]
    refused = site.instance.cli("explain", *arguments, check=False)
    assert (refused.returncode, refused.stdout) == (code, "")
    assert told in refused.stderr


def test_a_frame_longer_than_a_page_is_tried_on_tc_or_refused(site: Site) -> None:
    """Linux 6.18 refuses it, 7.2 tries it."""
    told = site.instance.cli("explain", "--port", "web1", "--dst", NOBODY, "--size", "9000", check=False)
    if told.returncode == 0:
        assert VERSION > (6, 18)
        assert told.stdout.startswith("verdict    bridge\n")
    else:
        assert VERSION < (7, 2)
        assert (told.returncode, told.stdout) == (3, "")
        assert "a shorter one" in told.stderr


def test_programs_of_another_version_are_not_asked(site: Site) -> None:
    directory = site.instance.paths.objects / "members" / str(site.lab.host.ifindex("web1"))
    pins = list(directory.glob("ingress-sent-*")) if directory.is_dir() else []
    if not pins:
        pytest.skip("this kernel has no tcx, whose pins say the version")
    other = pins[0].with_name("ingress-sent-00000000")
    pins[0].rename(other)
    try:
        refused = site.instance.cli("explain", "--port", "web1", "--dst", NOBODY, check=False)
    finally:
        other.rename(pins[0])
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "web1 does not run exactly the programs of this version" in refused.stderr


def test_nothing_of_ours_is_there(site: Site) -> None:
    elsewhere = site.instance.paths.pin_dir.with_name(f"{site.instance.paths.pin_dir.name}-none")
    refused = site.lab.host.run(
        *(sys.executable, "-m", "offload", "explain", "--nic", NIC, "--dst", NOBODY),
        *("--pin-dir", str(elsewhere), "--state-dir", str(site.instance.paths.state_dir)),
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "does it run there?" in refused.stderr
    assert not elsewhere.exists()


def test_without_privilege(site: Site) -> None:
    command = [sys.executable, "-m", "offload", "explain", "--nic", NIC, "--dst", NOBODY]
    refused = site.lab.host.run(*AS_NOBODY, *command, *site.instance.options, check=False)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "CAP_BPF is missing" in refused.stderr


def test_three_capabilities_are_enough(site: Site) -> None:
    few = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin,+perfmon"]
    command = [sys.executable, "-m", "offload", "explain", "--json", *site.instance.options]
    for asked in (["--nic", NIC, "--dst", MACS["db1"]], ["--port", "web1", "--dst", MACS["web2"]]):
        shown = site.lab.host.run(*few, *command, *asked).stdout
        assert json.loads(shown)["verdict"] in ("af_xdp", "queue")


def test_a_frame_longer_than_a_page_is_tried_on_xdp(site: Site) -> None:
    view = site.ask(**wire("acc1", vids=STACKED, size=9000))
    assert (view.verdict, counted(view)) == ("drop", ["acc1.vlan_nic"])
