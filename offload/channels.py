"""What an AF_XDP port shall be: its channels, and what it asks of the host. Pure.

A port with ``af_xdp:`` has a *software channel*: a veth pair of its own. The outer end is the port's
device, which the switch treats as any other; the inner end is alone in a namespace, and its program
puts frames into the socket of whoever consumes them. With ``mode: hardware`` the program on the NIC
tries the port's sockets on the NIC's own queues first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .config import Config, PortConfig, channel_outer
from .errors import ForeignError, OffloadError, Problem, UnsupportedError
from .model import Channel, Feature, Link, NicSockets, Resource, Value

INNER = "xsk0"
"""The name of every inner end, in its namespace."""

STANDARD_MTU = 1_500
CHUNK_MTU = 3_500
"""Bytes of MTU whose frames fit a UMEM's chunk: a page, less headroom and tags."""

AS_ON_A_WIRE = (
    "tx-checksum-ip-generic",
    "tx-checksum-sctp",
    "tx-generic-segmentation",
    "tx-gso-list",
    "tx-sctp-segmentation",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-vlan-hw-insert",
    "tx-vlan-stag-hw-insert",
)
"""Features that are off at the outer end, so that the inner one gets frames as on a wire: tags in them,
checksums made, none too long. A tunnel's segments need one of these too (net_gso_ok(), netdevice.h)."""

ROOT = 0


@dataclass(frozen=True)
class Host:
    """What was read of this host for its AF_XDP ports.

    ``users`` has uid and gid by name, ``None`` for a user that does not exist. ``zero_copy`` says for
    each NIC whether its driver can, ``takes_frags`` whether a socket takes frames of several
    buffers. ``digest`` is of the programs.
    """

    users: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)
    zero_copy: Mapping[str, bool] = field(default_factory=dict)
    takes_frags: bool = True
    digest: str = ""


def to_come(config: Config, links: Mapping[str, Link]) -> dict[str, Link]:
    """The outer ends as they will be when they have been made, by name; their number is not known yet."""
    return {
        channel_outer(name): Link(
            ifindex=0,
            name=channel_outer(name),
            kind="veth",
            mac="00:00:00:00:00:00",
            mtu=_mtu(port, config, links),
            up=True,
            running=True,
            promiscuous=False,
            alias=None,
            master=None,
            master_name=None,
            rx_queues=1,
            tx_queues=1,
        )
        for name, port in config.ports.items()
        if port.af_xdp
    }


def _mtu(port: PortConfig, config: Config, links: Mapping[str, Link]) -> int:
    uplink = links.get(config.switches[port.switch].uplink or "")
    return uplink.mtu if uplink else STANDARD_MTU


def desired(
    name: str, port: PortConfig, outer: Link | None, port_id: int, nic: str | None, host: Host
) -> dict[Resource, Value]:
    """The channels of an AF_XDP port. ``outer``: its device, unless something is in the way of it."""
    if port.af_xdp is None or outer is None:
        return {}
    owner = _owner(port, host)
    state: dict[Resource, Value] = {Channel(outer.name, name): (port.mac[0], outer.mtu, owner, host.digest)}
    state |= {Feature(outer.name, outer.ifindex, feature): False for feature in AS_ON_A_WIRE}
    if port.af_xdp.mode == "hardware" and nic:
        state[NicSockets(name)] = (port_id, owner if port.af_xdp.trusted else ROOT)
    return state


def _owner(port: PortConfig, host: Host) -> int:
    owner = port.af_xdp.owner if port.af_xdp else None
    uid, _ = (host.users.get(owner.user) if owner else None) or (ROOT, ROOT)
    return uid


def missing_users(config: Config, host: Host) -> list[Problem]:
    """Owners that this host does not know."""
    return [
        Problem(f"ports.{name}.af_xdp.owner.user", owner.user, "a user of this host: `getent passwd`")
        for name, port in config.ports.items()
        if port.af_xdp and (owner := port.af_xdp.owner) and host.users.get(owner.user) is None
    ]


def refusals(
    config: Config, links: Mapping[str, Link], own: Iterable[str], host: Host
) -> Iterable[OffloadError]:
    """What AF_XDP ports ask of this host that it has not got."""
    for name, port in config.ports.items():
        if port.af_xdp is None:
            continue
        at = f"ports.{name}.af_xdp"
        outer, nic = channel_outer(name), config.switches[port.switch].uplink or ""
        if outer in links and links[outer].ifindex and outer not in own:
            yield ForeignError(
                f"{at}: there is a device {outer} already, and it is not ours, so the port's own veth pair "
                "cannot have that name: rename one"
            )
        hardware = port.af_xdp.mode == "hardware"
        if hardware and port.af_xdp.zero_copy == "require" and not host.zero_copy.get(nic, True):
            yield UnsupportedError(
                f"{at}.zero_copy: the driver of {nic} has no zero copy on this kernel: use zero_copy: auto"
            )
        mtu = _mtu(port, config, links)
        if mtu > CHUNK_MTU and hardware:
            yield UnsupportedError(
                f"{at}.mode: frames of {nic} do not fit a UMEM's chunk (its MTU is {mtu}, at most "
                f"{CHUNK_MTU}): use mode: software, or `ip link set {nic} mtu {CHUNK_MTU}`"
            )
        elif mtu > CHUNK_MTU and not host.takes_frags:
            yield UnsupportedError(
                f"{at}: this kernel's AF_XDP takes no frames of several buffers (Linux 6.6), and the MTU of "
                f"{nic} is {mtu}: `ip link set {nic} mtu {CHUNK_MTU}`, or use device:"
            )
