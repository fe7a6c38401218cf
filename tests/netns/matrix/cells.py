"""The combinations, and for each one the frame that tries it.

A ``Cell`` is one combination, ``frame_of`` makes its frame. ``site`` has the ends that frames
come from and go to: VMs of every VLAN mode on every switch, those with a queue and those without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from tests.netns.matrix.oracle import TPID_8021AD, UNTAGGED, WIRE, End, Frame, Mode, Tag, Topology, who_gets
from tests.netns.matrix.pairwise import pairwise

Bridge = Literal["kernel", "python"]

MODES: dict[str, Mode] = {
    "u": UNTAGGED,
    "a": Mode(10),
    "b": Mode(20),
    "t": Mode(None, frozenset({10, 20})),
    "n": Mode(20, frozenset({10, 30})),
}
"""VLAN modes of VMs by a letter of their names: untagged, access 10 and 20, trunk without and with native."""
PAIRED = ("u", "a", "t")
"""Modes of which a switch has two VMs with a queue and two without; of the others it has one of each."""
HOST_MODES = ("u", "a")


class Vlan(NamedTuple):
    """A case of the VLAN column: the sender's mode, the receiver's, and the VID that the frame is of.

    A trunk or the wire shows the VID by a tag, other senders have no choice. ``vid`` 0: no tag.
    """

    sender: str
    receiver: str
    vid: int


VLANS: dict[str, Vlan] = {
    "none": Vlan("u", "u", 0),
    "same": Vlan("a", "a", 10),
    "other": Vlan("a", "b", 10),
    "other-back": Vlan("b", "a", 20),
    "none-to-vlan": Vlan("u", "a", 0),
    "vlan-to-none": Vlan("a", "u", 10),
    "trunk": Vlan("t", "t", 20),
    "trunk-to-access": Vlan("t", "a", 10),
    "access-to-trunk": Vlan("a", "t", 10),
    "trunk-to-other": Vlan("t", "b", 10),
    "trunk-to-none": Vlan("t", "u", 10),
    "not-of-the-trunk": Vlan("t", "n", 30),
    "no-native": Vlan("t", "u", 0),
    "native-to-access": Vlan("n", "b", 20),
    "access-to-native": Vlan("b", "n", 20),
    "native-to-trunk": Vlan("n", "t", 20),
    "trunk-to-native": Vlan("t", "n", 20),
    "none-to-native": Vlan("u", "n", 0),
    "native-to-none": Vlan("n", "u", 20),
}
HOSTED = ("int", "exth")
"""Switches with a host. With VLANs each has a twin, with 10 in its name, whose host is in VLAN 10."""
ODD = ("oddp", "odde")
"""Switches, private and external, with ports that were not heard and ports that may spoof."""
UPLINKS = {switch: f"{switch}-n" for switch in ("ext", "exth", "exth10", "odde")}
"""The NICs of the external switches."""
WIRE_SENDER = "02:aa:00:00:ff:01"
STRANGER = "02:15:5d:fe:00:01"
"""The MACs of whoever sends from a wire, and from a device where nobody should."""
KINDS = ("private", "internal", "external", "external+host")
WAYS = ("vm-vm", "vm-host", "host-vm", "vm-wire", "wire-vm", "host-wire", "wire-host")
CASTS = ("unicast", "broadcast", "multicast", "unknown")
QUEUES = ("queue", "off")
TAGS = ("plain", "priority", "foreign", "stacked", "802.1ad")
SHAPES = ("test", "ipv4", "arp")

GROUPS = {"broadcast": "ff:ff:ff:ff:ff:ff", "multicast": "01:00:5e:00:00:fb"}
UNKNOWN = "02:15:5d:ff:ff:ff"


HOSTS_DEVICE = "host's "
"""Before the name of a device in the host's namespace that is no end of a switch: bridges, ends of ports."""


