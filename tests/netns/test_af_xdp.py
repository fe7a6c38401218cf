"""Ports with `af_xdp:`: what consumers get and send, and what becomes of frames without one. Needs root.

The NIC is a veth, so its queues' sockets are in copy mode; zero copy is tried in tests/vm.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scapy.all import IP, TCP, UDP, Ether  # type: ignore[attr-defined]

from offload.channels import AS_ON_A_WIRE, INNER
from offload.config import channel_outer
from offload.xsk.bound import RingSizes
from offload.xsk.umem import UmemShape
from tests.instance import Instance
from tests.lab import WIRE_MAC, Lab, Namespace, Stream, Vm, tag, test_frame, wait_until
from tests.netns.consumer import Consumer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DB1, DB2, WEB1 = "02:15:5d:00:00:01", "02:15:5d:00:00:02", "02:15:5d:00:00:03"
BROADCAST = "ff:ff:ff:ff:ff:ff"
NOBODY = "02:15:5d:00:00:99"
FRAMES = 50


def config_of(*, bridge: str = "kernel", vlan: object = None, mode: str = "software") -> dict[str, Any]:
    """Two AF_XDP ports, ``db1`` and ``db2``, and a VM ``web1``, which are all in the same VLANs."""
    mine = {"switch": "ext0", **({"vlan": vlan} if vlan else {})}
    return {
        "version": 1,
        "metrics": None,
        "nics": {"eth1": {}},
        "switches": {"ext0": {"type": "external", "uplink": "eth1", "bridge": bridge}},
        "ports": {
            "db1": {**mine, "mac": DB1, "af_xdp": {"mode": mode}},
            "db2": {**mine, "mac": DB2, "af_xdp": {}},
            "web1": {**mine, "mac": WEB1, "device": "web1"},
        },
    }


@dataclass(frozen=True)
class Site:
    lab: Lab
    instance: Instance
    web1: Vm

    def drops(self, reason: str, port: str = "db1") -> int:
        return int(self.instance.port(port)["counters"]["drops"].get(reason, 0))

    def rx(self, path: str, port: str = "db1") -> int:
        return int(self.instance.port(port)["counters"]["rx"][path]["packets"])

    def from_wire(self, dst: str, count: int = FRAMES, tags: bytes = b"") -> list[bytes]:
        sent = [test_frame(dst, WIRE_MAC, number, tags=tags) for number in range(count)]
        self.lab.wire.send(self.lab.wire_end, sent)
        return sent


def site_of(config: dict[str, Any]) -> Iterator[Site]:
    with Lab() as lab:
        web1 = lab.vm("web1", WEB1, "192.0.2.13/24")
        with Instance(lab.host, config) as instance:
            instance.start(speaking=[] if config["ports"]["web1"].get("vlan") else [web1])
            yield Site(lab, instance, web1)


@pytest.fixture(scope="module")
def site(privilege: None) -> Iterator[Site]:
    """Untagged ports. Scope: module; tests leave no consumer, and count from where the counters were."""
    yield from site_of(config_of())


@pytest.fixture
def own_site(privilege: None) -> Iterator[Site]:
    """The same for one test, which may change it."""
    yield from site_of(config_of())


@pytest.fixture
def hardware(privilege: None) -> Iterator[Site]:
    """The port db1 may have sockets on the NIC's queues. Scope: one test."""
    yield from site_of(config_of(mode="hardware"))


class Inside(Namespace):
    """The namespace of a channel; its name is its path."""

    @property
    def path(self) -> str:
        return self.name


def heard(site: Site, consumer: Consumer, port: str = "db1", mac: str = DB1) -> None:
    consumer.announce(mac)
    site.instance.wait_heard(mac)
    assert site.instance.port(port)["path"] == "af_xdp"


def test_it_is_a_port_like_others_whose_device_is_ours(site: Site) -> None:
    port = site.instance.port("db1")
    assert port["state"] == "active"
    assert port["device"] is None
    [channel] = port["af_xdp"]["channels"]
    assert (channel["kind"], channel["ifname"], channel["queue"]) == ("software", INNER, 0)
    assert channel["zero_copy"] is False
    assert channel["consumer"] is None
    assert Path(channel["map_path"]).exists()
    again = site.instance.cli("plan", str(site.instance.file))
    assert "nothing to change" in again.stdout


def test_its_outer_end_gives_frames_as_on_a_wire(site: Site) -> None:
    told = site.lab.host.run("ethtool", "-k", channel_outer("db1")).stdout
    on = {line.split(":")[0].strip() for line in told.splitlines() if ": on" in line}
    assert not on & set(AS_ON_A_WIRE)


