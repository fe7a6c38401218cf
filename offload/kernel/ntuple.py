"""Steering rules in a NIC: frames to a MAC go to the RX queue that the rule names, whatever RSS says.

``ethtool -N`` makes the same ones, by the same ioctls. Source of the layouts: include/uapi/linux/ethtool.h,
``struct ethtool_rxnfc`` and ``struct ethtool_rx_flow_spec``, as a 64-bit process has them. They are in
host byte order, but for what is compared with a frame: that is big endian.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from offload.config import mac_octets
from offload.errors import ForeignError, UnsupportedError, VerifyError
from offload.hardware import Rule
from offload.kernel.ethtool import Ethtool
from offload.kernel.failures import explain, explained
from offload.kernel.host import Answer
from offload.steering import STEERING_FEATURE

_GRXCLSRLCNT = 0x2E
_GRXCLSRULE = 0x2F
_GRXCLSRLALL = 0x30
_SRXCLSRLDEL = 0x31
_SRXCLSRLINS = 0x32

_ETHER_FLOW = 0x12
_FLOW_EXT = 0x80000000  # the rule looks at the tag, too
_LOC_SPECIAL = 0x80000000  # RX_CLS_LOC_SPECIAL: the driver can choose the location
_LOC_ANY = 0xFFFFFFFF

# flow type, values, more values, masks, more masks, what to do, location
_SPEC = struct.Struct("@I52s20s52s20sQI0Q")
# cmd, flow type, data, struct ethtool_rx_flow_spec, number of rules. Locations follow at once, although
# the C struct, whose size the kernel wants, has four bytes more.
_COMMAND = struct.Struct(f"@IIQ{_SPEC.size}sI")
_LOCATION = struct.Struct("@I")
_ETHER = struct.Struct("!6s46x")  # struct ethhdr: the destination, the rest of the union
_EXT = struct.Struct("!10xH8x")  # struct ethtool_flow_ext: the tag control information

_EXACT_MAC = _ETHER.pack(b"\xff" * 6)
_EXACT_VID = _EXT.pack(0x0FFF)
_NOTHING = bytes(_EXT.size)
_NO_RULE = bytes(_SPEC.size)

_ENOTSUPP = 524  # the kernel's own, include/linux/errno.h: some drivers let it out
_REFUSALS = (errno.EOPNOTSUPP, errno.EINVAL, _ENOTSUPP)
_CHANGED = (errno.ENOENT, errno.EINVAL, errno.EMSGSIZE)
"""What drivers say of a rule that went, or of rules that came, since they were counted."""

_NOBODY = "00:00:5e:00:53:00"  # RFC 7042, section 2.1.2: for documentation
_LAST_VID = 4094


class _Reply(NamedTuple):
    data: int
    rule: Rule
    number: int
    locations: tuple[int, ...]


def rules(ethtool: Ethtool, ifname: str) -> tuple[Rule, ...]:
    """All rules in a NIC, by location; none where it cannot have any."""
    try:
        with explained(ifname, "read its steering rules"):
            return _rules(ethtool, ifname)
    except UnsupportedError:
        return ()


def insert(
    ethtool: Ethtool, ifname: str, mac: str, vid: int | None, rx_queue: int, taken: Collection[int] = ()
) -> int:
    """Have a NIC put the frames to ``mac`` into ``rx_queue``; returns the rule's location.

    ``vid`` ``None``: whatever tag they have. A NIC goes by the first rule that fits, so where we choose
    the location, rules with a VID come before those without; ``taken`` are left free. Raises
    UnsupportedError that says what to do, or ForeignError when there is a rule for such frames.
    """
    tag = "" if vid is None else f" in VLAN {vid}"
    try:
        return _insert(ethtool, ifname, Rule(_LOC_ANY, mac, vid, rx_queue), taken)
    except OSError as error:
        doing = f"steer {mac}{tag} to RX queue {rx_queue}"
        said = f"{ifname}: cannot {doing}: {error.strerror or error}"
        if error.errno == errno.EEXIST:
            raise ForeignError(f"{said} (a rule that is not ours: `ethtool -n {ifname}`)") from error
        if error.errno in (*_REFUSALS, errno.ENOSPC):
            raise UnsupportedError(f"{said} ({_remedy(ethtool, ifname, error)})") from error
        raise explain(error, ifname, doing) from error


def delete(ethtool: Ethtool, ifname: str, location: int) -> None:
    """Delete the rule at ``location``; VerifyError when it is still there."""
    with explained(ifname, f"delete its steering rule {location}"):
        _ask(ethtool, ifname, _SRXCLSRLDEL, _at(location))
        left = _listed(ethtool, ifname).locations
    if location in left:
        raise VerifyError(
            f"{ifname}: steering rule {location} is still there: `ethtool -N {ifname} delete {location}`"
        )


def could_tell_without_trying(ethtool: Ethtool, ifname: str) -> Answer:
    """Whether it is certain that a NIC takes no rules. That it takes them, only ``probe`` can tell."""
    no = "nothing: its driver cannot steer by MAC"
    active, fixed = ethtool.features(ifname).get(STEERING_FEATURE, (False, True))
    if fixed and not active:
        return Answer("no", f"{STEERING_FEATURE} is off, and fixed", no)
    try:
        with explained(ifname, "count its steering rules"):
            _ask(ethtool, ifname, _GRXCLSRLCNT)
    except UnsupportedError as error:
        return Answer("no", str(error), no)
    return Answer("unknown", "only a trial tells which rules a driver takes", "offload doctor --probe")


def probe(ethtool: Ethtool, ifname: str) -> Answer:
    """Whether a NIC takes rules, by making one that nobody's frames fit, and deleting it.

    By MAC and VLAN first, then by MAC alone: few ports need the VLAN in their rule.
    """
    known = could_tell_without_trying(ethtool, ifname)
    if known.state == "no":
        return known
    for vid, what in ((_LAST_VID, "MAC and VLAN"), (None, "MAC, though not by MAC and VLAN,")):
        try:
            location = _insert(ethtool, ifname, Rule(_LOC_ANY, _NOBODY, vid, 0), ())
        except OSError as error:
            refusal = error
        else:
            delete(ethtool, ifname, location)
            return Answer("yes", f"a rule by {what} was inserted and deleted")
        if refusal.errno not in _REFUSALS:
            break
    said = str(explain(refusal, ifname, "try a steering rule"))
    certain = refusal.errno in _REFUSALS and not _is_switched_off(ethtool, ifname)
    return Answer("no" if certain else "unknown", said, _remedy(ethtool, ifname, refusal))


def _remedy(ethtool: Ethtool, ifname: str, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"delete rules, which `ethtool -n {ifname}` shows, or use `queue: software`"
    if error.errno not in _REFUSALS:
        return f"see `ethtool -n {ifname}`"
    if _is_switched_off(ethtool, ifname):
        return f"`ethtool -K {ifname} ntuple on`"
    return "its driver takes no such rule: use `queue: software`"


def _is_switched_off(ethtool: Ethtool, ifname: str) -> bool:
    active, fixed = ethtool.features(ifname).get(STEERING_FEATURE, (False, True))
    return not active and not fixed


def _rules(ethtool: Ethtool, ifname: str, tries: int = 3) -> tuple[Rule, ...]:
    try:
        locations = sorted(_listed(ethtool, ifname).locations)
        return tuple(_ask(ethtool, ifname, _GRXCLSRULE, _at(location)).rule for location in locations)
    except OSError as error:
        if error.errno not in _CHANGED or tries == 1:
            raise
        return _rules(ethtool, ifname, tries - 1)


def _listed(ethtool: Ethtool, ifname: str) -> _Reply:
    """The locations of all rules, and in ``data`` how many there can be."""
    number = _ask(ethtool, ifname, _GRXCLSRLCNT).number
    return _ask(ethtool, ifname, _GRXCLSRLALL, room=number)


def _insert(ethtool: Ethtool, ifname: str, rule: Rule, taken: Collection[int]) -> int:
    if not _ask(ethtool, ifname, _GRXCLSRLCNT).data & _LOC_SPECIAL:
        rule = replace(rule, location=_free_location(ethtool, ifname, rule, taken))
    location = _ask(ethtool, ifname, _SRXCLSRLINS, _packed(rule)).rule.location
    try:
        found = _ask(ethtool, ifname, _GRXCLSRULE, _at(location)).rule
        if found != replace(rule, location=location):
            raise OSError(errno.EOPNOTSUPP, f"the driver made another rule of it, {found}")
    except OSError:
        with suppress(OSError):
            _ask(ethtool, ifname, _SRXCLSRLDEL, _at(location))
        raise
    return location


def _free_location(ethtool: Ethtool, ifname: str, rule: Rule, taken: Collection[int]) -> int:
    listed = _listed(ethtool, ifname)
    places = range(listed.data) if rule.vid is not None else reversed(range(listed.data))
    free = (place for place in places if place not in taken and place not in listed.locations)
    location = next(free, None)
    if location is None:
        raise OSError(errno.ENOSPC, f"each of its {listed.data} rules is in use")
    return location


def _ask(ethtool: Ethtool, ifname: str, command: int, spec: bytes = _NO_RULE, room: int = 0) -> _Reply:
    """Run a command with room for so many locations. Raises OSError."""
    request = _COMMAND.pack(command, 0, 0, spec, room) + bytes(_LOCATION.size * (room + 1))
    reply = ethtool.run(ifname, request)
    _, _, data, spec, number = _COMMAND.unpack_from(reply)
    end = _COMMAND.size + _LOCATION.size * min(number, room)
    locations = tuple(place for (place,) in _LOCATION.iter_unpack(reply[_COMMAND.size : end]))
    return _Reply(data, _parsed(spec), number, locations)


def _at(location: int) -> bytes:
    return _SPEC.pack(0, b"", b"", b"", b"", 0, location)


def _packed(rule: Rule) -> bytes:
    mac = _ETHER.pack(mac_octets(rule.mac))
    if rule.vid is None:
        return _SPEC.pack(_ETHER_FLOW, mac, b"", _EXACT_MAC, b"", rule.rx_queue, rule.location)
    tag = _EXT.pack(rule.vid)
    return _SPEC.pack(_ETHER_FLOW | _FLOW_EXT, mac, tag, _EXACT_MAC, _EXACT_VID, rule.rx_queue, rule.location)


def _parsed(spec: bytes) -> Rule:
    """The rule; not ``plain`` when it looks at anything else, drops, or goes to an RSS context or a VF."""
    flow_type, value, more, mask, more_mask, action, location = _SPEC.unpack(spec)
    if not flow_type & _FLOW_EXT:
        more_mask = _NOTHING
    by_mac = flow_type & ~_FLOW_EXT == _ETHER_FLOW and mask == _EXACT_MAC
    to_queue = action >> 32 == 0
    if not by_mac or not to_queue or more_mask not in (_NOTHING, _EXACT_VID):
        return Rule(location, "", None, -1)
    (mac,) = _ETHER.unpack(value)
    (tci,) = _EXT.unpack(more)
    return Rule(location, mac.hex(":"), tci & 0x0FFF if more_mask == _EXACT_VID else None, action)