class Cell(NamedTuple):
    """One combination. ``sender`` and ``receiver`` say whether that end, if it is a VM, has a queue."""

    kind: str
    way: str
    vlan: str
    cast: str
    sender: str
    receiver: str
    tags: str
    shape: str
    bridge: Bridge

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def ends(self) -> tuple[str, str]:
        """``vm``, ``host`` or ``wire``, twice."""
        start, _, target = self.way.partition("-")
        return start, target


@dataclass(frozen=True)
class Sending:
    """A frame, and the end or device that sends it. ``shape``: what is in it."""

    sender: str
    frame: Frame
    shape: str = "test"


@cache
def every(bridge: Bridge) -> tuple[Cell, ...]:
    """All combinations that say something of their own."""
    columns = (KINDS, WAYS, VLANS, CASTS, QUEUES, QUEUES, TAGS, SHAPES, (bridge,))
    return tuple(cell for cell in map(Cell._make, product(*columns)) if _has_meaning(cell))


def some(bridge: Bridge) -> list[Cell]:
    """All pairs of values, four times over: with and without VLANs, of frames that somebody gets or nobody.

    Else a pair might be tried in one cell only, where a third value keeps the frame from everybody.
    """
    groups: dict[tuple[bool, bool], list[Cell]] = {}
    for cell in every(bridge):
        sending = sending_of(cell)
        got = bool(who_gets(topology(bridge), sending.sender, sending.frame))
        groups.setdefault((uses_vlans(cell), got), []).append(cell)
    return [cell for group in groups.values() for cell in pairwise(group)]


def uses_vlans(cell: Cell) -> bool:
    """Whether an end of the cell is in a VLAN."""
    return cell.vlan != "none"


def _has_meaning(cell: Cell) -> bool:
    vlan = VLANS[cell.vlan]
    if cell.bridge == "python" and cell.kind == "external+host":
        return False  # refused: the host's own traffic shall not hang on a process
    for end, mode, queue in zip(cell.ends, vlan[:2], (cell.sender, cell.receiver), strict=True):
        if end != "vm" and queue != QUEUES[0]:
            return False
        if end == "host" and mode not in HOST_MODES:
            return False
    # The wire is in every VLAN: one case for each of what the other end is and of what is sent.
    if "wire" in cell.ends and cell.vlan not in _WIRE_VLANS[cell.ends.index("wire")]:
        return False
    return cell.shape == "test" or cell.tags == "plain"


def _one_for_each(column: int) -> frozenset[str]:
    """A case of ``VLANS`` for every value of the columns without ``column``."""
    found = {vlan[:column] + vlan[column + 1 :]: name for name, vlan in reversed(VLANS.items())}
    return frozenset(found.values())


_WIRE_VLANS = (_one_for_each(0), _one_for_each(1))


@cache
def topology(bridge: Bridge, vlans: bool = True) -> Topology:
    """The switches that a bridge's cells share. Without ``vlans`` all of their ends are untagged."""
    names = ("priv", "int", "int10", "ext", "exth", "exth10", *ODD)
    numbers = {name: number for number, name in enumerate(names)}
    return {
        name: tuple(_ends(number, name, vlans))
        for name, number in numbers.items()
        if (vlans or not name.endswith("10")) and not (bridge == "python" and name.startswith("exth"))
    }


def _ends(number: int, switch: str, vlans: bool) -> Iterator[End]:
    for copy in (1, 2) if switch in ODD else ():
        macs = [f"02:15:5d:{number:02x}:{kind:02x}:{copy:02x}" for kind in range(4)]
        yield End(f"{switch}-u{copy}", "vm", macs=frozenset({macs[0]}))
        yield End(f"{switch}-q{copy}", "vm", macs=frozenset({macs[1]}), heard=False)
        behind = frozenset({macs[3]})
        yield End(f"{switch}-s{copy}", "vm", macs=frozenset({macs[2]}), spoofing=True, behind=behind)
    for letter, mode in MODES.items() if switch not in ODD else ():
        for copy in range(1, 5 if letter in PAIRED else 3):
            if vlans or mode == UNTAGGED:
                mac = f"02:15:5d:{number:02x}:{ord(letter):02x}:{copy:02x}"
                yield End(f"{switch}-{letter}{copy}", "vm", mode, frozenset({mac}))
    if switch.rstrip("10") in HOSTED:
        mode = MODES["a" if switch.endswith("10") else "u"]
        yield End(f"{switch}-h", "host", mode, frozenset({f"02:15:5d:{number:02x}:00:01"}))
    if switch in UPLINKS:
        yield End(f"{switch}-w", "wire", WIRE)


