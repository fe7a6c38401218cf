"""What the network shall be and what it is, as plain frozen values.

A config change walks through this module's types in one direction::

    Config --desired()--> State --plan()--> tuple[Change] --apply--> kernel
                             observe() --> State ---^

A *resource* names one settable thing in the kernel; a ``State`` maps resources
to their values (an absent resource has the value ``None``). Desired and observed
state have the same shape, so a plan is their difference, an undo is a ``Change``
turned round, and verification is a second difference that must be empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

XdpMode = Literal["native", "generic"]
Value = str | int | bool | tuple[object, ...] | None


@dataclass(frozen=True, order=True)
class Resource:
    """Base of everything that a plan can set. Subclasses name the thing."""


@dataclass(frozen=True, order=True)
class DeviceResource(Resource):
    """A setting of one network device.

    The ifindex is part of the name: a device that was deleted and made again
    under the same name is another device, and its settings are unknown.
    """

    device: str
    ifindex: int


@dataclass(frozen=True, order=True)
class Bridge(Resource):
    """A kernel bridge of ours. Value: ``True``."""

    name: str


@dataclass(frozen=True, order=True)
class Master(DeviceResource):
    """The bridge that a device is in. Value: the bridge's name, or ``None``."""


@dataclass(frozen=True, order=True)
class BridgePort(DeviceResource):
    """Bridge port flags. Value: ``(learning, unicast_flood)`` as two bools."""


@dataclass(frozen=True, order=True)
class Fdb(DeviceResource):
    """A static entry of the bridge's forwarding table. Value: ``True``.

    ``mac`` is lower-case with colons.
    """

    mac: str


@dataclass(frozen=True, order=True)
class AdminUp(DeviceResource):
    """IFF_UP. Value: bool."""


@dataclass(frozen=True, order=True)
class Promiscuous(DeviceResource):
    """IFF_PROMISC as asked for by user space. Value: bool."""


@dataclass(frozen=True, order=True)
class Feature(DeviceResource):
    """An ethtool feature by its kernel name (``rx-vlan-hw-parse``). Value: bool."""

    feature: str


@dataclass(frozen=True, order=True)
class PeerFeature(DeviceResource):
    """An ethtool feature of the other end of a veth, in whichever namespace it is. Value: bool.

    ``device`` and ``ifindex`` are those of *our* end.
    """

    feature: str


@dataclass(frozen=True, order=True)
class Ipv6Disabled(DeviceResource):
    """``net.ipv6.conf.DEVICE.disable_ipv6``. Value: bool."""


@dataclass(frozen=True, order=True)
class Guard(DeviceResource):
    """The tc program at a port's egress. Value: ``(port_id, pvid, program digest)``.

    pvid 0 stands for an untagged port.
    """


@dataclass(frozen=True, order=True)
class Uplink(DeviceResource):
    """The XDP program on a NIC. Value: ``(xdp_mode, program digest)``."""


@dataclass(frozen=True, order=True)
class QueueCpu(DeviceResource):
    """A CPU that serves queues of this NIC (a cpumap entry). Value: ring size in frames."""

    cpu: int


@dataclass(frozen=True, order=True)
class PortSlot(Resource):
    """A row of the port tables. Value: a ``PortRecord``'s fields as a tuple."""

    port_id: int


@dataclass(frozen=True, order=True)
class Filter(DeviceResource):
    """Destination MAC and VID on a NIC. Value: the port id that the frame is for.

    VID 0 stands for untagged and priority-tagged frames.
    """

    mac: str
    vid: int


@dataclass(frozen=True)
class PortRecord:
    """A row of the port table, see ``struct port`` in ``bpf/abi.h``, and the port's name.

    ``cpu`` ``None``: the NIC's CPU. ``max_len`` is in bytes with the Ethernet header.
    ``ifindex`` 0: the device is away. ``queue`` 0: the port has none.
    """

    name: str
    queue: int
    cpu: int | None
    pvid: int
    flags: int
    max_len: int
    ifindex: int

    def as_value(self) -> tuple[object, ...]:
        """The value of the port's ``PortSlot``."""
        return (self.name, self.queue, self.cpu, self.pvid, self.flags, self.max_len, self.ifindex)

    @classmethod
    def of(cls, value: tuple[object, ...]) -> PortRecord:
        """The inverse of ``as_value``."""
        return cls(*value)  # type: ignore[arg-type]  # as_value() made it


@dataclass(frozen=True)
class Change:
    """One step of a plan: ``resource`` goes from ``before`` to ``after``."""

    resource: Resource
    before: Value
    after: Value

    def inverse(self) -> Change:
        return Change(self.resource, self.after, self.before)


State = Mapping[Resource, Value]


@dataclass(frozen=True)
class Link:
    """One network device as the kernel shows it.

    ``kind`` is the rtnl link kind (``veth``, ``tun``, ``bridge``, ``bond`` …), ``None`` for
    hardware. ``mtu`` is in bytes without the Ethernet header. ``peer_ifindex`` is set for
    veth; ``peer_netnsid`` is ``None`` when the peer lives in the same namespace and -1 when
    it lives in a namespace that has no id here. ``lower_ifindex`` is the device below a VLAN or
    macvlan device. ``xdp_prog_id`` is 0 without a program.
    ``learning`` and ``unicast_flood`` are ``None`` unless the device is a bridge port.
    """

    ifindex: int
    name: str
    kind: str | None
    mac: str
    mtu: int
    up: bool
    running: bool
    promiscuous: bool
    alias: str | None
    master: int | None
    master_name: str | None
    rx_queues: int
    tx_queues: int
    peer_ifindex: int | None = None
    peer_netnsid: int | None = None
    lower_ifindex: int | None = None
    xdp_mode: str | None = None
    xdp_prog_id: int = 0
    learning: bool | None = None
    unicast_flood: bool | None = None
    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0
