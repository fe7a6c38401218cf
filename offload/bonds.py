"""Bonds and teams as uplinks: which ones can be, and what to do about the others. Pure.

A bond hands an XDP program on to each of its members, and only in modes where it can say which
member a frame leaves by: bond_xdp_check() and bond_xdp_set() in drivers/net/bonding/bond_main.c. A
team does not (drivers/net/team). Generic XDP runs on what comes out of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .errors import ForeignError, OffloadError, UnsupportedError
from .model import Link, XdpMode

MODES = (
    "balance-rr",
    "active-backup",
    "balance-xor",
    "broadcast",
    "802.3ad",
    "balance-tlb",
    "balance-alb",
)
"""Names of a bond's modes by their numbers (include/uapi/linux/if_bonding.h)."""

HASHES = ("layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac")
"""Names of a bond's transmit hashes by their numbers."""

_WITH_XDP = frozenset({"balance-rr", "active-backup", "balance-xor", "802.3ad"})
_HASHED = frozenset({"balance-xor", "802.3ad"})
_HASH_WITHOUT_XDP = "vlan+srcmac"


@dataclass(frozen=True)
class Bond:
    """A bond as the kernel shows it.

    ``native`` says whether its members together have native XDP with redirection, ``None`` where
    the kernel does not tell (before Linux 6.4). ``stripping`` are features of members that
    hide VLAN tags from XDP, by member.
    """

    mode: str
    hash: str
    members: tuple[str, ...] = ()
    native: bool | None = None
    stripping: Mapping[str, tuple[str, ...]] | None = None


def refusals(
    nic: str, links: Mapping[str, Link], xdp_mode: XdpMode, bond: Bond | None
) -> Iterator[OffloadError]:
    """Why ``nic`` cannot be an uplink as far as bonds and teams go; nothing for any other device.

    ``bond`` is what was read of ``nic`` if it is one.
    """
    link = links[nic]
    master = links.get(link.master_name or "")
    if master and master.kind in ("bond", "team"):
        yield ForeignError(
            f"{nic} is a member of the {master.kind} {master.name}, which decides what it sends and "
            f"receives: name {master.name} as the uplink, or take it out: `ip link set {nic} nomaster`"
        )
    if link.kind == "team" and xdp_mode == "native":
        yield UnsupportedError(
            f"{nic} is a team, and teams have no native XDP: make it a bond (mode active-backup or "
            f"802.3ad), or set nics.{nic}.xdp_mode: generic, which is slower"
        )
    if bond:
        yield from _bond_refusals(nic, xdp_mode, bond)


def _bond_refusals(nic: str, xdp_mode: XdpMode, bond: Bond) -> Iterator[OffloadError]:
    generic = f"or set nics.{nic}.xdp_mode: generic, which is slower"
    if not bond.members:
        yield UnsupportedError(
            f"{nic} is a bond without members: put NICs in first, as each has to take the XDP program"
        )
    elif xdp_mode == "native" and bond.mode not in _WITH_XDP:
        yield UnsupportedError(
            f"{nic} is a bond of mode {bond.mode}, in which bonds have no native XDP: use one of "
            f"{', '.join(sorted(_WITH_XDP))}, {generic}"
        )
    elif xdp_mode == "native" and bond.mode in _HASHED and bond.hash == _HASH_WITHOUT_XDP:
        yield UnsupportedError(
            f"{nic} is a bond that hashes by {bond.hash}, with which bonds have no native XDP: "
            f"`ip link set {nic} type bond xmit_hash_policy layer2+3`, {generic}"
        )
    elif xdp_mode == "native" and bond.native is False:
        yield UnsupportedError(
            f"{nic}: not all of its members ({', '.join(bond.members)}) have native XDP with redirection: "
            f"take out those without (`offload doctor` tells), {generic}"
        )
    for member, features in (bond.stripping or {}).items():
        switched_off = " ".join(f"{feature} off" for feature in features)
        yield UnsupportedError(
            f"{member}, a member of {nic}, strips VLAN tags before XDP sees them: "
            f"`ethtool -K {member} {switched_off}`, and see to it that it stays so"
        )
