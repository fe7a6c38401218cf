"""Runs a frame through the loaded programs without touching what they serve.

BPF_PROG_TEST_RUN counts as real traffic does, and ``sent`` and ``wire`` flip the states of stations.
So what runs is a twin: the same instructions, loaded once more, with the live tables that they only read
and copies of all that they write. That the attached programs have these instructions is told by their
digests; other ones are refused.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..closing import Closing
from ..errors import KernelError, OffloadError, UnsupportedError, UsageError
from ..explain import MADE_UP, Kind, Owner, Sample, Scene, Step, answer, sorted_by
from ..hardware import Function, Rule
from ..model import Link as Device
from ..model import MemberRow, PortRecord
from ..paths import Paths
from ..views import ExplainView
from .abi import Layout
from .bpf import AttachType, Map, Program, possible_cpus
from .dataplane import STATES, Dataplane
from .host import online_cpus
from .system import System

_SHARED = ("ports", "devices", "sockets")
_PER_NIC = ("classifier", "cpus")
_SWITCH = ("ends", "members", "networks", "trunks")
_PER_FUNCTION = ("served",)
_PROGRAMS = {
    **dict.fromkeys(("uplink", "queue", "function"), "vmq"),
    **dict.fromkeys(("sent", "wire", "guard", "strayed"), "switch"),
}

_XDP_VERDICTS: Mapping[int, Literal["pass", "drop", "redirect"]] = {1: "drop", 2: "pass", 4: "redirect"}
_TC_VERDICTS: Mapping[int, Literal["pass", "drop", "redirect"]] = {
    0xFFFFFFFF: "pass",  # TC_ACT_UNSPEC
    2: "drop",
    7: "redirect",
}
_U32 = struct.Struct("=I")
_XDP_MD = struct.Struct(
    "=IIIIII"
)  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
_SK_BUFF_BYTES, _INGRESS_IFINDEX, _IFINDEX = 192, 36, 40  # struct __sk_buff
_UPLINK, _HOST = "uplink:", "host:"  # how rows of the port table begin that are no ports


@dataclass(frozen=True)
class Question:
    """What is asked: a frame from the wire to ``nic``, or one that the VM at ``port`` sends.

    ``src`` ``None``: a made-up station of the wire, or the port's own address. ``rx_queue`` is the one of
    the NIC's on which the frame arrives; ``None``: the one that a rule in the NIC gives it to, or the first.
    """

    nic: str | None
    port: str | None
    dst: str
    src: str | None = None
    vids: tuple[int, ...] = ()
    service: bool = False
    size: int = 60
    kind: Kind = "plain"
    rx_queue: int | None = None


def explain(question: Question, paths: Paths) -> ExplainView:
    """Where such a frame goes. Changes no counter and no state; needs no daemon.

    Raises ``UsageError`` for a NIC or port that this instance has not got, and ``UnsupportedError`` when
    the programs there are not this version's.
    """
    with System(paths, keep=False) as system, _Site(system) as site:
        if question.nic is not None:
            return site.from_wire(question, question.nic)
        assert question.port is not None, "the command line wants one of the two"
        return site.from_port(question, question.port)


class _Site(Closing):
    """What is loaded and attached now, and its twins."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._plane = system.dataplane
        self._links = {link.ifindex: link for link in system.links.snapshot().values()}
        self._ports = self._plane.ports()
        self._members = self._plane.members()
        self._networks = self._plane.networks()
        self._functions = self._plane.functions()
        self._held = ExitStack()
        self._stations = self._held.enter_context(self._pinned("stations"))
        self._station_key = Layout(self._plane.switch.maps["stations"].key)

    def close(self) -> None:
        self._held.close()

    def _pinned(self, name: str) -> Map:
        try:
            return Map.pinned(self._plane.pins / "maps" / name)
        except FileNotFoundError as error:
            raise UsageError(f"nothing of offload is below {self._plane.pins}: does it run there?") from error

    # The two questions

    def from_wire(self, question: Question, nic: str) -> ExplainView:
        ifindex = self._nic(nic)
        link = self._links[ifindex]
        queues = self._system.rx_queues(link)
        if question.rx_queue is not None and question.rx_queue >= queues:
            raise UsageError(f"--rx-queue {question.rx_queue}: {nic} has {queues}, numbered from 0")
        sample = _sample(question, question.src or MADE_UP)
        member = self._members[ifindex][0] if ifindex in self._members else None
        twins = self._twins(ifindex)
        frame, target = sample, None
        steps: list[Step] = []
        by_nic = self._by_nic(sample, link, question.rx_queue) if ifindex in self._plane.uplinks() else None
        rx_queue = by_nic.rx_queue if isinstance(by_nic, Rule) else question.rx_queue or 0
        scene = self._scene(sample, nic, member, None)
        if ifindex in self._plane.uplinks():
            # NICs' frames come on any CPU; this one shall come on another than the queue's.
            with _not_on(scene.owner.record.cpu if scene.owner else None):
                if isinstance(by_nic, Function):
                    scene = replace(scene, served=self._name(by_nic.serves))
                    frame, steps, target = self._through_function(sample, by_nic)
                else:
                    frame, steps, target = self._through_xdp(twins, sample, link, rx_queue)
        if member and (not steps or steps[-1].verdict == "pass" or steps[-1].strayed):
            step, frame = self._tc(twins, "wire", frame, ifindex, ifindex)
            steps.append(step)
            if step.counter == "tx_local" and scene.owner:
                way = "merged" if any(each.counter == "left" for each in steps) else "local"
                frame, more = self._delivered(twins, frame, ifindex, scene.owner.record, way)
                steps += more
        elif steps and steps[-1].counter in ("direct", "handed") and target:
            steps += self._channel(target)
        scene = replace(scene, target=target, rx_queue=rx_queue, by_nic=by_nic)
        return answer(sample, frame, tuple(steps), scene)

    def from_port(self, question: Question, port: str) -> ExplainView:
        port_id = self._port(port)
        record = self._ports[port_id]
        member = self._members.get(record.ifindex, (None, ""))[0]
        if member is None or member.port != port_id:
            raise OffloadError(f"{_called(port)} sends nothing: its device is away")
        src = question.src or self._address(port_id, question.vids[0] if question.vids else member.pvid or 0)
        sample = _sample(question, src)
        twins = self._twins(record.ifindex)
        scene = self._scene(sample, _called(port), member, member)
        step, _ = self._tc(twins, "sent", sample, record.ifindex, record.ifindex)
        frame, steps = sample, [step]
        if step.verdict != "drop":
            frame = sample.inside(member.pvid or 0)
        if step.counter == "tx_local" and step.verdict == "redirect" and scene.owner:
            frame, more = self._delivered(twins, frame, record.ifindex, scene.owner.record, "local")
            steps += more
            scene = replace(scene, target=scene.owner.record)
        return answer(sample, frame, tuple(steps), scene)

    def _through_xdp(
        self, twins: _Twins, sample: Sample, nic: Device, rx_queue: int
    ) -> tuple[Sample, list[Step], PortRecord | None]:
        """The programs on the NIC's CPU and on the queue's, and first those that get group frames as well."""
        digest = self._plane.uplinks()[nic.ifindex]
        _require_ours(nic.name, digest, self._plane.digest)
        step, frame, port_id = self._xdp(twins, "uplink", sample, nic, rx_queue)
        target = None if port_id is None else self._ports.get(port_id)
        also = [at for at, row in self._functions.items() if row.nic == nic.ifindex and sample.group]
        steps = [*(self._at_function(sample, at)[0] for at in also), step]
        if step.counter == "queued":
            step, frame, _ = self._xdp(twins, "queue", sample, nic, rx_queue)
            steps.append(step)
        return frame, steps, target

    def _by_nic(self, sample: Sample, nic: Device, rx_queue: int | None) -> Function | Rule | None:
        """What sorts the frame in the NIC: a virtual function of ours, or a rule, if to ``rx_queue``."""
        sorting = self._system.sorting(nic)
        ours = [one for one in sorting if isinstance(one, Rule) or one.ifindex in self._functions]
        found = sorted_by(sample, ours)
        elsewhere = isinstance(found, Rule) and rx_queue not in (None, found.rx_queue)
        return None if elsewhere else found

    def _through_function(
        self, sample: Sample, function: Function
    ) -> tuple[Sample, list[Step], PortRecord | None]:
        """The programs on a virtual function, into which the NIC sorts the frame without its tag."""
        ifindex = function.ifindex
        assert ifindex is not None, "it is among the devices that have our program"
        arrives = sample.stripped() if function.vid else sample
        if not function.running:
            return arrives, [Step("function", self._links[ifindex].name, "drop", None)], None
        step, frame, port_id = self._at_function(arrives, ifindex)
        if step.verdict != "pass":
            return frame, [step], None if port_id is None else self._ports.get(port_id)
        back, _ = self._tc(self._twins(ifindex), "strayed", frame, ifindex, ifindex)
        pvid = self._members[ifindex][0].pvid or 0
        return frame.inside(pvid) if back.strayed else frame, [step, back], None

    def _at_function(self, sample: Sample, ifindex: int) -> tuple[Step, Sample, int | None]:
        """What the XDP program there makes of a frame."""
        device, row = self._links[ifindex], self._functions[ifindex]
        _require_ours(device.name, row.digest, self._plane.digest)
        return self._xdp(self._twins(row.nic, ifindex), "function", sample, device, 0)

    def _delivered(
        self, twins: _Twins, frame: Sample, source: int, target: PortRecord, way: str
    ) -> tuple[Sample, list[Step]]:
        """What the program at a port's device does with a frame from past the bridge, and what is behind it.

        It knows such frames and their ``way``, which is the counter, by their `tc_index`. A test run cannot
        set that, so that it takes this one for the bridge's.
        """
        step, after = self._tc(twins, "guard", frame, target.ifindex, source)
        if step.verdict == "drop":
            return after, [step]
        step = replace(step, counter=way)
        return after, [step, *self._channel(target)]

    def _channel(self, target: PortRecord) -> list[Step]:
        """Whether an AF_XDP port's consumer is at its software channel; nothing for a port with a device."""
        channels = self._system.channels
        if not (channels.pins(target.name) / "link").exists():
            return []
        there = channels.has_consumer(target.name)
        verdict: Literal["redirect", "drop"] = "redirect" if there else "drop"
        counter = "handed" if there else "no_consumer"
        return [Step("channel", self._links[target.ifindex].name, verdict, counter, target.name)]

    # What is there

    def _nic(self, name: str) -> int:
        nics = {*self._plane.uplinks()} | {
            ifindex for ifindex, (row, _) in self._members.items() if row.role == "uplink"
        }
        known = {self._links[ifindex].name: ifindex for ifindex in nics if ifindex in self._links}
        if name not in known:
            raise UsageError(f"{name}: there is no such nic; there is: {', '.join(sorted(known)) or 'none'}")
        return known[name]

    def _port(self, name: str) -> int:
        known = {
            row.name: port_id for port_id, row in self._ports.items() if not row.name.startswith(_UPLINK)
        }
        if name not in known:
            raise UsageError(f"{name}: there is no such port; there is: {', '.join(sorted(known)) or 'none'}")
        return known[name]

    def _name(self, port_id: int | None) -> str | None:
        return self._ports[port_id].name if port_id in self._ports else None

    def _address(self, port_id: int, vid: int) -> str:
        """A port's own address, in this VLAN if it has one there."""
        mine = [(at[2] != vid, at[1]) for at, row in self._plane.stations().items() if row.port == port_id]
        if not mine:
            raise UsageError("the port has no address yet: give one with --src")
        return min(mine)[1]

    def _scene(self, sample: Sample, asked: str, member: MemberRow | None, sender: MemberRow | None) -> Scene:
        if member is None:
            return Scene(None, asked, asked)
        network = self._networks[member.network]
        uplink = self._ports.get(network.uplink) if network.uplink is not None else None
        vid = sample.inside(sender.pvid or 0).vid if sender else sample.vid
        owner = self._owner(member.network, sample.dst, vid)
        return Scene(
            network=network,
            nic=uplink.name.removeprefix(_UPLINK) if uplink else None,
            asked=asked,
            sender=sender,
            owner=owner,
            elsewhere=() if owner else self._elsewhere(member.network, sample.dst),
        )

    def _owner(self, network: int, mac: str, vid: int) -> Owner | None:
        layout = self._plane.layouts["stations"]
        key = self._station_key.pack(network=network, mac=tuple(bytes.fromhex(mac.replace(":", ""))), vid=vid)
        raw = self._stations.lookup(key, layout.size)
        if raw is None:
            return None
        row = layout.read(raw)
        record = self._ports[row["port"]]
        return Owner(record, "host" if record.name.startswith(_HOST) else "port", STATES[row["state"]])

    def _elsewhere(self, network: int, mac: str) -> tuple[tuple[str, int], ...]:
        found = [
            (_called(self._ports[row.port].name), at[2])
            for at, row in self._plane.stations().items()
            if at[:2] == (network, mac)
        ]
        return tuple(sorted(found))

    # Running

    def _twins(self, ifindex: int, function: int | None = None) -> _Twins:
        nic = ifindex if ifindex in self._plane.uplinks() else None
        return self._held.enter_context(_Twins(self._plane, nic, max(self._ports) + 1, function))

    def _xdp(
        self, twins: _Twins, program: str, sample: Sample, nic: Device, rx_queue: int
    ) -> tuple[Step, Sample, int | None]:
        frame = sample.octets()
        context = _XDP_MD.pack(0, len(frame), 0, nic.ifindex, rx_queue, 0)
        verdict, after, port_id, counter = twins.run(program, frame, context)
        name = None if port_id is None else self._ports[port_id].name
        step = Step(program, nic.name, _XDP_VERDICTS[verdict], counter, name)
        return step, sample.stripped() if len(after) < len(frame) else sample, port_id

    def _tc(
        self, twins: _Twins, program: str, sample: Sample, ifindex: int, source: int
    ) -> tuple[Step, Sample]:
        device = self._links[ifindex].name
        _, digest = self._members.get(ifindex, (None, ""))
        _require_ours(device, digest, self._plane.switch_digest)
        frame = sample.for_tc().octets()
        context = bytearray(_SK_BUFF_BYTES)
        _U32.pack_into(context, _INGRESS_IFINDEX, source)
        _U32.pack_into(context, _IFINDEX, ifindex)
        verdict, after, port_id, counter = twins.run(program, frame, bytes(context))
        name = None if port_id is None else self._ports[port_id].name
        step = Step(program, device, _TC_VERDICTS[verdict], counter, name)
        return step, sample.stripped() if len(after) < len(frame) else sample


