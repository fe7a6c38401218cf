"""The product's BPF objects: programs, maps and attachments, all of them pinned.

The kernel holds the state and the pins keep it; this module only opens, reads and changes
it, so a restarted daemon, or ``offload detach`` without one, finds everything by
looking. Below ``PIN_DIR/v1``::

    netns                                              the network namespace that it is of
    maps/{ports,devices,port_counters,guards,names}    for all NICs
    nics/IFINDEX/{classifier,cpus,nic_counters}        per NIC
    nics/IFINDEX/{uplink_program,queue_program}        as attached
    nics/IFINDEX/uplink                                the XDP link
    guards/IFINDEX-DIGEST                              a port device's tcx link, and its program

A frame's way through them is told in ``bpf/vmq.c``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..classifier import Classifier, filter_key, filter_of
from ..errors import ForeignError, KernelError, OffloadError, UnsupportedError
from ..model import PortRecord, XdpMode
from ..plan import RUNNING
from .abi import Layout
from .bpf import (
    XDP_FLAGS_DRV_MODE,
    XDP_FLAGS_SKB_MODE,
    AttachType,
    Link,
    Map,
    MapShape,
    Program,
    possible_cpus,
)
from .compile import MapSpec, compiled
from .service import claimed
from .tc import attach_classic, classic_on, detach_classic

MAX_PORTS = 16_384
"""Ports of one instance, over all NICs. Costs 104 bytes of counters per port and CPU."""
CPU_OF_NIC = 0xFFFFFFFF

_NAME_BYTES = 64
_NAMES = MapSpec(2, 4, _NAME_BYTES, MAX_PORTS, 0, None, None)  # BPF_MAP_TYPE_ARRAY; for the controller only
_SHARED = ("ports", "devices", "port_counters")
_PER_NIC = ("classifier", "cpus", "nic_counters")
_U32 = struct.Struct("=I")
_DEVICE = struct.Struct("=II")  # struct bpf_devmap_val, bpf_cpumap_val: what, program
_MEMBARRIER = 324  # the system call's number on x86-64
_MEMBARRIER_CMD_GLOBAL = 1


def grace_period() -> None:
    """Return when every BPF program that runs now has ended.

    membarrier(2) with MEMBARRIER_CMD_GLOBAL is synchronize_rcu(), and XDP programs
    are RCU readers (``kernel/sched/membarrier.c``). Takes about 10 ms.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_MEMBARRIER, _MEMBARRIER_CMD_GLOBAL, 0, 0) < 0:
        code = ctypes.get_errno()
        raise KernelError(f"membarrier: {os.strerror(code)} (a kernel booted with nohz_full has none)")


class NicObjects:
    """Maps, programs and the attachment of one NIC. ``close`` leaves all of them in place."""

    def __init__(self, directory: Path, maps: dict[str, Map], programs: dict[str, Program]) -> None:
        self.directory = directory
        self.maps = maps
        self.programs = programs
        self._memory = maps["classifier"].mapped()
        self._words = memoryview(self._memory).cast("Q")
        self.classifier = Classifier(self._words, grace_period)

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        for handle in (*self.maps.values(), *self.programs.values()):
            handle.close()

    @property
    def digest(self) -> str:
        """Of the attached program's sources and flags: the part that fits a program's name."""
        return self.programs["uplink"].info().name.partition("_")[2]


