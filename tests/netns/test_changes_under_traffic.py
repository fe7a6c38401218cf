"""Changes while frames are under way: none is lost that can be carried, none goes astray. Needs root.

A stream of numbered frames runs while a port moves, a device comes and goes, or the daemon dies.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from offload.kernel.bpf import Link
from offload.kernel.dataplane import Dataplane
from offload.kernel.netdev import redirects_frags
from tests.instance import Instance, config_of, vms_of
from tests.lab import WIRE_MAC, Lab, Stream, Vm, seq_of, test_frame, wait_until

pytestmark = pytest.mark.slow

MAC = "02:15:5d:00:00:01"
PLACES = {"other CPU": 1, "nic": "nic"}
"""Where the queues are served while the stream comes in on CPU 0."""


@dataclass(frozen=True)
class Running:
    """A daemon with two VMs, web1 and web2."""

    lab: Lab
    instance: Instance
    vms: Mapping[str, Vm]

    @contextlib.contextmanager
    def stream(self) -> Iterator[Stream]:
        """Frames to web1. At the end every one has arrived once, and web2 has got nothing."""
        with self.vms["web1"].capture() as seen, self.vms["web2"].capture() as other:
            with Stream(self.lab.wire, self.lab.wire_end, MAC) as stream:
                stream.run_on(50)
                yield stream
                stream.run_on(50)
            arrived = sorted(seq_of(frame) or 0 for frame in seen.wait_for(stream.sent))
            assert arrived == list(range(stream.sent))
            other.assert_silent()

    def attachment(self) -> tuple[int, int]:
        """Ids of the NIC's XDP link and program."""
        pins = self.instance.paths.objects / "nics" / str(self.lab.host.ifindex(self.lab.nic))
        with Link.pinned(pins / "uplink") as link:
            info = link.info()
        return info.id, info.prog_id


@pytest.fixture
def run(privilege: None) -> Iterator[Callable[..., Running]]:
    """Start a daemon: ``run(cpu=1)`` gives both ports that ``cpu``. Both VMs are heard. Scope: one test."""
    with contextlib.ExitStack() as stack:

        def start(**port: object) -> Running:
            lab = stack.enter_context(Lab())
            vms = vms_of(lab, 2)
            config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()}, **port)
            instance = stack.enter_context(Instance(lab.host, config))
            return Running(lab, instance.start(speaking=vms.values()), vms)

        yield start


def rx(port: Mapping[str, Any], path: str) -> int:
    return int(port["counters"]["rx"][path]["packets"])


# A port's queue


def test_a_queue_moves_between_cpus_without_loss(run: Callable[..., Running]) -> None:
    running = run(cpu="nic")
    instance = running.instance
    config = json.loads(instance.file.read_text())
    del config["ports"]["web1"]
    instance.cli("apply", str(instance.write(config)))
    instance.cli("port", "add", "web1", "--switch", "ext0", "--device", "web1", "--mac", MAC, "--cpu", "0")
    instance.hear(running.vms["web1"])
    with running.stream() as stream:
        for cpu in ("1", "0", "nic", "1", "nic"):
            instance.cli("port", "set", "web1", "--cpu", cpu)
            stream.run_on(50)
            before = by_cpu(running, "web1")
            stream.run_on(50)
            wanted = {("queued", 0), ("handed", 1)} if cpu == "1" else {("direct", 0)}
            after = by_cpu(running, "web1")
            assert {place for place in after if after[place] > before[place]} == wanted, cpu
    port = instance.port("web1")
    assert port["counters"]["drops"] == {}
    assert rx(port, "queue") + rx(port, "bridge") == stream.sent


def by_cpu(running: Running, name: str) -> dict[tuple[str, int], int]:
    """Packets of a port by counter and CPU."""
    return {
        (kind, cpu): values[kind]["packets"]
        for cpu, values in enumerate(running.instance.per_cpu(name))
        for kind in ("direct", "queued", "handed", "returned", "bridged")
    }


