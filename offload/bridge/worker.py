"""The worker: takes frames from the ring, has them switched, sends them out. One thread, one loop."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from offload.bridge import state
from offload.bridge.chain import Chain
from offload.bridge.extension import DROP, FORWARD, Frame
from offload.bridge.membership import Member, Membership, file_version, load, membership_file
from offload.bridge.note import Note
from offload.bridge.switch import Port, Switch, Vlan
from offload.errors import KernelError, OffloadError, UsageError
from offload.kernel.packet import (
    CTAG,
    FRAME,
    HEADER,
    NEEDS_WORK,
    RECEIVED,
    STAMP,
    TAGGED,
    TPID_8021AD,
    VNET,
    Outbox,
    Ring,
    ifindex_of,
    tagged_header,
)

BATCH = 64
"""Frames that are dealt with before the first of them is sent, at most."""
OUTBOX = 256
TICK = 0.1
"""Seconds between looks at what is not a frame: the membership file, the device, the supervisor."""
AGEING_EVERY = 5.0
RECONFIGURED, ENDED = 64, 65
"""Exit codes: the extensions of the config have changed, so start a worker for them; a signal ended it."""

_DONE = object()
_SHORTEST = 14  # bytes: the Ethernet header
_SHORTEST_TAGGED = 18
_REASONS = {
    errno.EMSGSIZE: "too_big",
    errno.EAGAIN: "device_full",
    errno.ENOBUFS: "device_full",
    errno.ENETDOWN: "device_down",
    errno.ENXIO: "device_down",
    errno.ENODEV: "device_down",
}

log = logging.getLogger(__name__)


class Worker:
    """The bridge's working half. ``off``: extensions that are not to run, by ``Configured.key``, and why.

    It goes on with the ring where ``note`` says that the last worker stopped. ``fallback`` is the membership
    to begin with when the file is wrong.
    """

    def __init__(
        self,
        run_dir: Path,
        switch: str,
        ring: Ring,
        note: Note,
        off: Mapping[str, str],
        restarts: state.Restarts,
        fallback: Membership | None,
    ) -> None:
        self._run_dir = run_dir
        self._name = switch
        self._file = membership_file(run_dir, switch)
        self._file_version: tuple[int, ...] | None = ()
        self._ring = ring
        self._memory = ring.map()
        self._outbox = Outbox(ring, self._memory, OUTBOX)
        self._targets: list[tuple[Port, int]] = []
        self._note = note
        self._off = off
        self._restarts = restarts
        self._fallback = fallback
        self._supervisor = os.getppid()
        self._switch = Switch()
        self._membership: Membership | None = None
        self._chain = Chain((), switch, note, {})
        self._ifindex = 0
        self._config_error = ""
        self._drops: Counter[str] = Counter()
        self._writing: Iterator[None] = iter(())
        self._next_tick = self._next_ageing = self._next_writing = 0.0
        self._exit: int | None = None
        self._position = self._released = note.position
        """Slots of the ring: the next one to look at, and the first that the kernel has not got back."""
        self._said: set[str] = set()

    def run(self) -> int:
        """Work until a signal or the supervisor's end; returns the exit code.

        Raises OffloadError on a bad start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end(ENDED))
        self._reload()
        if self._config_error and self._fallback is None:
            raise UsageError(self._config_error)
        if self._config_error and self._fallback is not None:
            self._adopt(self._fallback)
        while self._exit is None:
            self._note.beat()
            now = time.monotonic()
            if now >= self._next_tick:
                self._tick(now)
            busy = self._drain(now)
            writing = self._write_on()
            if not busy:
                self._ring.wait(0 if writing else TICK)
        self._chain.close()
        self._writing = self._write(time.monotonic())
        while self._write_on():
            pass
        return self._exit

    def _end(self, code: int) -> None:
        self._exit = code

    # Frames

    def _drain(self, now: float) -> bool:
        """Deal with what lies in the ring, a batch at most; returns whether there was anything."""
        words, octets = self._memory.words, self._memory.octets
        slots, ports, unpack = self._ring.slots, self._switch.ports, HEADER.unpack_from
        forward, extended = self._switch.forward, self._chain.active
        position, last = self._position, len(slots)
        for _ in range(BATCH):
            slot = slots[position]
            if not (status := words[slot >> 2]) & RECEIVED:
                break
            length, kept, frame_at, tci, tpid, work, dst, src, ethertype, inner = unpack(octets, slot)
            self._position = position
            position = position + 1 if position + 1 < last else 0
            if status & TAGGED != TAGGED or tpid != TPID_8021AD or frame_at != FRAME or kept < length:
                self._drops["malformed"] += 1
                continue
            port = ports.get(tci)
            if port is None:
                self._drops["unknown_member"] += 1
                continue
            port.rx_packets += 1
            port.rx_bytes += length
            if length < (_SHORTEST_TAGGED if ethertype == CTAG else _SHORTEST):
                port.drops["malformed"] += 1
                continue
            vlan = port.vlans.get(socket.ntohs(inner) & 0xFFF if ethertype == CTAG else 0)
            if vlan is None:
                port.drops["vlan"] += 1
                continue
            targets: Sequence[Port]
            if extended:
                targets = self._through_extensions(slot, port, vlan, length, ethertype, dst, src, now)
            else:
                targets = forward(port, vlan, dst, src, now)
            if targets:
                if work & NEEDS_WORK:
                    tagged_header(octets, slot)
                for target in targets:
                    target.tx_packets += 1
                    target.tx_bytes += length
                    self._send(slot, length, target)
        self._position = position
        if position == self._released:
            return False
        self._flush()
        self._release()
        return True

    def _through_extensions(
        self,
        slot: int,
        port: Port,
        vlan: Vlan,
        length: int,
        ethertype: int,
        dst: bytes,
        src: bytes,
        now: float,
    ) -> Sequence[Port]:
        octets, chain = self._memory.octets, self._chain
        start = slot + FRAME
        seconds, nanoseconds = STAMP.unpack_from(octets, slot)
        data = octets[start : start + length].toreadonly()
        frame = Frame(
            port.name,
            vlan.vid,
            dst,
            src,
            int.from_bytes(data[16:18]) if ethertype == CTAG else socket.ntohs(ethertype),
            data,
            octets[slot + VNET : start].toreadonly(),
            seconds * 1_000_000_000 + nanoseconds,
        )
        verdict = chain.verdict(frame)
        targets: Sequence[Port]
        if verdict is FORWARD:
            targets = self._switch.forward(port, vlan, dst, src, now)
        elif verdict is DROP:
            port.drops["extension"] += 1
            targets = ()
        else:
            targets = self._switch.redirect(port, vlan, verdict.member)
        if chain.watched:
            chain.watch(frame, [target.name for target in targets])
        return targets

    def _send(self, slot: int, length: int, target: Port) -> None:
        outbox = self._outbox
        if outbox.waiting == outbox.size:
            self._flush()
            self._release()  # so that no later worker sends again what has gone out
        outbox.add(slot, length, target.id)
        self._targets.append((target, length))

    def _flush(self) -> None:
        if not self._outbox.waiting:
            return
        failures = self._outbox.flush()
        for index, code in failures:
            target, length = self._targets[index]
            target.tx_packets -= 1
            target.tx_bytes -= length
            reason = _REASONS.get(code, "refused")
            target.drops[reason] += 1
            if reason in ("too_big", "refused"):
                self._say_once(self._refusal(reason, code, length))
        self._targets.clear()

    def _refusal(self, reason: str, code: int, length: int) -> str:
        inner = self._inner
        if reason == "too_big":
            return f"{inner}: its MTU is too small for {length + 4} bytes; it must be 8 above its members'"
        return f"{inner}: cannot send a frame out of it: {os.strerror(code)}"

    def _release(self) -> None:
        """Give the slots up to our position back to the kernel."""
        words, slots = self._memory.words, self._ring.slots
        at, end, last = self._released, self._position, len(slots)
        while at != end:
            words[slots[at] >> 2] = 0
            at += 1
            if at == last:
                at = 0
        self._released = self._note.position = end

    # What is not a frame

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK
        if os.getppid() != self._supervisor:
            self._end(1)
            return
        self._reload()
        self._bind()
        if now >= self._next_ageing:
            self._next_ageing = now + AGEING_EVERY
            self._switch.age(now)
        if now >= self._next_writing:
            self._next_writing = now + 1.0
            self._drops["ring"] += self._ring.losses()
            self._chain.second()
            if not self._write_on():
                self._writing = self._write(now)

    def _write_on(self) -> bool:
        """Write a little more of the state file; returns whether there is more to write."""
        try:
            return next(self._writing, _DONE) is not _DONE
        except OSError as error:
            self._writing = iter(())
            self._say_once(f"{error.filename}: cannot be written: {error.strerror}")
            return False

    def _write(self, now: float) -> Iterator[None]:
        current = state.BridgeState(
            switch=self._name,
            pid=os.getpid(),
            written=time.time(),
            inner=self._inner,
            bound=bool(self._ifindex),
            config_error=self._config_error,
            restarts=self._restarts,
            drops=dict(self._drops),
            members=tuple(port.state() for port in self._switch.ports.values()),
            extensions=tuple(self._chain.states()),
        )
        return state.write(self._run_dir, current, self._switch.stations(now))

    @property
    def _inner(self) -> str:
        return self._membership.inner if self._membership else ""

    def _bind(self) -> None:
        """Follow the inner device, which may come late, go, and come back."""
        ifindex = ifindex_of(self._inner) if self._inner else 0
        if ifindex == self._ifindex:
            return
        if ifindex:
            try:
                self._ring.bind(self._inner)
            except KernelError as error:
                log.warning("%s", error)
                return
            log.info("%s: reading frames from it", self._inner)
        else:
            log.warning("%s: the device is gone; waiting for it", self._inner)
        self._ifindex = ifindex

    def _reload(self) -> None:
        """Read the membership if its file is another one; a wrong one leaves the old in force."""
        version = file_version(self._file)
        if version == self._file_version:
            return
        self._file_version = version
        if version is None:
            log.warning("%s: is not there; waiting for it", self._file)
            return
        try:
            membership = load(self._run_dir, self._name)
        except FileNotFoundError:
            self._file_version = ()
            return
        except OffloadError as error:
            self._config_error = str(error)
            log.error("%s", error)
            return
        self._config_error = ""
        self._adopt(membership)

    def _adopt(self, membership: Membership) -> None:
        before, self._membership = self._membership, membership
        if before is not None and before.extensions != membership.extensions:
            log.info("the extensions are others now")
            self._end(RECONFIGURED)
            return
        for line in _differences(before.members if before else (), membership.members):
            log.info("%s", line)
        self._switch.configure(membership)
        if before is None:
            self._begin(membership)
        if before is not None and before.inner != membership.inner:
            self._ifindex = 0

    def _begin(self, membership: Membership) -> None:
        """With the first membership: count on where the last process stopped, and make the extensions."""
        try:
            last = state.read(self._run_dir, self._name)
        except FileNotFoundError:
            pass
        except OffloadError as error:
            log.warning("%s; counting begins anew", error)
        else:
            self._drops.update(last.drops)
            counted = {(member.id, member.name): member for member in last.members}
            for port in self._switch.ports.values():
                if (port.id, port.name) in counted:
                    port.go_on(counted[port.id, port.name])
            now, since = time.monotonic(), max(0.0, time.time() - last.written)
            for station in last.stations:
                if station.age is not None and station.age + since < membership.ageing:
                    mac = bytes.fromhex(station.mac.replace(":", ""))
                    self._switch.learn(station.vid, mac, station.member, now - station.age - since)
        off = {
            number: self._off[item.key]
            for number, item in enumerate(membership.extensions)
            if item.key in self._off
        }
        self._chain = Chain(membership.extensions, self._name, self._note, off)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.error("%s", what)


def _differences(before: Sequence[Member], after: Sequence[Member]) -> Iterator[str]:
    old, new = ({member.name: member for member in members} for members in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"member {name}: gone"
        elif name not in old:
            yield f"member {name}: here, {_described(new[name])}"
        elif old[name] != new[name]:
            yield f"member {name}: now {_described(new[name])}"


def _described(member: Member) -> str:
    vids = ",".join(map(str, sorted(member.vids)))
    shown = f"{vids[:40]}..." if len(vids) > 40 else vids
    flags = [flag for flag in ("learn", "flood", "link_local") if getattr(member, flag)]
    return (
        f"id {member.id}, {member.role}, VIDs {shown or 'none'}, {' '.join([*flags, *member.macs])}".rstrip(
            ", "
        )
    )
