"""The pinned objects: adopted, replaced under their link, refused when foreign, gone after detach.

Real devices of a laboratory, and a BPF file system of each test's own.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ForeignError, KernelError, UnsupportedError
from offload.kernel.bpf import AttachType, Link, Map, MapType, Program
from offload.kernel.compile import MapSpec, compiled
from offload.kernel.dataplane import Dataplane
from offload.kernel.tc import attach_classic, classic_on, detach_classic
from offload.model import PortRecord
from offload.plan import RUNNING
from tests.bpf.loaded import flat
from tests.lab import TPID_8021AD, WIRE_MAC, Lab, Vm, seq_of, tag, test_frame, wait_until, xdp_pass

MAC = "02:15:5d:00:00:01"


class Host:
    """A laboratory's host namespace with a pin directory: ``dataplane()`` is what one process would hold."""

    def __init__(self, lab: Lab, bpffs: Path, cache: Path) -> None:
        self.lab = lab
        self.pins = bpffs / "v1"
        self.cache = cache
        self.nic = lab.host.ifindex(lab.nic)

    def dataplane(self) -> Dataplane:
        return Dataplane(self.pins, self.cache)

    def do(self, work: Callable[[], Any]) -> Any:
        """``work()`` where the devices are: the kernel looks them up in the caller's namespace."""
        return self.lab.host.call(work)

    def attach(self, dataplane: Dataplane) -> None:
        self.do(lambda: dataplane.attach(self.lab.nic, self.nic, "native"))

    def pinned(self) -> list[str]:
        return sorted(str(path.relative_to(self.pins)) for path in self.pins.rglob("*") if path.is_file())

    def xdp(self, device: str) -> dict[str, Any]:
        """What ``ip`` says of a device's XDP program; empty without one."""
        (shown,) = json.loads(self.lab.host.ip(f"-json -details link show dev {device}"))
        return dict(shown.get("xdp", {}))

    def link(self) -> tuple[int, int]:
        """Ids of the NIC's link and of the program under it."""
        with Link.pinned(self.pins / "nics" / str(self.nic) / "uplink") as link:
            return link.info().id, link.info().prog_id


@pytest.fixture
def host(lab: Lab, bpffs: Path, cache: Path) -> Host:
    """Scope: one test."""
    return Host(lab, bpffs, cache)


@pytest.fixture
def dataplane(host: Host) -> Iterator[Dataplane]:
    """An open data plane with the NIC attached. Scope: one test."""
    with host.dataplane() as opened:
        host.attach(opened)
        yield opened


def record(vm_ifindex: int, **fields: Any) -> PortRecord:
    values: dict[str, Any] = {
        "name": "web1",
        "queue": 1,
        "cpu": None,
        "pvid": 0,
        "flags": RUNNING,
        "max_len": 1514,
        "ifindex": vm_ifindex,
    }
    return PortRecord(**(values | fields))


def vm_with_queue(host: Host, dataplane: Dataplane, **fields: Any) -> Vm:
    """A VM whose frames the NIC hands to it directly."""
    vm = host.lab.vm("web1", mac=MAC)
    vm.ns.run("ethtool", "-K", "eth0", "gro", "on")  # or the veth drops what XDP hands to it
    ifindex = host.lab.host.ifindex("web1")
    host.do(lambda: dataplane.set_port(0, record(ifindex, **fields)))
    dataplane.set_filter(host.nic, MAC, 0, 0)
    return vm


def moved(dataplane: Dataplane) -> dict[str, int]:
    """The counters of port 0 that are not zero."""
    return {name: value for name, value in flat(dataplane.port_counters(1)[0]) if value}


