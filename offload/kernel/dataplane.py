"""The product's BPF objects: programs, maps and attachments, all of them pinned.

The kernel holds the state and the pins keep it; this module only opens, reads and changes
it, so a restarted daemon, or ``offload detach`` without one, finds everything by
looking. Below ``PIN_DIR/v4``::

    netns                                              the network namespace that it is of
    maps/{ports,devices,sockets,port_counters,names}   for all NICs and switches
    maps/{ends,members,networks,stations,trunks,news,network_names}    for all switches
    nics/IFINDEX/{classifier,cpus,nic_counters}        per NIC
    nics/IFINDEX/{uplink_program,queue_program}        as attached
    nics/IFINDEX/uplink                                the XDP link
    nics/IFINDEX/functions/IFINDEX/{served,function_counters,program,link}    of a virtual function
    members/IFINDEX/SIDE-PROGRAM-DIGEST                a tcx link on a switch's device
    xsk/PORT/…                                         of an AF_XDP port: see channels.py

A frame's way through them is told in ``bpf/vmq.c`` and ``bpf/switch.c``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..classifier import Classifier, filter_key, filter_of
from ..errors import ForeignError, KernelError, OffloadError, UnsupportedError
from ..model import MemberRow, NetworkRow, News, PortRecord, Role, StationRow, StationState, XdpMode
from ..plan import RUNNING
from .abi import Layout
from .bpf import (
    XDP_FLAGS_DRV_MODE,
    XDP_FLAGS_SKB_MODE,
    AttachType,
    Link,
    Map,
    MapShape,
    MapType,
    Program,
    RingBuffer,
    possible_cpus,
)
from .compile import MapSpec, compiled
from .service import claimed
from .tc import PROGRAMS, TcPrograms

MAX_PORTS = 16_384
"""Ports of one instance, over all switches. Costs 272 bytes of counters per port and CPU."""
MAX_NIC_QUEUES = 128
"""RX queues of a NIC that an AF_XDP port can have sockets on."""
MAX_NETWORKS = 1_024
"""Switches of one instance."""
MAX_STATIONS = 1 << 17
"""Addresses in VLANs, over all ports: a trunk has one per VID."""
CPU_OF_NIC = 0xFFFFFFFF
NO_PORT = 0xFFFFFFFF

ROLES: Mapping[Role, int] = {"port": 1, "host": 2, "uplink": 3, "conduit": 4, "silent": 5, "function": 6}
ALLOWED = {"mac_spoofing": 1, "dhcp_server": 2, "router_advertisement": 4, "link_local_protocols": 8}
MEMBER_TRUNK, MEMBER_NO_NATIVE, MEMBER_BYPASS = 16, 32, 64
STATES: tuple[StationState, ...] = ("expected", "here", "away")
NETWORK_ASK_BRIDGE = 1

_DRAIN_PATIENCE = 0.05
"""Seconds to wait for a moment at which a queue can move without a frame overtaking another."""
_GRO_HOLDS = 0.01
"""Seconds after which GRO has let go of what it was given: it does within a tick of the kernel's."""
_BREATH = 1e-4
"""Seconds between two looks for such a moment while frames wait."""
_NEWS_BYTES = 1 << 16  # 2,048 events; should more wait, the station table has what they would say
SWITCH_DEFINES = {
    "MAX_PORTS": MAX_PORTS,
    "MAX_MEMBERS": 2 * MAX_PORTS,
    "MAX_NETWORKS": MAX_NETWORKS,
    "MAX_STATIONS": MAX_STATIONS,
    "NEWS_BYTES": _NEWS_BYTES,
}
_NAME_BYTES = 64
_NAMES = {"names": MAX_PORTS, "network_names": MAX_NETWORKS}  # for the controller only
_SHARED = ("ports", "devices", "sockets", "port_counters")
_SWITCH = ("ends", "members", "networks", "stations", "trunks", "news")
_PER_NIC = ("classifier", "cpus", "nic_counters")
_PER_FUNCTION = ("served", "function_counters")
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


