"""Where a frame goes and why, told from what the loaded programs did with one like it.

Pure: ``kernel/explain.py`` runs the programs and brings what they counted; here is the frame that
they are run on, and what the outcome means to an operator. Which counter stands for which decision
is in ``bpf/abi.h``, the decisions in their order at the top of ``bpf/vmq.c`` and ``bpf/switch.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from .hardware import Function, Rule
from .model import MemberRow, NetworkRow, PortRecord, StationState
from .plan import BYPASS, RUNNING
from .views import ExplainStep, ExplainView, Verdict, VlanAction

Kind = Literal["plain", "tcp", "dhcp-server", "router-advertisement"]

MADE_UP = "02:ff:ff:ff:ff:fe"
"""A locally administered address: who sends from the wire, unless the question says it."""

_TAG_8021Q, _TAG_8021AD = 0x8100, 0x88A8
_PAYLOADS: dict[Kind, tuple[int, bytes]] = {
    # IEEE 802 local experimental, so that no protocol stack would answer
    "plain": (0x88B5, b""),
    # RFC 791 and 9293: an empty segment from 192.0.2.1, port 1, to 192.0.2.2, port 1, with an ACK
    "tcp": (
        0x0800,
        bytes.fromhex("4500002800000000 4006f6cc c0000201 c0000202")
        + bytes.fromhex("00010001 00000000 00000000 50100000 00000000"),
    ),
    # RFC 791, 768 and 2131: 0.0.0.0, UDP port 67, to 255.255.255.255, port 68; without a UDP checksum
    "dhcp-server": (
        0x0800,
        bytes.fromhex("4500001c00000000 40117ad2 00000000 ffffffff 00430044 00080000"),
    ),
    # RFC 8200 and 4861: fe80::1 to ff02::1, ICMPv6 type 134; nobody here looks at its checksum
    "router-advertisement": (
        0x86DD,
        bytes.fromhex("60000000 0010 3a ff")
        + bytes.fromhex("fe80").ljust(15, b"\0")
        + b"\1"
        + bytes.fromhex("ff02").ljust(15, b"\0")
        + b"\1"
        + b"\x86".ljust(16, b"\0"),
    ),
}


@dataclass(frozen=True)
class Sample:
    """A frame to ask about.

    ``vids`` are of its tags, the outermost first; with ``service`` that one is of 802.1ad. ``size`` is in
    bytes, with neither tags nor FCS; a ``kind`` that needs more takes more.
    """

    dst: str
    src: str
    vids: tuple[int, ...] = ()
    service: bool = False
    size: int = 60
    kind: Kind = "plain"

    @property
    def vid(self) -> int:
        """Of the outermost tag; 0 without one."""
        return self.vids[0] if self.vids else 0

    @property
    def group(self) -> bool:
        """Whether it is a broadcast or multicast."""
        return bool(int(self.dst[:2], 16) & 1)

    def octets(self) -> bytes:
        """The frame as a wire has it, without FCS."""
        first = _TAG_8021AD if self.service else _TAG_8021Q
        tags = [(_TAG_8021Q if at else first, vid) for at, vid in enumerate(self.vids)]
        ethertype, payload = _PAYLOADS[self.kind]
        head = b"".join(bytes.fromhex(mac.replace(":", "")) for mac in (self.dst, self.src))
        rest = struct.pack("!H", ethertype) + payload
        return head + b"".join(struct.pack("!HH", *tag) for tag in tags) + rest.ljust(self.size - 12, b"\0")

    def for_tc(self) -> Sample:
        """What a tc program has to be run on to see this frame's length.

        Of real frames it sees the outermost tag beside the data, which a test run cannot have.
        """
        return replace(self, size=max(self.size - 4, 14)) if self.vids else self

    def inside(self, pvid: int) -> Sample:
        """The frame as it is within a switch, where a port's frames without a VID belong to ``pvid``."""
        if self.vid:
            return self
        return replace(self, vids=((pvid,) if pvid else ()) + self.vids[1:])

    def stripped(self) -> Sample:
        """The frame without its outermost tag."""
        return replace(self, vids=self.vids[1:], service=False)


@dataclass(frozen=True)
class Step:
    """One program's run: what it returned, and the counter that moved, of ``port`` or else of ``device``.

    That is where the program stands. No counter moves where a frame ends that is somebody else's, and on the
    way from a virtual function to its NIC.
    """

    program: str
    device: str
    verdict: Literal["pass", "drop", "redirect"]
    counter: str | None
    port: str | None = None

    @property
    def strayed(self) -> bool:
        """Whether the frame goes from a virtual function to its NIC."""
        return self.program == "strayed" and self.verdict == "redirect"