class Dataplane:
    """Everything of ours in the kernel that is BPF, for one pin directory.

    A context manager; leaving it closes the handles and changes nothing. ``keep``
    false is for looking only: what is not pinned yet is not pinned, and nothing is tidied.
    """

    def __init__(self, pins: Path, cache: Path, *, keep: bool = True) -> None:
        self.pins = pins
        self._keep = keep
        self._maps: dict[str, Map] = {}
        self._nics: dict[int, NicObjects] = {}
        self.vmq = compiled("vmq.c", _defines(), cache)
        self.guard = compiled("guard.c", {"MAX_PORTS": MAX_PORTS}, cache)
        self.layouts = {
            name: Layout(spec.value)
            for name, spec in (*self.vmq.maps.items(), *self.guard.maps.items())
            if not isinstance(spec.value, str)
        }
        self._possible_cpus = possible_cpus()
        self._guard_program: Program | None = None
        self._claim = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as claim:
            claim.enter_context(claimed(self.pins, keep=self._keep))
            self.open()
            self._claim = claim.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._claim.close()

    # Opening and closing

    def open(self) -> None:
        """Take over what is pinned; make and pin the shared maps that are not there yet."""
        for name in _SHARED:
            self._maps[name] = self._adopt(self.pins / "maps" / name, name, self.vmq.maps[name])
        self._maps["guards"] = self._adopt(self.pins / "maps/guards", "guards", self.guard.maps["guards"])
        self._maps["names"] = self._adopt(self.pins / "maps/names", "names", _NAMES)
        self._rows = memoryview(self._maps["ports"].mapped())
        for directory in _children(self.pins / "nics"):
            if (directory / "uplink").exists():
                self._nics[int(directory.name)] = self._open_nic(directory)
            elif self._keep:
                shutil.rmtree(directory)  # of an attach that was interrupted

    def forget_gone(self, live: Collection[int]) -> None:
        """Let go of what belonged to devices that are not among the ifindexes ``live``."""
        for ifindex in [ifindex for ifindex in self._nics if ifindex not in live]:
            if self._keep:
                self.detach(ifindex)
            else:
                self._nics.pop(ifindex).close()
        for (ifindex,) in [_U32.unpack(key) for key in self._maps["guards"].all_keys()]:
            if self._keep and ifindex not in live:
                if pin := self._guard_pin(ifindex):
                    pin.unlink()
                self._maps["guards"].delete(_U32.pack(ifindex))

    def close(self) -> None:
        if self._keep and self._maps and not self._nics and not self.ports() and not self.guards():
            self._remove_pins()  # nothing uses them: a start was refused, or everything was taken out
        for nic in self._nics.values():
            nic.close()
        for handle in self._maps.values():
            handle.close()
        if self._guard_program:
            self._guard_program.close()
            self._guard_program = None
        self._nics.clear()
        self._maps.clear()

    def _adopt(self, pin: Path, name: str, spec: MapSpec, max_entries: int | None = None) -> Map:
        try:
            opened = Map.pinned(pin)
        except FileNotFoundError:
            opened = Map.create(name, spec, max_entries)
            if self._keep:
                opened.pin(pin)
            return opened
        wanted = (spec.type, spec.key_size, spec.value_size, max_entries or spec.max_entries)
        shape = opened.shape()
        found = (shape.type, shape.key_size, shape.value_size, shape.max_entries)
        if found != wanted:
            raise ForeignError(
                f"{pin} is not of this version of offload {_differs(shape, wanted)}: "
                "run `offload detach --all` with the version that made it, then start again"
            )
        return opened

    def _open_nic(self, directory: Path) -> NicObjects:
        maps = {
            name: self._adopt(directory / name, name, self.vmq.maps[name], self._entries(name))
            for name in _PER_NIC
        }
        programs = {name: Program.pinned(directory / f"{name}_program") for name in ("uplink", "queue")}
        return NicObjects(directory, maps, programs)

    def _entries(self, map_name: str) -> int | None:
        return self._possible_cpus if map_name == "cpus" else None

    # NICs

    @property
    def digest(self) -> str:
        """What ``NicObjects.digest`` says of a NIC that runs this version's program."""
        return self.vmq.digest[:8]

    def uplinks(self) -> dict[int, str]:
        """Digest of the program on each NIC that we hold, by ifindex. NICs that have gone are left out."""
        found = {}
        for ifindex, nic in self._nics.items():
            with Link.pinned(nic.directory / "uplink") as link:
                if link.info().ifindex == ifindex:
                    found[ifindex] = nic.digest
        return found

    def program_ids(self) -> dict[int, int]:
        """Kernel id of our program on each NIC, by ifindex."""
        return {ifindex: nic.programs["uplink"].info().id for ifindex, nic in self._nics.items()}

    def program(self, ifindex: int) -> tuple[str, str, float | None]:
        """Digest, tag and run time in seconds (where the kernel counts it) of a NIC's program."""
        info = self._nics[ifindex].programs["uplink"].info()
        return self._nics[ifindex].digest, info.tag, info.run_seconds

    def nic(self, ifindex: int) -> NicObjects:
        return self._nics[ifindex]

    def attach(self, device: str, ifindex: int, mode: XdpMode) -> None:
        """Load this version's programs and put them on a NIC. Nothing stays behind when that fails.

        A NIC that has our program gets the new one under the same link, between two frames.
        """
        if ifindex in self._nics:
            if ifindex in self.uplinks():
                self._replace(self._nics[ifindex])
                return
            self.detach(ifindex)  # somebody forced our link off: begin anew
        directory = self.pins / "nics" / str(ifindex)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            maps = {}
            for name in _PER_NIC:
                spec = self.vmq.maps[name]
                maps[name] = self._adopt(directory / name, name, spec, self._entries(name))
                undo.callback(maps[name].close)
            nic = NicObjects(directory, maps, self._load(maps, directory))
            undo.callback(nic.close)
            self._link(nic, device, ifindex, mode)
            undo.pop_all()
        self._nics[ifindex] = nic

    def _load(self, maps: Mapping[str, Map], directory: Path) -> dict[str, Program]:
        programs = {}
        with ExitStack() as undo:
            for name, attach in (("uplink", AttachType.XDP), ("queue", AttachType.XDP_CPUMAP)):
                label = f"{name}_{self.digest}"
                spec = self.vmq.programs[name]
                programs[name] = Program.load(label, spec, {**self._maps, **maps}, attach, frags=True)
                undo.callback(programs[name].close)
                pin = directory / f"{name}_program"
                pin.unlink(missing_ok=True)
                programs[name].pin(pin)
            undo.pop_all()
        return programs

    def _link(self, nic: NicObjects, device: str, ifindex: int, mode: XdpMode) -> None:
        flags = XDP_FLAGS_DRV_MODE if mode == "native" else XDP_FLAGS_SKB_MODE
        doing = f"attach XDP to {device} in {mode} mode"
        try:
            link = Link.create(nic.programs["uplink"], ifindex, AttachType.XDP, flags=flags, doing=doing)
        except OffloadError as error:
            raise _attach_error(error, device, ifindex, mode) from error.__cause__
        with link:
            link.pin(nic.directory / "uplink")

    def _replace(self, nic: NicObjects) -> None:
        old = nic.programs
        nic.programs = self._load(nic.maps, nic.directory)
        with Link.pinned(nic.directory / "uplink") as link:
            link.replace(nic.programs["uplink"])
        ifindex = int(nic.directory.name)
        for cpu, size in self.queue_cpus(ifindex).items():
            self.set_queue_cpu(ifindex, cpu, size)
        for program in old.values():
            program.close()

    def detach(self, ifindex: int) -> None:
        """Take the program off a NIC and its maps away; frames take the default path from then on."""
        nic = self._nics.pop(ifindex)
        _end_link(nic.directory / "uplink")
        nic.close()
        shutil.rmtree(nic.directory)

    # Queue CPUs

    def queue_cpus(self, ifindex: int) -> dict[int, int]:
        """Ring size in frames of every CPU that serves queues of this NIC."""
        found = {}
        cpus = self._nics[ifindex].maps["cpus"]
        for cpu in range(self._possible_cpus):
            if value := cpus.lookup(_U32.pack(cpu), _DEVICE.size):
                found[cpu] = _DEVICE.unpack(value)[0]
        return found

    def queue_map_ids(self) -> set[int]:
        """Kernel ids of the maps that send frames to queue CPUs."""
        return {nic.maps["cpus"].id() for nic in self._nics.values()}

    def set_queue_cpu(self, ifindex: int, cpu: int, size: int | None) -> None:
        """Start or stop a CPU's service; ``size`` is its ring in frames (at most 16,384)."""
        nic = self._nics[ifindex]
        if size is None:
            nic.maps["cpus"].delete(_U32.pack(cpu))
        else:
            nic.maps["cpus"].update(_U32.pack(cpu), _DEVICE.pack(size, nic.programs["queue"].fd))

    # Ports

    def ports(self) -> dict[int, PortRecord]:
        """Every port that has a row, by port id."""
        names = self._maps["names"].read_first(MAX_PORTS, _NAME_BYTES)
        found = {}
        for port_id in range(MAX_PORTS):
            at = port_id * _NAME_BYTES
            if names[at]:
                name = names[at : at + _NAME_BYTES].rstrip(b"\0").decode()
                found[port_id] = self._record(port_id, name)
        return found

    def _record(self, port_id: int, name: str) -> PortRecord:
        layout = self.layouts["ports"]
        row = layout.read(bytes(self._rows[port_id * layout.size : (port_id + 1) * layout.size]))
        device = self._maps["devices"].lookup(_U32.pack(port_id), _DEVICE.size)
        return PortRecord(
            name=name,
            queue=row["queue"],
            cpu=None if row["cpu"] == CPU_OF_NIC else row["cpu"],
            pvid=row["pvid"],
            flags=row["flags"],
            max_len=row["max_len"],
            ifindex=_DEVICE.unpack(device)[0] if device else 0,
        )

    def set_port(self, port_id: int, record: PortRecord | None) -> None:
        """Write a port's row. Its device is there before frames are sent to it, and gone after.

        ``None`` frees the row; the caller has seen to it that no filter names it any more.
        """
        key = _U32.pack(port_id)
        running = record is not None and record.flags & RUNNING and record.ifindex
        if not running:
            self._write_row(port_id, record)
        if record is not None and record.ifindex:
            self._maps["devices"].update(key, _DEVICE.pack(record.ifindex, 0))
        else:
            self._maps["devices"].delete(key)
        if running:
            self._write_row(port_id, record)
        name = record.name.encode() if record else b""
        self._maps["names"].update(key, name.ljust(_NAME_BYTES, b"\0"))
        if record is None:
            self._maps["port_counters"].update(key, bytes(self._counter_bytes("port_counters")))

    def _write_row(self, port_id: int, record: PortRecord | None) -> None:
        layout = self.layouts["ports"]
        row = bytes(layout.size)
        if record is not None:
            row = layout.pack(
                cpu=CPU_OF_NIC if record.cpu is None else record.cpu,
                pvid=record.pvid,
                flags=record.flags,
                ifindex=record.ifindex,
                max_len=record.max_len,
                queue=record.queue,
            )
        # Two words, each stored whole: the program reads them separately.
        words = self._rows.cast("Q")
        first = port_id * layout.size // 8
        # The one with the flags comes last, so that a port runs only when the rest is there.
        for index, (word,) in reversed(list(enumerate(struct.iter_unpack("=Q", row)))):
            words[first + index] = word

    # Filters

    def filters(self, ifindex: int) -> Iterator[tuple[str, int, int]]:
        """MAC, VID and port id of every filter on a NIC."""
        for key, port_id in self._nics[ifindex].classifier:
            yield (*filter_of(key), port_id)

    def set_filter(self, ifindex: int, mac: str, vid: int, port_id: int | None) -> None:
        """Give (MAC, VID) to a port, in one step also when another had it; ``None`` takes it away."""
        classifier = self._nics[ifindex].classifier
        if port_id is None:
            classifier.remove(filter_key(mac, vid))
        else:
            classifier.set(filter_key(mac, vid), port_id)

    # Guards: the tc program at the ports' egress

    @property
    def guard_digest(self) -> str:
        """What ``guards`` says of a device that runs this version's program."""
        return self.guard.digest[:8]

    def guards(self) -> dict[int, tuple[int, int, str]]:
        """``(port id, pvid, digest)`` of every device that has our tc program, by ifindex."""
        layout = self.layouts["guards"]
        found = {}
        for key in self._maps["guards"].all_keys():
            (ifindex,) = _U32.unpack(key)
            value = self._maps["guards"].lookup(key, layout.size)
            if value and (digest := self._guard_on(ifindex)):
                row = layout.read(value)
                found[ifindex] = (row["port"], row["pvid"], digest)
        return found

    def _guard_on(self, ifindex: int) -> str | None:
        """The digest of our tc program on a device, or ``None``."""
        pin = self._guard_pin(ifindex)
        if pin is None:
            return classic_on(ifindex)
        with Link.pinned(pin) as link:
            return pin.name.partition("-")[2] if link.info().ifindex == ifindex else None

    def _guard_pin(self, ifindex: int) -> Path | None:
        return next((self.pins / "guards").glob(f"{ifindex}-*"), None)

    def set_guard(self, device: str, ifindex: int, port_id: int, pvid: int) -> None:
        """Admit to this device only what a port of this VLAN may get (``pvid`` 0: untagged).

        The program of another version that is there is replaced, between two frames.
        """
        value = self.layouts["guards"].pack(port=port_id, pvid=pvid, flags=0)
        self._maps["guards"].update(_U32.pack(ifindex), value)
        digest = self._guard_on(ifindex)
        if digest == self.guard_digest:
            return
        if self._guard_program is None:
            spec = self.guard.programs["guard"]
            self._guard_program = Program.load("guard", spec, self._maps, AttachType.NONE, frags=False)
        program, pin = self._guard_program, self._guard_pin(ifindex)
        wanted = self.pins / "guards" / f"{ifindex}-{self.guard_digest}"
        if digest and pin:
            with Link.pinned(pin) as link:
                link.replace(program)
            pin.rename(wanted)
            return
        if pin:
            pin.unlink()  # of a link that somebody forced off
        doing = f"attach the tc program to {device}"
        try:
            link = Link.create(program, ifindex, AttachType.TCX_EGRESS, doing=doing)
        except OffloadError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
                attach_classic(device, ifindex, program.fd, self.guard_digest)  # before 6.6 there is no tcx
                return
            raise
        with link:
            link.pin(wanted)

    def clear_guard(self, ifindex: int) -> None:
        if pin := self._guard_pin(ifindex):
            _end_link(pin)
        else:
            detach_classic(ifindex)
        self._maps["guards"].delete(_U32.pack(ifindex))

    # Counters

    def port_counters(self, count: int) -> list[dict[str, Any]]:
        """Counters of the first ``count`` ports by id, summed over CPUs, with the fields of ``bpf/abi.h``."""
        if not count:
            return []
        layout = self.layouts["port_counters"]
        size = self._counter_bytes("port_counters")
        raw = self._maps["port_counters"].read_first(count, size)
        return [layout.total(raw[at : at + size]) for at in range(0, len(raw), size)]

    def nic_counters(self, ifindex: int) -> dict[str, Any]:
        """Frames of a NIC that went to the bridge, by reason, summed over CPUs."""
        size = self._counter_bytes("nic_counters")
        raw = self._nics[ifindex].maps["nic_counters"].lookup(_U32.pack(0), size)
        if raw is None:
            raise KernelError("the counters of a NIC are gone")
        return self.layouts["nic_counters"].total(raw)

    def _counter_bytes(self, name: str) -> int:
        return -(-self.layouts[name].size // 8) * 8 * self._possible_cpus

    def remove_everything(self) -> None:
        """Remove every pin of ours. Call when nothing is attached any more."""
        self.close()
        self._remove_pins()

    def _remove_pins(self) -> None:
        shutil.rmtree(self.pins, ignore_errors=True)
        with suppress(OSError):  # somebody else keeps pins there too
            self.pins.parent.rmdir()


def _defines() -> dict[str, int]:
    # cpumaps cannot be larger than the kernel's NR_CPUS: their size is set when they are made.
    return {"MAX_PORTS": MAX_PORTS, "MAX_CPUS": 1, "QUEUE_CPUS": 1}


def _end_link(pin: Path) -> None:
    """Detach and unpin. A link whose device has gone is detached already."""
    with Link.pinned(pin) as link:
        if link.info().ifindex:
            link.detach()
    pin.unlink()


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _differs(shape: MapShape, wanted: tuple[int, ...]) -> str:
    found = (shape.type, shape.key_size, shape.value_size, shape.max_entries)
    return f"(type, key, value, entries: {found}, not {wanted})"


def _attach_error(error: OffloadError, device: str, ifindex: int, mode: XdpMode) -> OffloadError:
    """Say what an operator can do about a device that takes no XDP program."""
    number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    match number:
        case errno.EBUSY | errno.EEXIST:
            return ForeignError(
                f"{device} has an XDP program that is not ours; `offload doctor` tells whose it is"
            )
        case errno.EINVAL if not _is_there(ifindex):
            return KernelError(f"could not attach XDP to {device}: the device has gone")
        case errno.ENOSPC:  # drivers/net/veth.c, veth_xdp_set()
            return UnsupportedError(
                f"{error}: it has fewer RX queues than its other end has TX queues (`ethtool -l`): "
                f"`ethtool -L {device} rx N`, or fewer at the other end"
            )
        case errno.EOPNOTSUPP | errno.EINVAL if mode == "native":
            return UnsupportedError(
                f"{error}: the driver of {device} cannot, or not with its present MTU and queues; "
                f"for slow but certain XDP say `nics.{device}.xdp_mode: generic`"
            )
        case _:
            return error


def _is_there(ifindex: int) -> bool:
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True
