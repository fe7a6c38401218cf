"""What a bond is like, as far as XDP on it goes."""

from __future__ import annotations

from collections.abc import Mapping

from ..bonds import HASHES, MODES, Bond
from ..errors import UnsupportedError
from ..model import Link
from ..plan import TAG_IN_FRAME
from .ethtool import Ethtool
from .links import Links
from .netdev import XdpFeatures, xdp_features


def read_bond(nic: Link, links: Mapping[str, Link], netlink: Links, ethtool: Ethtool) -> Bond | None:
    """What ``bonds.refusals`` decides by, or ``None`` when ``nic`` is no bond.

    ``links`` are all devices. Raises PrivilegeError or KernelError when the kernel does not answer.
    """
    if nic.kind != "bond":
        return None
    mode, hash_policy = netlink.bond_options(nic)
    members = tuple(link.name for link in links.values() if link.master == nic.ifindex)
    stripping = {}
    for member in members:
        features = ethtool.features(member)
        active = tuple(name for name in TAG_IN_FRAME if features.get(name, (False, True))[0])
        if active and links[member].kind != "veth":  # on a veth it is the other end that hides tags
            stripping[member] = active
    return Bond(
        mode=MODES[mode] if mode < len(MODES) else str(mode),
        hash=HASHES[hash_policy] if hash_policy < len(HASHES) else str(hash_policy),
        members=members,
        native=_native(nic),
        stripping=stripping,
    )


def _native(nic: Link) -> bool | None:
    """Whether the kernel says that XDP on this bond can redirect."""
    try:
        features = xdp_features(nic.name, nic.ifindex)
    except UnsupportedError:
        return None
    # From 6.3 to 6.4 bonds tell nothing; what a bond without XDP refuses is refused on attaching.
    return bool(features & XdpFeatures.REDIRECT) if features else None
