"""Who gets a frame, and with which tags: the rules of the virtual switch as a pure function.

Written from the semantics alone, so that the product can be compared with it. An *end* is one
place where frames go in and come out: a VM's port, the host's interface, or the wire behind
the uplink. A frame belongs to one switch and one VID; VID 0 stands for untagged frames, which
share nothing with any VLAN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

TPID_8021Q = 0x8100
TPID_8021AD = 0x88A8
LINK_LOCAL = "01:80:c2:00:00:0"
"""What addresses begin with that no bridge forwards (IEEE 802.1Q-2018, table 8-1)."""


@dataclass(frozen=True)
class Tag:
    """A VLAN tag. ``pcp`` is its priority."""

    vid: int
    tpid: int = TPID_8021Q
    pcp: int = 0


@dataclass(frozen=True)
class Mode:
    """VIDs of an end. ``native`` goes without a tag (``None``: no VID does), those of ``trunk`` with one."""

    native: int | None = 0
    trunk: frozenset[int] = frozenset()

    @property
    def vids(self) -> frozenset[int]:
        return self.trunk if self.native is None else self.trunk | {self.native}


UNTAGGED = Mode()
WIRE = Mode(0, frozenset(range(1, 4095)))
"""The uplink: untagged frames are VID 0, and every VLAN has its tag."""


@dataclass(frozen=True)
class End:
    """Where frames go in and come out.

    ``macs`` are the addresses that were declared for it; the wire has none. ``heard``: it has sent
    from them; until then it may still be elsewhere, on its way here. ``spoofing``: it may send from
    other addresses and gets frames for unknown ones; ``behind`` are those that it was heard from.
    ``link_local``: it may take part in link-local protocols.
    """

    name: str
    role: Literal["vm", "host", "wire"]
    mode: Mode = UNTAGGED
    macs: frozenset[str] = frozenset()
    heard: bool = True
    spoofing: bool = False
    behind: frozenset[str] = frozenset()
    link_local: bool = False


Topology = Mapping[str, tuple[End, ...]]
"""The ends of every switch, by the switch's name."""


@dataclass(frozen=True)
class Frame:
    """Addresses in lower case with colons; tags from the outside in."""

    dst: str
    src: str
    tags: tuple[Tag, ...] = ()


def who_gets(topology: Topology, sender: str, frame: Frame) -> dict[str, tuple[Tag, ...]]:
    """The names of the ends that get the frame, each with the tags that it sees.

    ``sender`` is an end's name, or that of a device which is no end of a switch: the frame then
    reaches nobody.
    """
    for ends in topology.values():
        start = next((end for end in ends if end.name == sender), None)
        if start is not None and _may_send(start, frame):
            return _switched(ends, start, frame)
    return {}


def _may_send(start: End, frame: Frame) -> bool:
    if start.role == "wire":
        return True
    own = frame.src in start.macs or start.spoofing
    return own and not _is_group(frame.src) and (start.link_local or not _is_link_local(frame.dst))


def _switched(ends: Iterable[End], start: End, frame: Frame) -> dict[str, tuple[Tag, ...]]:
    inside = _entered(start.mode, frame.tags)
    if inside is None:
        return {}
    seen = {end.name: _left(end.mode, inside) for end in _towards(ends, start, frame.dst, inside[0].vid)}
    return {name: tags for name, tags in seen.items() if tags is not None}


def _entered(mode: Mode, tags: tuple[Tag, ...]) -> tuple[Tag, ...] | None:
    """The tags inside the switch, the outer one always there; ``None`` if the frame may not come in."""
    outer, *rest = tags or (Tag(0),)
    if outer.tpid != TPID_8021Q:
        return None
    if outer.vid == 0:  # a priority tag says no VID; its priority stays where there is a tag to hold it
        return None if rest or mode.native is None else (replace(outer, vid=mode.native),)
    if outer.vid not in mode.trunk or (outer.vid == mode.native and rest):
        return None
    return tags


def _left(mode: Mode, inside: tuple[Tag, ...]) -> tuple[Tag, ...] | None:
    """The tags outside of an end; ``None`` if the frame may not go there.

    A second tag needs the first one around it: it never becomes a VID of its own.
    """
    outer, *rest = inside
    if outer.vid == mode.native:
        return None if rest else ()
    return inside if outer.vid in mode.trunk else None


def _towards(ends: Iterable[End], start: End, dst: str, vid: int) -> Iterable[End]:
    others = [end for end in ends if end != start]
    if _is_link_local(dst):
        return [end for end in others if end.link_local or end.role == "wire"]
    if _is_group(dst):
        return others
    owner = next((end for end in ends if dst in end.macs | end.behind and vid in end.mode.vids), None)
    if owner is None:
        return [end for end in others if end.role == "wire" or end.spoofing]
    return [end for end in others if end == owner or (end.role == "wire" and not owner.heard)]


def _is_group(mac: str) -> bool:
    return bool(int(mac[:2], 16) & 1)


def _is_link_local(mac: str) -> bool:
    return mac.startswith(LINK_LOCAL)