@dataclass(frozen=True)
class Owner:
    """Whose an address is on a switch, in the VLAN in question, and where it was heard last."""

    record: PortRecord
    role: Literal["port", "host"]
    state: StationState

    @property
    def name(self) -> str:
        return f"port {self.record.name}" if self.role == "port" else "the host"


@dataclass(frozen=True)
class Scene:
    """What is to be known of a switch to explain a decision.

    ``nic`` is its uplink, ``sender`` the row of the port that the frame comes from and ``None`` for the
    wire, ``owner`` whose the destination is, and ``elsewhere`` the ports and VIDs that have it otherwise.
    ``target`` is the port that the frame was given to, with ``af_xdp`` when that has sockets. ``by_nic``
    is how the NIC was read back to sort such frames by itself, ``served`` the name of the port that the
    program on that virtual function delivers to.
    """

    network: NetworkRow | None
    nic: str | None
    asked: str
    sender: MemberRow | None = None
    owner: Owner | None = None
    elsewhere: tuple[tuple[str, int], ...] = ()
    target: PortRecord | None = None
    af_xdp: bool = False
    rx_queue: int = 0
    by_nic: Function | Rule | None = None
    served: str | None = None


def sorted_by(sample: Sample, sorting: Iterable[Function | Rule]) -> Function | Rule | None:
    """The first of what a NIC sorts by itself that fits a frame. A tag of 802.1ad is none to it."""
    vid = 0 if sample.service else sample.vid
    return next((one for one in sorting if one.mac == sample.dst and one.vid in (None, vid)), None)


def answer(sample: Sample, delivered: Sample, steps: tuple[Step, ...], scene: Scene) -> ExplainView:
    """What became of ``sample``, which was as ``delivered`` when the last of our programs let it go."""
    told = _Told(sample, steps, scene)
    verdict, reason = told.verdict()
    last = steps[-1] if steps else None
    target = scene.target if verdict in ("queue", "af_xdp") else None
    queued = target if scene.sender is None else None
    blamed = last.port if last and verdict == "drop" else None
    return ExplainView(
        verdict=verdict,
        port=target.name if target else blamed if blamed and ":" not in blamed else None,
        queue=queued.queue or None if queued else None,
        cpu=queued.cpu if queued and told.xdp not in ("socket", "left") else None,
        vlan_action="none" if verdict == "drop" else vlan_action(sample, delivered),
        reason=reason,
        steps=[
            ExplainStep(program=step.program, device=step.device, counter=step.counter, port=step.port)
            for step in steps
        ],
    )


def vlan_action(before: Sample, after: Sample) -> VlanAction:
    """What happened to a frame's outermost tag. VID 0 made another VID is a push."""
    if after.vids == before.vids:
        return "none"
    return "strip" if len(after.vids) < len(before.vids) else "push"


_TAG_RULE = "802.1ad tags reach no port, and second tags only trunks, behind a VID that stays on"
_MOVED = "its VM has moved, or another machine has its address"