def has_queue(vm: str) -> bool:
    """Whether the VM of this name has a queue."""
    return int(vm[-1]) % 2 == 1


def odd_sendings(bridge: Bridge) -> Iterator[Sending]:
    """From everybody who may send on the switches of ``ODD`` to everybody's addresses."""
    for switch in ODD:
        ends = topology(bridge)[switch]
        known = [mac for end in ends for mac in sorted(end.macs | end.behind)]
        for end in ends:
            for src in sorted(end.macs | end.behind) or [WIRE_SENDER]:
                for dst in (*GROUPS.values(), UNKNOWN, *known) if end.heard else ():
                    yield Sending(end.name, Frame(dst, src))


def sending_of(cell: Cell) -> Sending:
    """What is sent in a cell, on the topology with as many VLANs as the cell needs.

    Where the switch has no host, the host sends out of the bridge device; where it has no wire,
    another switch's wire is taken: neither may reach it.
    """
    vlan, switch = VLANS[cell.vlan], _switch_of(cell)
    ends = {end.name: end for ends in topology(cell.bridge).values() for end in ends}
    start, target = (
        _end_name(switch, role, mode, queue, second)
        for role, mode, queue, second in zip(
            cell.ends, vlan[:2], (cell.sender, cell.receiver), (False, True), strict=True
        )
    )
    dst = GROUPS.get(cell.cast) or (UNKNOWN if cell.cast == "unknown" else mac_of(ends.get(target)))
    mode = ends[start].mode if start in ends else UNTAGGED
    tags = () if vlan.vid == mode.native or not mode.trunk or not vlan.vid else (Tag(vlan.vid),)
    frame = Frame(dst, mac_of(ends.get(start)), _varied(tags, cell.tags))
    return Sending(start, frame, cell.shape)


def _switch_of(cell: Cell) -> str:
    """Where the host takes part, it is a switch where it is in the right VLAN."""
    name = {"private": "priv", "internal": "int", "external": "ext", "external+host": "exth"}[cell.kind]
    in_vlan = "host" in cell.ends and VLANS[cell.vlan][cell.ends.index("host")] == "a"
    return name + "10" if in_vlan and name in HOSTED else name


def _end_name(switch: str, role: str, mode: str, queue: str, second: bool) -> str:
    if role == "wire":
        return f"{switch if switch in UPLINKS else 'ext'}-w"
    if role == "host":
        return f"{switch}-h" if switch.rstrip("10") in HOSTED else HOSTS_DEVICE + switch
    return f"{switch}-{mode}{1 + QUEUES.index(queue) + (2 if second and mode in PAIRED else 0)}"


def mac_of(end: End | None) -> str:
    """The address to reach an end by, or to send from on a wire; ``STRANGER`` for no end."""
    return next(iter(end.macs), WIRE_SENDER) if end else STRANGER


def _varied(tags: tuple[Tag, ...], how: str) -> tuple[Tag, ...]:
    outer, *rest = tags or (Tag(0),)
    match how:
        case "priority":
            return (replace(outer, pcp=5), *rest)
        case "foreign":
            return (Tag(10 if not outer.vid else 4000), *rest)
        case "stacked":
            return (outer, *rest, Tag(10))
        case "802.1ad":
            return (Tag(outer.vid or 10, TPID_8021AD), *rest)
    return tags