class _Twins(Closing):
    """The programs once more, on maps of their own where they write."""

    def __init__(self, plane: Dataplane, nic: int | None, rows: int, function: int | None = None) -> None:
        self._plane = plane
        self._rows = rows
        self._held = ExitStack()
        self._programs: dict[str, Program] = {}
        pinned = {name: plane.pins / "maps" / name for name in (*_SHARED, *_SWITCH)}
        at_nic = plane.pins / "nics" / str(nic)
        if nic is not None:
            pinned |= {name: at_nic / name for name in _PER_NIC}
        if function is not None:
            pinned |= {name: at_nic / "functions" / str(function) / name for name in _PER_FUNCTION}
        with ExitStack() as undo:
            undo.callback(self._held.close)
            self._live = {name: self._held.enter_context(Map.pinned(pin)) for name, pin in pinned.items()}
            self._own = {
                "port_counters": self._new("port_counters", rows),
                "nic_counters": self._new("nic_counters"),
                "function_counters": self._new("function_counters"),
                "ports": self._copied("ports"),
                "stations": self._copied("stations"),
                "news": self._new("news"),
            }
            undo.pop_all()

    def close(self) -> None:
        self._held.close()

    def run(self, program: str, frame: bytes, context: bytes) -> tuple[int, bytes, int | None, str | None]:
        """Verdict, the frame afterwards, and port id and name of the counter that moved."""
        try:
            result = self._program(program).test_run(frame, ctx=context)
        except KernelError as error:
            cause = error.__cause__
            if len(frame) > 3000 and isinstance(cause, OSError) and cause.errno == errno.EINVAL:
                raise UnsupportedError(
                    f"this kernel tries no frame of {len(frame)} bytes on the program {program}: "
                    "ask about a shorter one"
                ) from error
            raise
        return result.verdict, result.frame, *self._moved()

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            xdp = _PROGRAMS[name] == "vmq"
            artifact = self._plane.vmq if xdp else self._plane.switch
            # XDP programs read the row of the port, tc programs may pause it.
            own = {key: value for key, value in self._own.items() if not (xdp and key == "ports")}
            attach = AttachType.XDP if xdp else AttachType.NONE
            loaded = Program.load(
                f"explain_{name}", artifact.programs[name], {**self._live, **own}, attach, frags=xdp
            )
            self._programs[name] = self._held.enter_context(loaded)
        return self._programs[name]

    def _new(self, name: str, entries: int | None = None) -> Map:
        specs = {**self._plane.switch.maps, **self._plane.vmq.maps}
        return self._held.enter_context(Map.create(name, specs[name], entries))

    def _copied(self, name: str) -> Map:
        copy = self._new(name)
        with Map.pinned(self._plane.pins / "maps" / name) as live:
            for key, value in live.items():
                copy.update(key, value)
        return copy

    def _moved(self) -> tuple[int | None, str | None]:
        """Which counter is not 0, and 0 from now on: a row's number and a name; none for the device's own."""
        for port_id in range(self._rows):
            if moved := self._take("port_counters", port_id):
                return port_id, moved
        return None, self._take("nic_counters", 0) or self._take("function_counters", 0)

    def _take(self, name: str, row: int) -> str | None:
        layout, counters = self._plane.layouts[name], self._own[name]
        size = layout.per_cpu_size(possible_cpus())
        raw = counters.lookup(_U32.pack(row), size)
        if raw is None or not any(raw):
            return None
        counters.update(_U32.pack(row), bytes(size))
        return next(field for field, value in layout.total(raw).items() if _count(value))


def _count(value: Any) -> int:
    return int(value["packets"] if isinstance(value, dict) else value)


def _sample(question: Question, src: str) -> Sample:
    return Sample(question.dst, src, question.vids, question.service, question.size, question.kind)


def _called(name: str) -> str:
    """A row of the port table in words."""
    if name.startswith(_HOST):
        return f"the host on {name.removeprefix(_HOST)}"
    return f"port {name}"


def _require_ours(device: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise UnsupportedError(
            f"{device} does not run exactly the programs of this version of offload "
            f"({found or 'some are missing'}, not {wanted}), so they cannot be asked: "
            "start the daemon of this version, which puts them there"
        )


@contextmanager
def _not_on(cpu: int | None) -> Iterator[None]:
    """Run on other CPUs than this one, unless there are none for us."""
    allowed = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, {*online_cpus()} - {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