def test_a_second_process_finds_everything(host: Host) -> None:
    port = host.lab.host.ifindex(host.lab.nic)  # any device will do
    with host.dataplane() as first:
        host.attach(first)
        host.do(lambda: first.set_port(3, record(port, name="db1", cpu=1, pvid=10, queue=7)))
        first.set_filter(host.nic, MAC, 10, 3)
        first.set_queue_cpu(host.nic, 1, 512)
        host.do(lambda: first.set_guard(host.lab.nic, host.nic, 3, 10))
        program_ids = first.program_ids()
    with host.dataplane() as second:
        assert second.uplinks() == {host.nic: second.digest}
        assert second.program_ids() == program_ids
        assert second.ports() == {3: record(port, name="db1", cpu=1, pvid=10, queue=7)}
        assert list(second.filters(host.nic)) == [(MAC, 10, 3)]
        assert second.queue_cpus(host.nic) == {1: 512}
        assert host.do(second.guards) == {host.nic: (3, 10, second.guard_digest)}


def test_closing_changes_nothing(host: Host) -> None:
    with host.dataplane() as opened:
        host.attach(opened)
        before = host.pinned()
    assert host.pinned() == before
    assert host.xdp(host.lab.nic)["prog"]["id"] == host.link()[1]


@pytest.mark.parametrize("name", ["ports", "port_counters", "names", "guards"])
def test_a_map_of_another_shape_is_refused(host: Host, name: str) -> None:
    """Left by another version. Nothing of it is touched."""
    pin = host.pins / "maps" / name
    with Map.create("other", MapSpec(MapType.ARRAY, 4, 24, 100, 0, None, None)) as other:
        other.pin(pin)
    with pytest.raises(ForeignError) as raised:
        host.dataplane().open()
    said = str(raised.value)
    assert str(pin) in said
    assert "(2, 4, 24, 100)" in said
    assert "offload detach --all" in said
    with Map.pinned(pin) as still:
        assert still.shape().value_size == 24


def test_a_program_where_a_map_should_be_is_refused(host: Host) -> None:
    artifact = compiled("guard.c", {"MAX_PORTS": 16}, host.cache)
    maps = {name: Map.create(name, spec) for name, spec in artifact.maps.items()}
    with Program.load("guard", artifact.programs["guard"], maps, AttachType.NONE, frags=False) as program:
        program.pin(host.pins / "maps" / "ports")
    for opened in maps.values():
        opened.close()
    with pytest.raises(ForeignError, match="not of this version"):
        host.dataplane().open()


def test_a_new_program_comes_under_the_same_link(host: Host, dataplane: Dataplane) -> None:
    dataplane.set_filter(host.nic, MAC, 0, 5)
    dataplane.set_queue_cpu(host.nic, 1, 512)
    link, program = host.link()
    host.attach(dataplane)
    assert host.link()[0] == link
    assert host.link()[1] != program
    assert dataplane.program_ids() == {host.nic: host.link()[1]}
    assert list(dataplane.filters(host.nic)) == [(MAC, 0, 5)]
    assert dataplane.queue_cpus(host.nic) == {1: 512}
    with Program.pinned(host.pins / "nics" / str(host.nic) / "queue_program") as queue:
        served_by = dataplane.nic(host.nic).maps["cpus"].lookup((1).to_bytes(4, "little"), 8)
        assert served_by is not None
        assert int.from_bytes(served_by[4:], "little") == queue.info().id


def test_replacing_loses_no_frame(host: Host, dataplane: Dataplane) -> None:
    """And none takes the other path, which would show as a frame that the host's stack saw."""
    vm = vm_with_queue(host, dataplane)
    count = 50_000
    frames = [test_frame(MAC, WIRE_MAC, seq=number) for number in range(count)]
    with vm.capture() as seen, host.lab.host.capture(host.lab.nic) as passed:
        sender = threading.Thread(target=host.lab.wire.send, args=(host.lab.wire_end, frames))
        sender.start()
        replaced = 0
        while sender.is_alive():
            host.attach(dataplane)
            replaced += 1
        sender.join()
        assert [seq_of(frame) for frame in seen.wait_for(count)] == list(range(count))
        assert passed.frames() == []
    assert replaced > 5
    assert moved(dataplane) == {"direct.packets": count, "direct.bytes": 60 * count}