@pytest.mark.parametrize("cpu", PLACES.values(), ids=PLACES.keys())
def test_a_queue_is_given_up_and_taken_again_without_loss(run: Callable[..., Running], cpu: object) -> None:
    running = run(cpu=cpu)
    instance = running.instance
    config = json.loads(instance.file.read_text())
    config["ports"]["web1"]["queue"] = "off"
    off = instance.write(config, "off.yaml")
    with running.stream() as stream:
        for _ in range(3):
            instance.cli("apply", str(off))
            stream.run_on(50)
            instance.cli("apply", str(instance.file))
            stream.run_on(50)
    port = instance.port("web1")
    assert port["path"] == "queue"
    assert rx(port, "queue") + rx(port, "bridge") == stream.sent
    assert port["counters"]["drops"] == {}  # what waited for the other CPU meanwhile was not lost


# Devices


@pytest.mark.parametrize("cpu", PLACES.values(), ids=PLACES.keys())
def test_a_veth_made_anew_under_traffic_comes_back(run: Callable[..., Running], cpu: object) -> None:
    running = run(cpu=cpu)
    lab, instance, vm = running.lab, running.instance, running.vms["web1"]
    with running.vms["web2"].capture() as other, Stream(lab.wire, lab.wire_end, MAC) as stream:
        stream.run_on(50)
        lab.unplug(vm)
        instance.wait_port("web1", state="waiting", path="bridge", reason="there is no device web1 yet")
        stream.run_on(100)
        lab.plug(vm)
        instance.wait_port("web1", 2, state="active", path="bridge")
        with vm.capture() as seen:
            seen.wait_for(100)
            vm.announce()
            instance.wait_port("web1", 2, state="active", path="queue", reason=None)
            seen.wait_for(len(seen.frames()) + 100)
        stream.stop()
        other.assert_silent()
    assert_all_counted(instance, "web1", stream.sent)
    missed = instance.json("nics")[0]["default_queue"]
    assert missed["no_filter"] >= 200  # when the daemon knew, and until the new device was heard


@pytest.mark.parametrize("cpu", PLACES.values(), ids=PLACES.keys())
def test_a_tap_made_anew_under_traffic_comes_back(run: Callable[..., Running], cpu: object) -> None:
    running = run(cpu=cpu)
    lab, instance = running.lab, running.instance
    mac = "02:15:5d:00:00:03"
    config = json.loads(instance.file.read_text())
    config["ports"]["tap1"] = {"switch": "ext0", "device": "tap1", "mac": mac, "cpu": cpu}
    instance.cli("apply", str(instance.write(config)))
    assert instance.port("tap1")["state"] == "waiting"
    tap = lab.tap("tap1")
    instance.wait_port("tap1", 2, state="active")
    tap.announce(mac)
    instance.wait_port("tap1", 2, path="queue")
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(vm.capture()) for vm in running.vms.values()]
        stream = stack.enter_context(Stream(lab.wire, lab.wire_end, mac))
        tap.wait_for(50)
        tap.close()
        instance.wait_port("tap1", state="waiting", path="bridge")
        stream.run_on(100)
        tap = lab.tap("tap1")
        instance.wait_port("tap1", 2, state="active", path="bridge")
        tap.wait_for(100)
        tap.announce(mac)
        instance.wait_port("tap1", 2, state="active", path="queue", reason=None)
        tap.wait_for(len(tap.frames()) + 100)
        stream.stop()
        for other in others:
            other.assert_silent()
    assert_all_counted(instance, "tap1", stream.sent)


def assert_all_counted(instance: Instance, name: str, sent: int) -> None:
    """Each frame was sorted into the port's queue or into the default queue, once."""
    queues = {tuple(queue["ports"]): queue for queue in instance.json("queues")}
    default = next(queue for queue in queues.values() if queue["id"] == 0)
    assert queues[(name,)]["packets"] + default["packets"] == sent