def test_before_it_is_heard_the_bridge_serves_it(own_site: Site) -> None:
    with Consumer(own_site.instance, "db1") as db1, Consumer(own_site.instance, "db2") as db2:
        assert db1.expect(0) == []
        sent = own_site.from_wire(DB1)
        assert db1.expect(FRAMES) == sent
        assert db2.take() == []
    assert own_site.rx("bridge") == FRAMES
    assert own_site.rx("af_xdp") == 0


def test_unicast_from_the_wire_comes_by_xdp_and_to_one_port_only(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1, Consumer(site.instance, "db2") as db2:
        heard(site, db1)
        heard(site, db2, "db2", DB2)
        before = site.rx("af_xdp")
        web1 = site.web1.capture()
        sent = site.from_wire(DB1)
        assert db1.expect(FRAMES) == sent
        assert db2.take() == []
        assert web1.take() == []
        web1.close()
        assert site.rx("af_xdp") == before + FRAMES


def test_a_local_vm_s_frames_come_past_the_bridge(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1:
        heard(site, db1)
        before = site.rx("local")
        sent = [test_frame(DB1, WEB1, number) for number in range(FRAMES)]
        site.web1.send(sent)
        assert db1.expect(FRAMES) == sent
        assert site.rx("local") == before + FRAMES


def test_broadcast_comes_to_every_port(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1, Consumer(site.instance, "db2") as db2:
        heard(site, db1)
        sent = site.from_wire(BROADCAST)
        assert db1.expect(FRAMES) == sent
        assert db2.expect(FRAMES) == sent


def test_what_it_sends_goes_to_vms_and_to_the_wire(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1, site.web1.capture() as web1:
        heard(site, db1)
        with site.lab.wire.capture(site.lab.wire_end) as wire:
            to_vm = [test_frame(WEB1, DB1, number) for number in range(FRAMES)]
            to_wire = [test_frame(WIRE_MAC, DB1, number) for number in range(FRAMES)]
            db1.send(to_vm + to_wire)
            web1.wait_for(FRAMES, wanted=to_vm.__contains__)
            wire.wait_for(FRAMES, wanted=to_wire.__contains__)
            assert web1.take() == to_vm
            assert wire.take() == to_wire


def test_its_guards_hold(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1, site.web1.capture() as web1:
        heard(site, db1)
        before = site.drops("spoofed")
        db1.send([test_frame(WEB1, NOBODY, number) for number in range(FRAMES)])
        wait_until(lambda: site.drops("spoofed") == before + FRAMES, "the frames are counted")
        assert web1.take() == []


def test_without_a_consumer_drops_are_counted_to_the_frame(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1:
        heard(site, db1)
    before = site.drops("no_consumer")
    with Inside(str(site.instance.paths.namespace("db1"))).capture(INNER) as stack:
        site.from_wire(DB1, 1000)
        wait_until(lambda: site.drops("no_consumer") >= before + 1000, "1000 drops")
        assert site.drops("no_consumer") == before + 1000
        assert stack.take() == [], "no network stack sees a VM's frames"


def test_a_consumer_that_comes_back_is_served_again(site: Site) -> None:
    with Consumer(site.instance, "db1") as db1:
        heard(site, db1)
        assert site.instance.port("db1")["af_xdp"]["channels"][0]["consumer"] is not None
    assert site.instance.port("db1")["af_xdp"]["channels"][0]["consumer"] is None
    with Consumer(site.instance, "db1") as db1:
        sent = site.from_wire(DB1)
        assert db1.expect(FRAMES) == sent


def test_a_full_ring_is_counted_as_the_port_s_drop(site: Site) -> None:
    shape, rings = UmemShape(frames=512, chunk_size=4096), RingSizes(rx=64, tx=64)
    with Consumer(site.instance, "db1", shape=shape, rings=rings) as db1:
        heard(site, db1)
        assert db1.expect(0) == []
        before = site.drops("ring_full")
        site.from_wire(DB1, 200)
        wait_until(lambda: site.drops("ring_full") >= before + 136, "136 drops")
        assert len(db1.expect(64)) == 64
        assert site.drops("ring_full") == before + 136


def test_segments_and_checksums_of_a_local_vm_are_made_before_the_socket(site: Site) -> None:
    segments, size = 20, 1000

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setsockopt(socket.SOL_UDP, 103, size)  # UDP_SEGMENT, include/uapi/linux/udp.h
            udp.sendto(bytes(segments * size), ("192.0.2.21", 9))

    site.web1.ns.ip(f"neighbour replace 192.0.2.21 lladdr {DB1} dev eth0")
    with Consumer(site.instance, "db1") as db1:
        heard(site, db1)
        site.web1.ns.call(send)
        found = [Ether(frame) for frame in db1.expect(segments)]
    assert [len(frame[UDP].payload) for frame in found] == [size] * segments
    for frame in found:
        told = frame[UDP].chksum
        del frame[UDP].chksum
        assert Ether(bytes(frame))[UDP].chksum == told


def test_tcp_of_a_local_vm_is_cut_to_the_mtu_before_the_socket(site: Site) -> None:
    """The consumer opens its window wide and answers once, so that the stack sends a long segment."""
    site.web1.ns.ip(f"neighbour replace 192.0.2.21 lladdr {DB1} dev eth0")
    with Consumer(site.instance, "db1") as db1, socket_in(site.web1) as client:
        heard(site, db1)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect(("192.0.2.21", 5001))
        [syn] = [Ether(frame) for frame in db1.expect(1) if TCP in Ether(frame)][:1]
        answer = (
            Ether(dst=WEB1, src=DB1)
            / IP(src="192.0.2.21", dst="192.0.2.13")
            / TCP(
                sport=5001,
                dport=syn[TCP].sport,
                flags="SA",
                seq=1,
                ack=syn[TCP].seq + 1,
                window=65535,
                options=[("MSS", 1460), ("WScale", 4)],
            )
        )
        db1.send([bytes(answer)])
        wait_until(lambda: writable(client), "it is connected")
        client.send(bytes(14_000))
        seen: list[Any] = []

        def all_data() -> bool:
            seen.extend(Ether(frame) for frame in db1.take())
            return sum(len(frame[TCP].payload) for frame in seen if TCP in frame) >= 14_000

        wait_until(all_data, "14000 bytes")
    data = [frame for frame in seen if TCP in frame and len(frame[TCP].payload)]
    assert max(len(frame) for frame in data) <= 1514
    for frame in data:
        told = frame[TCP].chksum
        del frame[TCP].chksum
        assert Ether(bytes(frame))[TCP].chksum == told


def socket_in(vm: Vm) -> socket.socket:
    return vm.ns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))


def writable(connection: socket.socket) -> bool:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0] == 1  # TCP_ESTABLISHED


MODES = {
    # VLAN of the ports, tags on the wire and at the consumer, tags that are not the ports'
    "access": (10, tag(10), b"", tag(20)),
    "trunk": ({"trunk": [10, 20]}, tag(20), tag(20), tag(30)),
    "native": ({"trunk": [10, 20], "native": 20}, tag(20), b"", tag(30)),
}


@pytest.mark.parametrize("mode", MODES)
def test_frames_come_tagged_or_stripped_as_the_mode_says(mode: str, privilege: None) -> None:
    vlan, on_wire, at_consumer, foreign = MODES[mode]
    for site in site_of(config_of(bridge="python", vlan=vlan)):
        with Consumer(site.instance, "db1") as db1:
            for dst, path in ((DB1, "bridge"), (BROADCAST, "bridge"), (DB1, "af_xdp")):
                if path == "af_xdp":
                    db1.announce(DB1, at_consumer)
                    site.instance.wait_heard(DB1)
                before = site.rx(path)
                site.from_wire(dst, tags=foreign)
                site.from_wire(dst, tags=on_wire)
                sent = [test_frame(dst, WIRE_MAC, number, tags=at_consumer) for number in range(FRAMES)]
                assert db1.expect(FRAMES) == sent
                assert site.rx(path) == before + FRAMES


def test_the_host_hears_and_reaches_nothing_of_it(site: Site) -> None:
    inside = site.instance.paths.namespace("db1")
    shown = subprocess.run(
        ["nsenter", f"--net={inside}", "ip", "-o", "address"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == ""


def test_restarting_the_daemon_does_not_interrupt_a_consumer(own_site: Site) -> None:
    instance = own_site.instance
    with Consumer(instance, "db1") as db1:
        heard(own_site, db1)
        with Stream(own_site.lab.wire, own_site.lab.wire_end, DB1, rate=2000) as stream:
            stream.run_on(500)
            instance.stop(signal.SIGKILL)
            stream.run_on(500)
            instance.start()
            stream.run_on(500)
            sent = stream.stop()
        assert len(db1.expect(sent)) == sent
        assert "nothing to change" in instance.cli("plan", str(instance.file)).stdout


def test_a_port_is_added_changed_and_removed_live(own_site: Site) -> None:
    instance = own_site.instance
    mac = "02:15:5d:00:00:07"
    instance.cli("port", "add", "db7", "--switch", "ext0", "--af-xdp", "software", "--mac", mac)
    outer, namespace = channel_outer("db7"), instance.paths.namespace("db7")
    with Consumer(instance, "db7") as db7:
        heard(own_site, db7, "db7", mac)
        sent = own_site.from_wire(mac)
        assert db7.expect(FRAMES) == sent
        instance.cli("port", "set", "db7", "--owner", "nobody")
        pinned = Path(instance.port("db7")["af_xdp"]["channels"][0]["map_path"])
        assert pinned.stat().st_uid == 65534
        sent = own_site.from_wire(mac)
        assert db7.expect(FRAMES) == sent
    instance.cli("port", "remove", "db7")
    assert outer not in own_site.lab.host.ip("-br link")
    assert not namespace.exists()
    assert not pinned.parent.exists()


def test_detach_all_leaves_nothing(own_site: Site) -> None:
    instance = own_site.instance
    namespace = instance.paths.namespace("db1")
    assert namespace.exists()
    instance.cli("detach", "--all")
    assert "-xsk" not in own_site.lab.host.ip("-br link")
    assert not namespace.exists()
    assert not instance.paths.pin_dir.exists()


def test_an_inner_end_that_somebody_deletes_is_made_anew(own_site: Site) -> None:
    own_site.lab.host.ip(f"link delete {channel_outer('db1')}")
    own_site.instance.wait_port("db1", state="active")
    wait_until(
        lambda: "nothing to change" in own_site.instance.cli("plan", str(own_site.instance.file)).stdout,
        "all is as it shall be",
    )
    with Consumer(own_site.instance, "db1") as db1:
        heard(own_site, db1)
        sent = own_site.from_wire(DB1)
        assert db1.expect(FRAMES) == sent


def test_a_device_of_somebody_else_is_left_alone(privilege: None) -> None:
    with Lab() as lab:
        lab.vm("web1", WEB1)
        lab.host.ip(f"link add {channel_outer('db1')} type veth peer name other")
        with Instance(lab.host, config_of()) as instance:
            refused = instance.cli("plan", str(instance.file), check=False)
            assert refused.returncode == 1
            assert "it is not ours" in refused.stderr
        assert channel_outer("db1") in lab.host.ip("-br link")


def test_an_owner_that_does_not_exist_is_refused(own_site: Site) -> None:
    config = config_of()
    config["ports"]["db1"]["af_xdp"] = {"owner": {"user": "no-such-user"}}
    file = own_site.instance.write(config, "other.yaml")
    refused = own_site.instance.cli("apply", str(file), check=False)
    assert refused.returncode == 2
    assert "ports.db1.af_xdp.owner.user: no-such-user: a user of this host" in refused.stderr
    assert own_site.instance.port("db1")["state"] == "active"


def test_zero_copy_that_is_required_and_not_there_is_refused(own_site: Site) -> None:
    config = config_of(mode="hardware")
    config["ports"]["db1"]["af_xdp"]["zero_copy"] = "require"
    file = own_site.instance.write(config, "other.yaml")
    refused = own_site.instance.cli("apply", str(file), check=False)
    assert refused.returncode == 3
    assert "the driver of eth1 has no zero copy" in refused.stderr


# On the NIC's own queues


def test_sockets_on_every_queue_get_the_port_s_frames_and_no_others(hardware: Site) -> None:
    instance = hardware.instance
    with Consumer(instance, "db1") as soft:
        heard(hardware, soft)
        queues = {queue: Consumer(instance, "db1", queue=queue) for queue in range(4)}
        for cpu in (0, 1):
            with Stream(hardware.lab.wire, hardware.lab.wire_end, DB1, rate=2000, cpu=cpu) as stream:
                stream.run_on(500)
                sent = stream.stop()
            got = {queue: len(consumer.take()) for queue, consumer in queues.items()}
            assert sum(got.values()) == sent, got
            assert soft.take() == []
        with hardware.web1.capture() as web1:
            hardware.from_wire(WEB1)
            web1.wait_for(FRAMES)
        assert not any(consumer.take() for consumer in queues.values())
        shown = instance.port("db1")["af_xdp"]
        assert [one["kind"] for one in shown["channels"]] == ["hardware"] * 4 + ["software"]
        assert all(one["consumer"] for one in shown["channels"])
        for consumer in queues.values():
            consumer.close()


def test_killing_the_consumer_of_the_nic_moves_its_frames_without_loss(hardware: Site) -> None:
    """What was handed to its sockets before it died is its own; every other frame comes by the veth pair."""
    instance, lab = hardware.instance, hardware.lab
    sockets = instance.port("db1")["af_xdp"]["channels"][0]["map_path"]
    command = [sys.executable, "-m", "tests.netns.consumer", lab.nic, sockets, "4"]
    with Consumer(instance, "db1") as soft:
        heard(hardware, soft)
        process = subprocess.Popen(
            lab.host.argv(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with Stream(lab.wire, lab.wire_end, DB1, rate=4000) as stream:
                stream.run_on(1000)
                process.kill()
                process.wait(10)
                stream.run_on(1000)
                sent = stream.stop()
        handed = instance.port("db1")["af_xdp"]["handed"]["hardware"]
        assert 0 < handed < sent
        assert len(soft.expect(sent - handed)) == sent - handed
    assert hardware.drops("no_consumer") == 0
    assert hardware.drops("ring_full") == 0