def test_a_queue_with_a_cpu_of_its_own(host: Host, dataplane: Dataplane, cpus: tuple[int, int]) -> None:
    """Counted where the NIC's frame was sent on, and again where it was handed over."""
    nic_cpu, queue_cpu = cpus
    vm = vm_with_queue(host, dataplane, cpu=queue_cpu)
    dataplane.set_queue_cpu(host.nic, queue_cpu, 512)
    frames = [test_frame(MAC, WIRE_MAC, seq=number, tags=tag(0)) for number in range(100)]

    def send() -> None:
        os.sched_setaffinity(0, {nic_cpu})  # a veth's receiving end runs on the sender's CPU
        host.lab.wire.send(host.lab.wire_end, frames)

    thread = threading.Thread(target=send)
    with vm.capture() as seen:
        thread.start()
        thread.join()
        received = seen.wait_for(100)
    assert received == [test_frame(MAC, WIRE_MAC, seq=number) for number in range(100)]
    assert moved(dataplane) == {
        "queued.packets": 100,
        "queued.bytes": 6400,
        "handed.packets": 100,
        "handed.bytes": 6400,
    }


def test_detach_leaves_nothing_of_the_nic(host: Host, dataplane: Dataplane) -> None:
    host.do(lambda: dataplane.detach(host.nic))
    assert host.pinned() == [
        f"maps/{name}" for name in ("devices", "guards", "names", "port_counters", "ports")
    ]
    assert host.xdp(host.lab.nic) == {}
    assert dataplane.uplinks() == {}
    frame = test_frame(MAC, WIRE_MAC)
    with host.lab.host.capture(host.lab.nic) as passed:
        host.lab.wire.send(host.lab.wire_end, [frame])
        assert passed.wait_for(1) == [frame]


def test_a_nic_that_has_gone_is_not_ours_any_more(host: Host, dataplane: Dataplane) -> None:
    host.lab.host.ip(f"link delete {host.lab.nic}")
    assert dataplane.uplinks() == {}
    dataplane.detach(host.nic)
    assert not (host.pins / "nics" / str(host.nic)).exists()


def test_a_foreign_program_stays(host: Host) -> None:
    foreign = xdp_pass(host.lab.host, host.lab.nic)
    with host.dataplane() as opened:
        open_files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ForeignError, match=f"{host.lab.nic} has an XDP program that is not ours"):
            host.attach(opened)
        assert len(os.listdir("/proc/self/fd")) == open_files
        assert opened.uplinks() == {}
    assert host.xdp(host.lab.nic)["prog"]["id"] == foreign
    assert not any(path.startswith("nics/") for path in host.pinned())


def test_generic_mode_is_what_it_says(host: Host) -> None:
    with host.dataplane() as opened:
        host.do(lambda: opened.attach(host.lab.nic, host.nic, "generic"))
        assert host.xdp(host.lab.nic)["mode"] == 2  # XDP_ATTACHED_SKB


def test_no_silent_fall_back_to_generic(host: Host) -> None:
    host.lab.host.ip("link add br0 type bridge")
    with host.dataplane() as opened:
        with pytest.raises(UnsupportedError, match="xdp_mode: generic"):
            host.do(lambda: opened.attach("br0", host.lab.host.ifindex("br0"), "native"))
        assert host.xdp("br0") == {}


def test_a_device_that_is_not_there(host: Host) -> None:
    with host.dataplane() as opened, pytest.raises(KernelError, match="eth9: the device has gone"):
        host.do(lambda: opened.attach("eth9", 9999, "native"))