@pytest.mark.parametrize("end", ["outer", "inner"])
def test_a_port_whose_device_goes_down_pauses(run: Callable[..., Running], end: str) -> None:
    running = run(cpu=1)
    lab, instance, vm = running.lab, running.instance, running.vms["web1"]
    ns, device = (lab.host, "web1") if end == "outer" else (vm.ns, "eth0")
    why = "web1 is down" if end == "outer" else "the other end of web1 is down"
    with running.vms["web2"].capture() as other, Stream(lab.wire, lab.wire_end, MAC) as stream:
        stream.run_on(50)
        ns.ip(f"link set {device} down")
        port = instance.wait_port("web1", state="paused", path="bridge", reason=why)
        assert port["queue"]["state"] == "paused"
        stream.run_on(50)
        ns.ip(f"link set {device} up")
        instance.wait_port("web1", state="active", path="queue", reason=None)
        with vm.capture() as seen:
            seen.wait_for(100)
        stream.stop()
        other.assert_silent()
    assert_all_counted(instance, "web1", stream.sent)
    assert instance.json("nics")[0]["default_queue"]["paused"] >= 50


def test_a_nic_made_anew_is_taken_again(make_lab: Callable[..., Lab]) -> None:
    """Its ports wait on the bridge meanwhile. No error is logged: a device may go at any moment."""
    lab = make_lab()
    vms = vms_of(lab, 2)
    with Instance(lab.host, config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})) as instance:
        instance.start(speaking=vms.values())
        lab.host.ip(f"link del {lab.nic}")
        port = instance.wait_port("web1", path="bridge", queue=None)
        assert port["reason"] == "its switch has no NIC that could sort frames"
        assert instance.json("nics")[0]["problems"] == [f"{lab.nic} is not there"]
        wire = f"peer name {lab.wire_end} netns {lab.wire.name}"
        lab.host.ip(f"link add {lab.nic} numrxqueues 4 numtxqueues 4 type veth {wire}")
        lab.wire.ip(f"link set {lab.wire_end} up")
        instance.wait_port("web1", path="queue", reason=None)
        with vms["web1"].capture() as right, vms["web2"].capture() as wrong:
            lab.wire.send(lab.wire_end, [test_frame(vms["web1"].mac, WIRE_MAC)])
            right.wait_for(1)
            wrong.assert_silent()
        assert "ERROR" not in instance.log.read_text()


# The daemon


@pytest.mark.parametrize(
    ("cpu", "number"),
    [
        pytest.param(1, signal.SIGKILL, id="killed, other CPU"),
        pytest.param("nic", signal.SIGKILL, id="killed, nic"),
        pytest.param(1, signal.SIGTERM, id="stopped"),
    ],
)
def test_no_frame_is_lost_while_the_daemon_is_dead(
    run: Callable[..., Running], cpu: object, number: signal.Signals
) -> None:
    running = run(cpu=cpu)
    instance = running.instance
    with running.stream() as stream:
        before, attached = instance.port("web1"), running.attachment()
        instance.stop(number)
        stream.run_on(1000)
        assert running.attachment() == attached
        instance.start()
        assert running.attachment() == attached
        after = instance.port("web1")
        assert rx(after, "queue") >= rx(before, "queue") + 1000
        stream.run_on(100)
    port = instance.port("web1")
    assert rx(port, "queue") == stream.sent
    assert port["counters"]["drops"] == {}
    assert instance.log.read_text().count("attach the XDP program") == 1


@pytest.mark.parametrize("cpu", PLACES.values(), ids=PLACES.keys())
def test_another_version_of_the_program_takes_over_between_two_frames(
    run: Callable[..., Running], cpu: object
) -> None:
    running = run(cpu=cpu)
    instance, lab = running.instance, running.lab
    nic = lab.host.ifindex(lab.nic)
    link, program = running.attachment()
    with running.stream() as stream:
        instance.stop()
        lab.host.call(lambda: attach_another_version(instance, lab.nic, nic))
        stream.run_on(50)
        replaced = running.attachment()
        assert (replaced[0], replaced[1] != program) == (link, True)
        instance.start()
        assert running.attachment()[0] == link
        assert running.attachment()[1] not in (program, replaced[1])
        stream.run_on(50)
    port = instance.port("web1")
    assert rx(port, "queue") == stream.sent
    assert port["counters"]["drops"] == {}


