"""The pinned objects: adopted, replaced under their link, refused when foreign, gone after detach.

Real devices of a laboratory, and a BPF file system of each test's own.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ForeignError, KernelError, UnsupportedError
from offload.kernel.bpf import AttachType, Link, Map, MapType, Program
from offload.kernel.compile import MapSpec, compiled
from offload.kernel.dataplane import ALLOWED, SWITCH_DEFINES, Dataplane
from offload.model import MemberRow, NetworkRow, PortRecord, StationRow
from offload.plan import RUNNING
from tests.bpf.loaded import flat
from tests.lab import WIRE_MAC, Lab, Vm, seq_of, tag, test_frame, xdp_pass

MAC = "02:15:5d:00:00:01"


class Host:
    """A laboratory's host namespace with a pin directory."""

    def __init__(self, lab: Lab, bpffs: Path, cache: Path) -> None:
        self.lab = lab
        self.pins = bpffs / "v4"
        self.cache = cache
        self.nic = lab.host.ifindex(lab.nic)

    @contextmanager
    def dataplane(self) -> Iterator[Dataplane]:
        """What one process in the namespace would hold."""
        with ExitStack() as held:
            yield self.do(lambda: held.enter_context(Dataplane(self.pins, self.cache)))

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


NETWORK = NetworkRow("ext0", uplink=3, conduit=9, untagged=4094, ask_bridge=True)
MEMBER = MemberRow(3, 5, "uplink", pvid=10, bypass=True, allow=frozenset({"dhcp_server"}))
STATION = StationRow(3, 12, "away", moves=4, since=99)


def test_a_second_process_finds_everything(host: Host) -> None:
    port = host.lab.host.ifindex(host.lab.nic)  # any device will do
    with host.dataplane() as first:
        host.attach(first)
        host.do(lambda: first.set_port(3, record(port, name="db1", cpu=1, pvid=10, queue=7)))
        first.set_filter(host.nic, MAC, 10, 3)
        first.set_queue_cpu(host.nic, 1, 512)
        first.set_network(5, NETWORK)
        host.do(lambda: first.set_member(host.lab.nic, host.nic, MEMBER))
        first.set_trunk(3, frozenset({1, 63, 64, 4094}))
        first.set_station(5, MAC, 10, STATION)
        program_ids = first.program_ids()
    with host.dataplane() as second:
        assert second.uplinks() == {host.nic: second.digest}
        assert second.program_ids() == program_ids
        assert second.ports() == {3: record(port, name="db1", cpu=1, pvid=10, queue=7)}
        assert list(second.filters(host.nic)) == [(MAC, 10, 3)]
        assert second.queue_cpus(host.nic) == {1: 512}
        assert second.networks() == {5: NETWORK}
        assert host.do(second.members) == {host.nic: (MEMBER, second.switch_digest)}
        assert second.trunks() == {3: frozenset({1, 63, 64, 4094})}
        assert second.stations() == {(5, MAC, 10): STATION}


def test_closing_changes_nothing(host: Host) -> None:
    with host.dataplane() as opened:
        host.attach(opened)
        before = host.pinned()
    assert host.pinned() == before
    assert host.xdp(host.lab.nic)["prog"]["id"] == host.link()[1]


@pytest.mark.parametrize("name", ["ports", "port_counters", "names", "members", "stations"])
def test_a_map_of_another_shape_is_refused(host: Host, name: str) -> None:
    """Left by another version. Nothing of it is touched."""
    pin = host.pins / "maps" / name
    with Map.create("other", MapSpec(MapType.ARRAY, 4, 24, 100, 0, None, None)) as other:
        other.pin(pin)
    with pytest.raises(ForeignError) as raised, host.dataplane():
        pass
    said = str(raised.value)
    assert str(pin) in said
    assert "(2, 4, 24, 100)" in said
    assert "offload detach --all" in said
    with Map.pinned(pin) as still:
        assert still.shape().value_size == 24


def test_a_program_where_a_map_should_be_is_refused(host: Host) -> None:
    silence = compiled("switch.c", SWITCH_DEFINES, host.cache).programs["silence"]
    with Program.load("silence", silence, {}, AttachType.NONE, frags=False) as program:
        program.pin(host.pins / "maps" / "ports")
    with pytest.raises(ForeignError, match="not of this version"), host.dataplane():
        pass


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
    assert not [path for path in host.pinned() if not path.startswith("maps/")]
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


def test_rows_of_every_kind_come_back(host: Host) -> None:
    """What can be written, and what the programs read for nothing."""
    with host.dataplane() as opened:
        rows = [
            MemberRow(1, 0, "port"),
            MemberRow(2, 0, "port", pvid=7, trunk=True),
            MemberRow(3, 0, "host", pvid=None, trunk=True, bypass=True),
            MemberRow(0, 0, "conduit"),
            MemberRow(0, 0, "silent", allow=frozenset(ALLOWED)),
        ]
        for row in rows:
            host.do(lambda row=row: opened.set_member(host.lab.nic, host.nic, row))  # type: ignore[misc]
            assert host.do(opened.members) == {host.nic: (row, opened.switch_digest)}
        host.do(lambda: opened.clear_member(host.nic))
        alone = NetworkRow("prv0", None, 0, 0, False)
        opened.set_network(0, alone)
        opened.set_network(1_023, alone)
        assert opened.networks() == {0: alone, 1_023: alone}
        opened.set_network(0, None)
        opened.set_network(1_023, None)
        assert opened.networks() == {}


def test_thousands_of_stations(host: Host) -> None:
    """More than one batch holds; those that were taken away are not among them."""
    with host.dataplane() as opened:
        rows = {
            (number % 3, f"02:15:5d:00:{number >> 8:02x}:{number & 255:02x}", number % 4095): StationRow(
                number, 1
            )
            for number in range(3_000)
        }
        for key, row in rows.items():
            opened.set_station(*key, row)
        assert opened.stations() == rows
        for key in list(rows)[::2]:
            opened.set_station(*key, None)
            del rows[key]
        assert opened.stations() == rows


def test_a_switch_keeps_its_pins(host: Host) -> None:
    """Without any NIC: a private network's frames go on when the daemon ends."""
    with host.dataplane() as opened:
        opened.set_network(5, NETWORK)
    with host.dataplane() as opened:
        assert opened.networks() == {5: NETWORK}
        opened.set_network(5, None)
    assert not host.pins.exists()


def test_pins_of_another_version_are_refused(host: Host) -> None:
    """Its programs are still attached. Nothing of it is touched, and nothing of ours is made."""
    other = host.pins.parent / "v1"
    with Map.create("ports", MapSpec(MapType.ARRAY, 4, 24, 100, 0, None, None)) as left:
        left.pin(other / "maps" / "ports")
    with pytest.raises(ForeignError, match=f"{other} is of another version of offload.*detach --all"):
        Dataplane(host.pins, host.cache).open()
    assert (other / "maps" / "ports").exists()
    assert not host.pins.exists()