def test_a_freed_port_leaves_no_name_no_device_and_no_counts(host: Host, dataplane: Dataplane) -> None:
    vm = vm_with_queue(host, dataplane)
    with vm.capture() as seen:
        host.lab.wire.send(host.lab.wire_end, [test_frame(MAC, WIRE_MAC)])
        seen.wait_for(1)
    assert moved(dataplane) == {"direct.packets": 1, "direct.bytes": 60}
    dataplane.set_filter(host.nic, MAC, 0, None)
    dataplane.set_port(0, None)
    assert (dataplane.ports(), list(dataplane.filters(host.nic)), moved(dataplane)) == ({}, [], {})


@pytest.fixture
def bridged_vm(host: Host) -> Vm:
    """A VM whose frames the NIC's bridge brings: tags stand beside the frame, not in it. Scope: one test."""
    vm = host.lab.vm("web1", mac=MAC)
    host.lab.host.ip("link add br0 type bridge mcast_snooping 0")  # it would talk by itself
    host.lab.host.ip(f"link set {host.lab.nic} master br0")
    host.lab.host.ip("link set web1 master br0")
    host.lab.host.ip("link set br0 up")
    return vm


AD0, AD10 = (tag(vid, tpid=TPID_8021AD) for vid in (0, 10))

BESIDE = [
    pytest.param(0, b"", True, id="untagged port, untagged"),
    pytest.param(0, tag(0), True, id="untagged port, VID 0"),
    pytest.param(0, tag(0, 7, 1), True, id="untagged port, VID 0 with PCP and DEI"),
    pytest.param(0, tag(1), False, id="untagged port, VID 1"),
    pytest.param(0, tag(10), False, id="untagged port, VID 10"),
    pytest.param(0, AD0, False, id="untagged port, 802.1ad with VID 0"),
    pytest.param(0, AD10, False, id="untagged port, 802.1ad"),
    pytest.param(0, tag(0) + tag(10), False, id="untagged port, VID 0 over VID 10"),
    pytest.param(0, tag(0) + AD10, False, id="untagged port, VID 0 over 802.1ad"),
    pytest.param(10, tag(10), True, id="VLAN port, its VID"),
    pytest.param(10, b"", False, id="VLAN port, untagged"),
    pytest.param(10, tag(0), False, id="VLAN port, VID 0"),
    pytest.param(10, tag(20), False, id="VLAN port, another VID"),
    pytest.param(10, AD10, False, id="VLAN port, 802.1ad with its VID"),
    pytest.param(10, tag(10) + tag(20), False, id="VLAN port, its VID over another tag"),
]


@pytest.mark.parametrize(("pvid", "tags", "admitted"), BESIDE)
def test_the_guard_behind_a_bridge(
    host: Host, bridged_vm: Vm, pvid: int, tags: bytes, admitted: bool
) -> None:
    """Unicast and broadcast from the wire. What is admitted reaches the VM without a tag."""
    port = host.lab.host.ifindex("web1")
    with host.dataplane() as opened, bridged_vm.capture() as seen:
        host.do(lambda: opened.set_guard("web1", port, 0, pvid))
        sent = [test_frame(dst, WIRE_MAC, tags=tags) for dst in (MAC, "ff:ff:ff:ff:ff:ff")]
        host.lab.wire.send(host.lab.wire_end, sent)
        wait_until(lambda: sum(moved(opened).values()) > 1, "the guard counts two frames")
        if admitted:
            wanted = [frame[:12] + frame[12 + len(tags) :] for frame in sent]
            assert seen.wait_for(2) == wanted
            length = sum(map(len, wanted))
            assert moved(opened) == {"bridged.packets": 2, "bridged.bytes": length}
        else:
            seen.assert_silent()
            assert moved(opened) == {"vlan_bridge": 2}