class _Told:
    """The sentences for one question."""

    def __init__(self, sample: Sample, steps: tuple[Step, ...], scene: Scene) -> None:
        self.sample = sample
        self.steps = steps
        self.scene = scene
        self.switch = scene.network.name if scene.network else "no switch"
        pvid = scene.sender.pvid if scene.sender else 0
        self.vid = sample.inside(pvid or 0).vid
        self.to = f"{sample.dst} {_in_vlan(self.vid)}"
        self.target = f"port {scene.target.name}" if scene.target else "the port"
        self.filter = f"a filter on {scene.nic} gives {self.to} to {self.target}"
        self.xdp = next(
            (each.counter for each in reversed(steps) if each.program in ("uplink", "queue", "function")),
            None,
        )

    def verdict(self) -> tuple[Verdict, str]:
        """What the NIC does with the frame by itself, if it does, comes first."""
        verdict, reason = self._decided()
        by_nic = self.scene.by_nic
        return verdict, f"{self._sorted(by_nic)}; {reason}" if by_nic else reason

    def _sorted(self, by_nic: Function | Rule) -> str:
        if isinstance(by_nic, Rule):
            return f"a rule in {self.scene.nic} gives {self.to} to RX queue {by_nic.rx_queue}"
        gives = f"{self.scene.nic} gives {by_nic.mac} {_in_vlan(by_nic.vid)} to its virtual function"
        if not by_nic.vid:
            return f"{gives} {by_nic.device}, as read back"
        return (
            f"{gives} {by_nic.device} and strips the tag, so that the VLAN rests on the hardware: it was "
            f"read back as {by_nic.vid}"
        )

    def _decided(self) -> tuple[Verdict, str]:
        scene = self.scene
        if not self.steps:
            return "host", f"{scene.asked} is in no switch: the host's own stack gets its frames"
        last = self.steps[-1]
        match last.program, last.counter:
            case "uplink", "socket":
                return (
                    "af_xdp",
                    f"{self.filter}, which has a socket on RX queue {scene.rx_queue} of {scene.nic}",
                )
            case "uplink" | "queue" | "function", "direct" | "handed":
                return "queue", f"{self.filter}: {self._served}"
            case "guard", "merged":
                return "queue", (
                    f"{self.filter}, which has it merged with its neighbours first (GRO), on the CPU of "
                    f"the RX queue of {scene.nic}"
                )
            case "function", "stranger":
                return "drop", self._strange(last.device)
            case "function", None:
                return "drop", f"{last.device} is down, or without a link"
            case "strayed", _:
                return "drop", f"no port of {self.switch} has {self.to}, so that {last.device} drops it"
            case "uplink" | "queue" | "function", "vlan_nic" | "vlan_queue":
                return "drop", f"port {last.port} must not get {self._tags}: {_TAG_RULE}"
            case "wire", "tx_bridge":
                return "bridge", f"{self._missed}: it goes to the bridge of {self.switch}"
            case "wire", _:
                return "drop", f"no frame from the wire may bring {self._tags} into {self.switch}"
            case "guard", _:
                return self._guarded(last, scene.owner)
            case "channel", "no_consumer":
                return "drop", f"it is for {self.target}, whose consumer has put no socket into its map"
            case "channel", _:
                way = self.filter if scene.sender is None else f"past the bridge it reaches {self.target}"
                return "af_xdp", f"{way}, whose consumer has a socket at its software channel"
            case "sent", "tx_direct":
                return "uplink", f"{self._not_here}: it leaves by {scene.nic}, past the bridge"
            case "sent", "tx_bridge":
                return "bridge", f"{self._not_past}: it goes to the bridge of {self.switch}"
            case "sent", "tx_local":
                return "drop", f"{self.to} is an address of {scene.asked} itself"
            case _:
                return "drop", self._refused(last.counter)

    @property
    def _tags(self) -> str:
        if self.sample.service:
            return "an 802.1ad tag"
        if len(self.sample.vids) > 1:
            return f"a second tag behind VID {self.sample.vid}"
        return f"a tag of VLAN {self.sample.vid}" if self.sample.vids else "a frame without a tag"

    @property
    def _served(self) -> str:
        cpu = self.scene.target.cpu if self.scene.target else None
        served = "on the CPU of the NIC's RX queue" if cpu is None else f"by CPU {cpu}"
        return f"its queue is served {served}"

    def _strange(self, device: str) -> str:
        """Why the program on a virtual function knows nobody for a frame."""
        served, owner = self.scene.served, self.scene.owner
        if served is None:
            return f"{device} delivers to nobody just now"
        if self.sample.service or len(self.sample.vids) > 1:
            return f"port {served} must not get {self._tags}: {_TAG_RULE}"
        if owner and owner.record.name == served:
            return f"{device} drops what no filter on {self.scene.nic} has, {self._why_no_filter}"
        return f"{device} delivers to port {served}, and drops what is for anybody else"

    def _guarded(self, last: Step, owner: Owner | None) -> tuple[Verdict, str]:
        """By the program at the device that a frame was handed to past the bridge."""
        who = owner.name if owner else self.target
        if last.counter == "local" and owner and owner.role == "host":
            return (
                "host",
                f"{self.to} is the host's on {self.switch}: handed to its interface past the bridge",
            )
        if last.counter == "local":
            return "queue", (
                f"{self.to} is an address of {who} on the same switch: handed to its device past the bridge, "
                "and past the queues, which are for frames from the wire"
            )
        if last.counter == "vlan_bridge":
            return "drop", f"{who} must not get {self._tags}: {_TAG_RULE}"
        return "drop", f"{last.device} lets no such frame out ({last.counter or 'not counted'})"

    # From the wire

    @property
    def _missed(self) -> str:
        """Why XDP passed the frame."""
        nic, owner = self.scene.nic, self.scene.owner
        who = owner.name if owner else "its port"
        match self._left(owner.record) if owner and self.xdp == "passed" else self.xdp:
            case None:
                return f"the fast path of {nic} is detached"
            case "broadcast" | "multicast" as group:
                others = [step.device for step in self.steps if step.program == "function"]
                has = f", and {' and '.join(others)} may have it too and drop theirs" if others else ""
                return f"a {group} is for many{has}"
            case "no_filter":
                return f"no filter on {nic} has {self.to}, {self._why_no_filter}"
            case "paused" if owner and owner.state == "away":
                return f"{who} was last heard from the wire: {_MOVED}"
            case "paused":
                return f"{who} takes nothing from its queue just now: its device, or the other end, is down"
            case "no_device" | "returned" if owner and not owner.record.ifindex:
                return f"the device of {who} is away"
            case "no_cpu":
                return f"the queue of {who} is on a CPU that does not serve {nic}: is the daemon running?"
            case "too_big":
                return self._too_long(who, owner.record if owner else None)
            case "frags":
                return f"it comes in several buffers, and the device of {who} takes frames of one only"
            case "malformed":
                return "it ends in its own headers"
            case other:
                return f"{who} could not be handed it ({other})"

    def _left(self, record: PortRecord) -> str:
        """Why the program on a virtual function left a frame to the NIC: those are counted together."""
        if not record.flags & RUNNING:
            return "paused" if record.ifindex else "no_device"
        return "too_big" if self.sample.size > record.max_len else "passed"

    @property
    def _why_no_filter(self) -> str:
        owner = self.scene.owner
        if owner is None and self.scene.elsewhere:
            who = ", ".join(f"{port} {_in_vlan(vid)}" for port, vid in self.scene.elsewhere)
            return f"which is an address of {who}"
        if owner is None:
            return f"and no port of {self.switch} has that address"
        if owner.state == "expected":
            return f"as nothing was heard from {owner.name} yet: its first frame brings the filter"
        if owner.state == "away":
            return (
                f"as {owner.name} was last heard from the wire: {_MOVED}, and its next frame brings it back"
            )
        if owner.role == "host" or not owner.record.flags & BYPASS:
            return f"as {owner.name} gets nothing past the bridge: `queue: off`, or something is down or away"
        if not owner.record.queue:
            return f"as {owner.name} has no queue: `offload ports {owner.record.name}` says why"
        return f"though {owner.name} has a queue: is the daemon running?"

    # From a port

    @property
    def _not_here(self) -> str:
        owner = self.scene.owner
        if owner:
            return f"{owner.name} was last heard from the wire: {_MOVED}"
        return f"no port of {self.switch} has {self.to}"

    @property
    def _not_past(self) -> str:
        """Why a frame goes to the bridge that a port sends."""
        scene, owner = self.scene, self.scene.owner
        if self.sample.group:
            return "a broadcast or multicast is for many"
        if scene.sender and not scene.sender.bypass:
            return f"{scene.asked} sends nothing past the bridge: `queue: off`, or the fast path is detached"
        if owner and owner.state == "expected":
            return f"nothing was heard from {owner.name} yet"
        if owner and owner.state == "here":
            return self._not_handed(owner)
        if scene.network and scene.network.ask_bridge:
            return (
                f"{self.switch} has a port that may send from any address: its bridge knows who has {self.to}"
            )
        if scene.nic is None:
            return f"{self._not_here}, and {self.switch} has no uplink"
        return f"{scene.nic} is not handed it past the bridge: it is too long, or the NIC is away"

    def _not_handed(self, owner: Owner) -> str:
        """Why an address that was heard is not handed its frame past the bridge."""
        if not owner.record.flags & BYPASS:
            return f"{owner.name} is handed nothing past the bridge: `queue: off`, or its device is down"
        if self.sample.size > owner.record.max_len:
            return self._too_long(owner.name, owner.record)
        return f"the device of {owner.name} is away"

    def _too_long(self, who: str, record: PortRecord | None) -> str:
        limit = f" ({record.max_len} bytes)" if record else ""
        return f"{self.sample.size} bytes are more than the MTU of {who} has room for{limit}: raise it"

    def _refused(self, counter: str | None) -> str:
        """Why a port may not send a frame."""
        who = self.scene.asked
        match counter:
            case "vlan_sent":
                return f"{who} may not send {self._tags}: {self._vlan_rule}"
            case "spoofed":
                return (
                    f"{self.sample.src} {_in_vlan(self.vid)} is no address of {who}: "
                    "add it to the port's `mac`, or allow mac_spoofing"
                )
            case "guard_dhcp":
                return f"{who} may not answer as a DHCP server: allow dhcp_server if it is one"
            case "guard_ra":
                return f"{who} may not advertise itself as a router: allow router_advertisement if it is one"
            case "link_local":
                return f"{who} may not send to {self.sample.dst}: allow link_local_protocols if it shall"
            case _:
                return f"{who} may not send it ({counter or 'not counted'})"

    @property
    def _vlan_rule(self) -> str:
        sender = self.scene.sender
        if self.sample.service or len(self.sample.vids) > 1:
            return _TAG_RULE
        if sender and sender.trunk:
            return "its trunk has not that VLAN" if self.sample.vid else "its trunk has no native VLAN"
        return "only a trunk's frames have a tag"


def _in_vlan(vid: int) -> str:
    return f"in VLAN {vid}" if vid else "untagged"