def attach_another_version(instance: Instance, nic: str, ifindex: int) -> None:
    """What a daemon of another version does first: its program goes under the link that is there."""
    with Dataplane(instance.paths.objects, instance.paths.cache) as other:
        other.vmq = replace(other.vmq, digest="0" * 64)
        other.attach(nic, ifindex, "native")


@pytest.mark.parametrize("cpu", PLACES.values(), ids=PLACES.keys())
def test_detach_leaves_the_bridge_forwarding(run: Callable[..., Running], cpu: object) -> None:
    """Taking XDP off a veth empties its ring; that is the only loss, and small."""
    running = run(cpu=cpu)
    instance, lab = running.instance, running.lab
    with running.vms["web1"].capture() as seen, running.vms["web2"].capture() as other:
        with Stream(lab.wire, lab.wire_end, MAC) as stream:
            stream.run_on(50)
            instance.cli("detach")
            port = instance.port("web1")
            assert port["path"] == "bridge"
            assert "detached" in port["reason"]
            stream.run_on(100)
            instance.cli("apply", str(instance.file))
            instance.wait_port("web1", path="queue")
            stream.run_on(100)
        wait_until(lambda: seq_of(seen.frames()[-1]) == stream.sent - 1, "the last frame arrives")
        arrived = [seq_of(frame) for frame in seen.frames()]
        other.assert_silent()
    print(f"{stream.sent - len(arrived)} of {stream.sent} frames lost at detach and apply")
    assert len(set(arrived)) == len(arrived)
    assert stream.sent - len(arrived) <= 256
    port = instance.port("web1")
    assert rx(port, "queue") + rx(port, "bridge") == len(arrived)


# Long frames


def test_frames_that_the_target_cannot_take_go_through_the_bridge(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(mtu=9000)
    vms = vms_of(lab, 3)
    macs = {name: vm.mac for name, vm in vms.items()} | {"tap1": "02:15:5d:00:00:0a"}
    tap = lab.tap("tap1", mtu=9000)
    vms["web3"].ns.ip("link set eth0 mtu 1500")
    lab.host.ip("link set web3 mtu 1500")
    config = config_of(lab.nic, macs)
    for name, cpu in {"web1": 0, "web2": 1, "web3": 1, "tap1": 1}.items():
        config["ports"][name]["cpu"] = cpu
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(Instance(lab.host, config)).start(speaking=vms.values())
        tap.announce(macs["tap1"])
        instance.wait_heard(macs["tap1"])
        ears = {name: stack.enter_context(vm.capture()) for name, vm in vms.items()} | {"tap1": tap}
        jumbo = {
            name: [test_frame(mac, WIRE_MAC, size=size) for size in (8000, 9014)]
            for name, mac in macs.items()
        }
        small = {name: [test_frame(mac, WIRE_MAC, size=1514)] for name, mac in macs.items()}
        for name in macs:
            lab.wire.send(lab.wire_end, jumbo[name] + small[name])
        for name in ("web1", "web2", "tap1"):
            assert sorted(ears[name].wait_for(3), key=len) == small[name] + jumbo[name]
        assert ears["web3"].wait_for(1) == small["web3"]
        for name, known in {"web1": 3, "web2": 3, "web3": 1, "tap1": 3}.items():
            assert ears[name].extra(known) == []
        ports = {port["name"]: port for port in instance.json("ports")}
        taken = {name: (rx(port, "queue"), rx(port, "bridge")) for name, port in ports.items()}
        veth, missed = ((3, 0), {"frags": 2, "too_big": 2}) if redirects_frags() else ((1, 2), {"frags": 8})
        assert taken == {"web1": veth, "web2": veth, "web3": (1, 0), "tap1": (1, 2)}
        default = instance.json("nics")[0]["default_queue"]
        assert {reason: count for reason, count in default.items() if count} == missed