def test_a_guard_that_is_cleared_lets_everything_through(host: Host, bridged_vm: Vm) -> None:
    port = host.lab.host.ifindex("web1")
    frame = test_frame(MAC, WIRE_MAC, tags=tag(10))
    with host.dataplane() as opened, bridged_vm.capture() as seen:
        host.do(lambda: opened.set_guard("web1", port, 0, 0))
        assert host.do(opened.guards) == {port: (0, 0, opened.guard_digest)}
        host.do(lambda: opened.clear_guard(port))
        assert not [pin for pin in host.pinned() if pin.startswith(f"guards/{port}")]
        assert host.do(opened.guards) == {}
        host.lab.wire.send(host.lab.wire_end, [frame])
        assert seen.wait_for(1) == [frame]


def guard_attachment(host: Host, port: int) -> tuple[int, int]:
    """Ids of the tcx link (0 before Linux 6.6: a filter) and of the program that guards ``web1``."""
    for pin in (host.pins / "guards").glob(f"{port}-*"):
        with Link.pinned(pin) as link:
            return link.info().id, link.info().prog_id
    shown = json.loads(host.lab.host.run("tc", "-json", "filter", "show", "dev", "web1", "egress").stdout)
    (program,) = [found["options"]["prog"]["id"] for found in shown if "options" in found]
    return 0, program


def test_a_guard_s_vlan_changes_in_place(host: Host, bridged_vm: Vm) -> None:
    port = host.lab.host.ifindex("web1")
    with host.dataplane() as opened:
        host.do(lambda: opened.set_guard("web1", port, 0, 0))
        before = guard_attachment(host, port)
        host.do(lambda: opened.set_guard("web1", port, 4, 20))
        assert guard_attachment(host, port) == before
        assert host.do(opened.guards) == {port: (4, 20, opened.guard_digest)}


def test_the_guard_of_another_version_is_replaced_in_place(host: Host, bridged_vm: Vm) -> None:
    port = host.lab.host.ifindex("web1")
    with host.dataplane() as older:
        host.attach(older)  # while a NIC is held, closing keeps the pins
        older.guard = replace(older.guard, digest="older")
        host.do(lambda: older.set_guard("web1", port, 0, 0))
        before = guard_attachment(host, port)
    with host.dataplane() as opened:
        assert host.do(opened.guards) == {port: (0, 0, "older")}
        host.do(lambda: opened.set_guard("web1", port, 0, 0))
        assert host.do(opened.guards) == {port: (0, 0, opened.guard_digest)}
        after = guard_attachment(host, port)
        assert after[0] == before[0]
        assert after[1] != before[1]


def test_the_classic_filter_of_older_kernels(host: Host, bridged_vm: Vm) -> None:
    """Guards the same, is found again, and goes without taking anybody else's filter along."""
    port = host.lab.host.ifindex("web1")
    spec = compiled("guard.c", {"MAX_PORTS": 16}, host.cache)
    maps = {name: Map.create(name, each) for name, each in spec.maps.items()}
    maps["guards"].update(port.to_bytes(4, "little"), bytes(8))
    frame = test_frame(MAC, WIRE_MAC, tags=tag(10))
    with Program.load("guard", spec.programs["guard"], maps, AttachType.NONE, frags=False) as program:
        host.do(lambda: attach_classic("web1", port, program.fd, "d1"))
    for opened in maps.values():
        opened.close()
    assert host.do(lambda: classic_on(port)) == "d1"
    with bridged_vm.capture() as seen:
        host.lab.wire.send(host.lab.wire_end, [frame])
        seen.assert_silent()
        foreign = "filter add dev web1 egress prio 9 protocol all u32 match u32 0 0 flowid :1"
        host.lab.host.run("tc", *foreign.split())
        host.do(lambda: detach_classic(port))
        host.do(lambda: detach_classic(port))
        assert host.do(lambda: classic_on(port)) is None
        assert "pref 9" in host.lab.host.run("tc", "filter", "show", "dev", "web1", "egress").stdout
        host.lab.wire.send(host.lab.wire_end, [frame])
        assert seen.wait_for(1) == [frame]