@dataclass(frozen=True)
class FunctionRow:
    """A virtual function's device: ``nic`` is the ifindex of its NIC, ``port`` the id of whom it serves.

    ``vid`` is that of the tag that the NIC takes off, ``digest`` of the program there.
    """

    nic: int
    port: int | None
    vid: int
    digest: str


class FunctionObjects:
    """Maps and program on a virtual function's device. ``close`` leaves them in place."""

    def __init__(self, directory: Path, maps: dict[str, Map], program: Program) -> None:
        self.directory = directory
        self.maps = maps
        self.program = program

    def close(self) -> None:
        for handle in (*self.maps.values(), self.program):
            handle.close()


class NicObjects:
    """Maps, programs and the attachment of one NIC. ``close`` leaves all of them in place."""

    def __init__(self, directory: Path, maps: dict[str, Map], programs: dict[str, Program]) -> None:
        self.directory = directory
        self.maps = maps
        self.programs = programs
        self.functions: dict[int, FunctionObjects] = {}
        self._memory = maps["classifier"].mapped()
        self._words = memoryview(self._memory).cast("Q")
        self.classifier = Classifier(self._words, grace_period)

    def close(self) -> None:
        for function in self.functions.values():
            function.close()
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
        self.switch = compiled("switch.c", SWITCH_DEFINES, cache)
        self.layouts = {
            name: Layout(spec.value)
            for name, spec in (*self.vmq.maps.items(), *self.switch.maps.items())
            if not isinstance(spec.value, str)
        }
        self._station_key = Layout(self.switch.maps["stations"].key)
        self._possible_cpus = possible_cpus()
        self.tc = TcPrograms(pins / "members", self.switch, self._maps)
        self._news: RingBuffer | None = None
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
        """Take over what is pinned; make and pin the shared maps that are not there yet.

        Raises ``ForeignError`` beside pins of another version, whose programs would still run.
        """
        for other in self.pins.parent.glob("v[0-9]*"):
            if other != self.pins:
                raise ForeignError(
                    f"{other} is of another version of offload: run `offload detach --all` with that one, "
                    f"or `rm -r {other}` if it is there no more, then start again"
                )
        for name in _SHARED:
            self._maps[name] = self._adopt(self.pins / "maps" / name, name, self.vmq.maps[name])
        for name in _SWITCH:
            self._maps[name] = self._adopt(self.pins / "maps" / name, name, self.switch.maps[name])
        for name, entries in _NAMES.items():
            spec = MapSpec(MapType.ARRAY, 4, _NAME_BYTES, entries, 0, None, None)
            self._maps[name] = self._adopt(self.pins / "maps" / name, name, spec)
        self._rows = memoryview(self._maps["ports"].mapped())
        for directory in _children(self.pins / "nics"):
            if (directory / "uplink").exists():
                self._nics[int(directory.name)] = self._open_nic(directory)
            elif self._keep:
                shutil.rmtree(directory)  # of an attach that was interrupted
        self.tc.open()

    def forget_gone(self, live: Collection[int]) -> None:
        """Let go of what belonged to devices that are not among the ifindexes ``live``."""
        for ifindex in [ifindex for ifindex in self._nics if ifindex not in live]:
            if self._keep:
                self.detach(ifindex)
            else:
                self._nics.pop(ifindex).close()
        for nic in self._nics.values():
            for ifindex in [ifindex for ifindex in nic.functions if ifindex not in live]:
                self._drop_function(nic, ifindex)
        for ifindex in self._member_rows():
            if self._keep and ifindex not in live:
                self.tc.forget(ifindex)
                self._maps["members"].delete(_U32.pack(ifindex))

    def close(self) -> None:
        if self._keep and self._maps and not self._in_use():
            self._remove_pins()  # a start was refused, or everything was taken out
        for nic in self._nics.values():
            nic.close()
        for handle in self._maps.values():
            handle.close()
        if self._news:
            self._news.close()
            self._news = None
        self.tc.close()
        self._nics.clear()
        self._maps.clear()

    def _in_use(self) -> bool:
        members = any(map(_is_there, self._member_rows()))  # a bridge may have gone with its start
        return bool(self._nics or self.ports() or members or self.networks())

    def _adopt(self, pin: Path, name: str, spec: MapSpec, max_entries: int | None = None) -> Map:
        try:
            opened = Map.pinned(pin)
        except FileNotFoundError:
            opened = self._create(name, spec, max_entries)
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

    def _create(self, name: str, spec: MapSpec, max_entries: int | None) -> Map:
        if spec.type != MapType.ARRAY_OF_MAPS:
            return Map.create(name, spec, max_entries)
        with self.new_nic_sockets() as like:
            return Map.create(name, spec, max_entries, like)

    def _open_nic(self, directory: Path) -> NicObjects:
        maps = {
            name: self._adopt(directory / name, name, self.vmq.maps[name], self._entries(name))
            for name in _PER_NIC
        }
        programs = {name: Program.pinned(directory / f"{name}_program") for name in ("uplink", "queue")}
        nic = NicObjects(directory, maps, programs)
        for below in _children(directory / "functions"):
            if (below / "link").exists():
                nic.functions[int(below.name)] = self._open_function(below)
            elif self._keep:
                shutil.rmtree(below)  # of an attach that was interrupted
        return nic

    def _open_function(self, directory: Path) -> FunctionObjects:
        maps = {name: self._adopt(directory / name, name, self.vmq.maps[name]) for name in _PER_FUNCTION}
        return FunctionObjects(directory, maps, Program.pinned(directory / "program"))

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
            self._link(nic.programs["uplink"], directory / "uplink", device, ifindex, mode)
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
                programs[name].pin_anew(directory / f"{name}_program")
            undo.pop_all()
        return programs

    def _link(self, program: Program, pin: Path, device: str, ifindex: int, mode: XdpMode) -> None:
        flags = XDP_FLAGS_DRV_MODE if mode == "native" else XDP_FLAGS_SKB_MODE
        doing = f"attach XDP to {device} in {mode} mode"
        try:
            link = Link.create(program, ifindex, AttachType.XDP, flags=flags, doing=doing)
        except OffloadError as error:
            raise _attach_error(error, device, ifindex, mode) from error.__cause__
        with link:
            link.pin(pin)

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
        for function in [*nic.functions]:
            self._drop_function(nic, function)
        _end_link(nic.directory / "uplink")
        nic.close()
        shutil.rmtree(nic.directory)

    # Virtual functions

    def functions(self) -> dict[int, FunctionRow]:
        """The virtual functions' devices that have our program, by ifindex; not those that have gone."""
        layout = self.layouts["served"]
        found = {}
        for ifindex, nic in self._nics.items():
            for device, function in nic.functions.items():
                with Link.pinned(function.directory / "link") as link:
                    if link.info().ifindex != device:
                        continue
                raw = function.maps["served"].lookup(_U32.pack(0), layout.size)
                row = layout.read(raw or bytes(layout.size))
                port = None if row["port"] == NO_PORT else row["port"]
                digest = function.program.info().name.partition("_")[2]
                found[device] = FunctionRow(ifindex, port, row["vid"], digest)
        return found

    def attach_function(self, device: str, ifindex: int, nic_ifindex: int, mode: XdpMode) -> None:
        """Put this version's program on a virtual function's device, which serves nobody then.

        One that has our program gets the new one between two frames, and serves whom it served.
        """
        nic = self._nics[nic_ifindex]
        attached = self.functions().get(ifindex)
        if attached and attached.digest == self.digest:
            return
        if attached:
            function = nic.functions[ifindex]
            old, function.program = (
                function.program,
                self._load_function(nic, function.maps, function.directory),
            )
            with Link.pinned(function.directory / "link") as link:
                link.replace(function.program)
            old.close()
            return
        if ifindex in nic.functions:
            self._drop_function(nic, ifindex)  # somebody forced our link off: begin anew
        directory = nic.directory / "functions" / str(ifindex)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            maps = {}
            for name in _PER_FUNCTION:
                maps[name] = self._adopt(directory / name, name, self.vmq.maps[name])
                undo.callback(maps[name].close)
            maps["served"].update(_U32.pack(0), self._served(None, 0))
            program = self._load_function(nic, maps, directory)
            undo.callback(program.close)
            self._link(program, directory / "link", device, ifindex, mode)
            undo.pop_all()
        nic.functions[ifindex] = FunctionObjects(directory, maps, program)

    def _load_function(self, nic: NicObjects, maps: Mapping[str, Map], directory: Path) -> Program:
        spec = self.vmq.programs["function"]
        used = {**self._maps, **nic.maps, **maps}
        program = Program.load(f"vf_{self.digest}", spec, used, AttachType.XDP, frags=True)
        program.pin_anew(directory / "program")
        return program

    def _served(self, port_id: int | None, vid: int) -> bytes:
        return self.layouts["served"].pack(port=NO_PORT if port_id is None else port_id, vid=vid, unused=0)

    def set_function(self, ifindex: int, port_id: int | None, vid: int) -> None:
        """Let a virtual function deliver one port's frames; ``vid``: of the tag that the NIC takes off."""
        [function] = [nic.functions[ifindex] for nic in self._nics.values() if ifindex in nic.functions]
        function.maps["served"].update(_U32.pack(0), self._served(port_id, vid))

    def detach_function(self, ifindex: int) -> None:
        """Take the program off a virtual function's device, if it has one."""
        for nic in self._nics.values():
            if ifindex in nic.functions:
                self._drop_function(nic, ifindex)

    def _drop_function(self, nic: NicObjects, ifindex: int) -> None:
        function = nic.functions.pop(ifindex)
        if self._keep:
            _end_link(function.directory / "link")
        function.close()
        if self._keep:
            shutil.rmtree(function.directory)

    def function_counters(self, ifindex: int) -> dict[str, Any]:
        """What a virtual function did not deliver, by reason, summed over CPUs."""
        [function] = [nic.functions[ifindex] for nic in self._nics.values() if ifindex in nic.functions]
        size = self._counter_bytes("function_counters")
        raw = function.maps["function_counters"].lookup(_U32.pack(0), size)
        if raw is None:
            raise KernelError("the counters of a virtual function are gone")
        return self.layouts["function_counters"].total(raw)

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
        return {port_id: self._record(port_id, name) for port_id, name in self._names("names").items()}

    def port(self, port_id: int) -> PortRecord | None:
        """What ``ports`` has for one row."""
        name = self._maps["names"].lookup(_U32.pack(port_id), _NAME_BYTES)
        return self._record(port_id, name.rstrip(b"\0").decode()) if name and name[0] else None

    def _names(self, map_name: str) -> dict[int, str]:
        """The rows that have a name."""
        raw = self._maps[map_name].read_first(_NAMES[map_name], _NAME_BYTES)
        return {
            at // _NAME_BYTES: raw[at : at + _NAME_BYTES].rstrip(b"\0").decode()
            for at in range(0, len(raw), _NAME_BYTES)
            if raw[at]
        }

    def _set_name(self, map_name: str, row: int, name: str) -> None:
        self._maps[map_name].update(_U32.pack(row), name.encode().ljust(_NAME_BYTES, b"\0"))

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
        for name in ("devices", "ends"):
            if record is not None and record.ifindex:
                self._maps[name].update(key, _DEVICE.pack(record.ifindex, 0))
            else:
                self._maps[name].delete(key)
        if running:
            self._write_row(port_id, record)
        self._set_name("names", port_id, record.name if record else "")
        if record is None:
            self._maps["port_counters"].update(key, bytes(self._counter_bytes("port_counters")))

    def move_port(self, port_id: int, record: PortRecord, asleep: Callable[[], bool]) -> bool:
        """Let another CPU serve a port's queue, or GRO merge its frames or not; nothing else is new.

        One store, no frame lost. A frame that waits for the old CPU or in GRO could be overtaken by a later
        one. So this waits, up to 50 ms, for a moment at which none of the port's is under way: two readings
        that are equal, because a frame is counted a little before it is handed over, and in which all that
        was queued or left to GRO has come out. Where some was lost on the way, it is ``asleep``, whether the
        old CPU's thread has nothing to do, and the time GRO takes that tell. Says whether there was
        such a moment; the frames go the new way in any case.
        """
        end = time.monotonic() + _DRAIN_PATIENCE
        before, since, drained = None, 0.0, False
        while not drained and time.monotonic() < end:
            now = self._under_way(port_id)
            if now != before:
                since = time.monotonic()
            queued, out, left, merged, _ = now
            quiet = queued == out or asleep()
            quiet &= left == merged or time.monotonic() - since > _GRO_HOLDS
            drained = quiet and now == before
            if not quiet:
                time.sleep(_BREATH)  # the CPU that it waits for may be this one
            before = now
        self._write_row(port_id, record)
        return drained

    def _under_way(self, port_id: int) -> tuple[int, int, int, int, int]:
        """Frames of a port: queued for a CPU, come out there, left to GRO, come out there, and handed over
        on the NIC's own CPU.
        """
        raw = self._maps["port_counters"].lookup(_U32.pack(port_id), self._counter_bytes("port_counters"))
        if raw is None:
            raise KernelError("the counters of a port are gone")
        counted = self.layouts["port_counters"].total(raw)
        frames = {name: value["packets"] for name, value in counted.items() if isinstance(value, dict)}
        out = frames["handed"] + frames["returned"] + counted["vlan_queue"]
        return frames["queued"], out, frames["left"], frames["merged"], frames["direct"]

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

    # Sockets on NICs' queues

    def new_nic_sockets(self) -> Map:
        """A map for the sockets of one port on its NIC, by RX queue; not pinned, and no port's yet."""
        return Map.create("nic_sockets", self.vmq.maps["nic_sockets"])

    def nic_sockets(self, port_id: int) -> int | None:
        """The kernel's id of the map of a port's sockets on its NIC, ``None`` when it has none."""
        found = self._maps["sockets"].lookup(_U32.pack(port_id), _U32.size)
        return _U32.unpack(found)[0] if found else None

    def set_nic_sockets(self, port_id: int, sockets: Map | None) -> None:
        """Let the program on the NIC try these sockets before the port's device."""
        key = _U32.pack(port_id)
        if sockets is None:
            self._maps["sockets"].delete(key)
        else:
            self._maps["sockets"].update(key, _U32.pack(sockets.fd))

    # Filters

    def filters(self, ifindex: int) -> Iterator[tuple[str, int, int]]:
        """MAC, VID and port id of every filter on a NIC."""
        for key, port_id in self._nics[ifindex].classifier:
            yield (*filter_of(key), port_id)

    def filter(self, ifindex: int, mac: str, vid: int) -> int | None:
        """The port that a NIC's filter for (MAC, VID) leads to."""
        return self._nics[ifindex].classifier.get(filter_key(mac, vid))

    def set_filter(self, ifindex: int, mac: str, vid: int, port_id: int | None) -> None:
        """Give (MAC, VID) to a port, in one step also when another had it; ``None`` takes it away."""
        classifier = self._nics[ifindex].classifier
        if port_id is None:
            classifier.remove(filter_key(mac, vid))
        else:
            classifier.set(filter_key(mac, vid), port_id)

    # Switches

    @property
    def switch_digest(self) -> str:
        """What ``members`` says of a device that runs this version's programs."""
        return self.tc.digest

    def networks(self) -> dict[int, NetworkRow]:
        """Every switch that has a row, by number."""
        layout = self.layouts["networks"]
        rows = self._maps["networks"].read_first(MAX_NETWORKS, layout.size)
        found = {}
        for number, name in self._names("network_names").items():
            row = layout.read(rows[number * layout.size : (number + 1) * layout.size])
            found[number] = NetworkRow(
                name=name,
                uplink=None if row["uplink"] == NO_PORT else row["uplink"],
                conduit=row["conduit"],
                untagged=row["untagged"],
                ask_bridge=bool(row["flags"] & NETWORK_ASK_BRIDGE),
            )
        return found

    def set_network(self, number: int, row: NetworkRow | None) -> None:
        """Write a switch's row; ``None`` frees it, when no member is in it any more."""
        value = self.layouts["networks"].pack(
            uplink=NO_PORT if row is None or row.uplink is None else row.uplink,
            conduit=row.conduit if row else 0,
            untagged=row.untagged if row else 0,
            flags=NETWORK_ASK_BRIDGE if row and row.ask_bridge else 0,
            unused=0,
        )
        self._maps["networks"].update(_U32.pack(number), value)
        self._set_name("network_names", number, row.name if row else "")

    def members(self) -> dict[int, tuple[MemberRow, str]]:
        """Every device of a switch, by ifindex, with the digest of its role's programs.

        The digest is empty unless exactly those programs are attached, all of one version.
        """
        return {ifindex: self._with_digest(ifindex, row) for ifindex, row in self._member_rows().items()}

    def member(self, ifindex: int) -> tuple[MemberRow, str] | None:
        """What ``members`` has for one device."""
        value = self._maps["members"].lookup(_U32.pack(ifindex), self.layouts["members"].size)
        return self._with_digest(ifindex, self._member_row(value)) if value else None

    def _with_digest(self, ifindex: int, row: MemberRow) -> tuple[MemberRow, str]:
        there = self.tc.on(ifindex)
        digests = {each.digest for each in there.values()}
        whole = {side: each.program for side, each in there.items()} == PROGRAMS[row.role]
        return row, digests.pop() if whole and len(digests) == 1 else ""

    def _member_rows(self) -> dict[int, MemberRow]:
        rows = self._maps["members"].items()
        return {_U32.unpack(key)[0]: self._member_row(value) for key, value in rows}

    def _member_row(self, value: bytes) -> MemberRow:
        row = self.layouts["members"].read(value)
        flags = row["flags"]
        return MemberRow(
            port=row["port"],
            network=row["network"],
            role=next(role for role, number in ROLES.items() if number == row["role"]),
            pvid=None if flags & MEMBER_NO_NATIVE else row["pvid"],
            trunk=bool(flags & MEMBER_TRUNK),
            bypass=bool(flags & MEMBER_BYPASS),
            allow=frozenset(name for name, bit in ALLOWED.items() if flags & bit),
        )

    def set_member(self, device: str, ifindex: int, row: MemberRow) -> None:
        """Make a device what ``row`` says, at once; then see to it that its role's programs run on it.

        Programs of another version or another role that are there are replaced, between two frames.
        """
        flags = sum(ALLOWED[name] for name in row.allow)
        flags |= MEMBER_TRUNK if row.trunk else 0
        flags |= MEMBER_NO_NATIVE if row.pvid is None else 0
        flags |= MEMBER_BYPASS if row.bypass else 0
        value = self.layouts["members"].pack(
            port=row.port,
            network=row.network,
            role=ROLES[row.role],
            flags=flags,
            pvid=row.pvid or 0,
            unused=0,
        )
        self._maps["members"].update(_U32.pack(ifindex), value)
        self.tc.attach(device, ifindex, row.role)

    def clear_member(self, ifindex: int) -> None:
        """Take our programs off a device, which is no switch's then."""
        self.tc.detach(ifindex)
        self._maps["members"].delete(_U32.pack(ifindex))

    def trunks(self) -> dict[int, frozenset[int]]:
        """The VIDs of every trunk, by port id."""
        layout = self.layouts["trunks"]
        return {
            _U32.unpack(key)[0]: _vids(layout.read(value)["words"])
            for key, value in self._maps["trunks"].items()
        }

    def trunk(self, port_id: int) -> frozenset[int] | None:
        """What ``trunks`` has for one port."""
        layout = self.layouts["trunks"]
        value = self._maps["trunks"].lookup(_U32.pack(port_id), layout.size)
        return _vids(layout.read(value)["words"]) if value else None

    def set_trunk(self, port_id: int, vids: frozenset[int] | None) -> None:
        """Let a trunk have these tags (1..4094), all changed at once; ``None``: it is none any more."""
        if vids is None:
            self._maps["trunks"].delete(_U32.pack(port_id))
            return
        words = [0] * 64
        for vid in vids:
            words[vid // 64] |= 1 << vid % 64
        self._maps["trunks"].update(_U32.pack(port_id), self.layouts["trunks"].pack(words=tuple(words)))

    def stations(self) -> dict[tuple[int, str, int], StationRow]:
        """Every declared address, by network, MAC and VID (0: untagged), and where it is."""
        found = {}
        for key, value in self._maps["stations"].items():
            at = self._station_key.read(key)
            found[at["network"], bytes(at["mac"]).hex(":"), at["vid"]] = self._station_row(value)
        return found

    def station(self, network: int, mac: str, vid: int) -> StationRow | None:
        """What ``stations`` has for one address."""
        key = self._station_at(network, mac, vid)
        value = self._maps["stations"].lookup(key, self.layouts["stations"].size)
        return self._station_row(value) if value else None

    def _station_row(self, value: bytes) -> StationRow:
        row = self.layouts["stations"].read(value)
        return StationRow(
            port=row["port"],
            ifindex=row["ifindex"],
            state=STATES[row["state"]],
            moves=row["moves"],
            since=row["since"],
        )

    def _station_at(self, network: int, mac: str, vid: int) -> bytes:
        return self._station_key.pack(
            network=network, mac=tuple(bytes.fromhex(mac.replace(":", ""))), vid=vid
        )

    def set_station(self, network: int, mac: str, vid: int, row: StationRow | None) -> None:
        """Declare an address, its state included, or take it away."""
        key = self._station_at(network, mac, vid)
        if row is None:
            self._maps["stations"].delete(key)
            return
        value = self.layouts["stations"].pack(
            port=row.port,
            ifindex=row.ifindex,
            state=STATES.index(row.state),
            moves=row.moves,
            since=row.since,
        )
        self._maps["stations"].update(key, value)

    def news_fd(self) -> int:
        """Readable while ``drain_news`` has something to give."""
        return self._ring().fd

    def drain_news(self) -> list[News]:
        """Stations that changed their state, oldest first. Told once, to whichever process asks first.

        When too many wait to be told, the latest are not: ``stations`` has them.
        """
        layout = self.layouts["news"]
        return [
            News(
                network=told["network"],
                port=told["port"],
                state=STATES[told["state"]],
                mac=bytes(told["mac"]).hex(":"),
                vid=told["vid"],
            )
            for told in map(layout.read, self._ring().drain())
        ]

    def _ring(self) -> RingBuffer:
        if self._news is None:
            self._news = RingBuffer(self._maps["news"])
        return self._news

    # Counters

    def port_counters(self, count: int) -> list[dict[str, Any]]:
        """Counters of the first ``count`` ports by id, summed over CPUs, with the fields of ``bpf/abi.h``."""
        layout = self.layouts["port_counters"]
        size = self._counter_bytes("port_counters")
        raw = self.raw_port_counters(count)
        return [layout.total(raw[at : at + size]) for at in range(0, len(raw), size)]

    def raw_port_counters(self, count: int) -> bytes:
        """As ``port_counters``, as the kernel has them: by port and by possible CPU."""
        size = self._counter_bytes("port_counters")
        return self._maps["port_counters"].read_first(count, size) if count else b""

    def nic_counters(self, ifindex: int) -> dict[str, Any]:
        """Frames of a NIC that went to the bridge, by reason, summed over CPUs."""
        size = self._counter_bytes("nic_counters")
        raw = self._nics[ifindex].maps["nic_counters"].lookup(_U32.pack(0), size)
        if raw is None:
            raise KernelError("the counters of a NIC are gone")
        return self.layouts["nic_counters"].total(raw)

    def _counter_bytes(self, name: str) -> int:
        return self.layouts[name].per_cpu_size(self._possible_cpus)

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
    return {"MAX_PORTS": MAX_PORTS, "MAX_CPUS": 1, "MAX_NIC_QUEUES": MAX_NIC_QUEUES, "QUEUE_CPUS": 1}


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


def _vids(words: tuple[int, ...]) -> frozenset[int]:
    return frozenset(vid for vid in range(4096) if words[vid // 64] >> vid % 64 & 1)


def _is_there(ifindex: int) -> bool:
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True
