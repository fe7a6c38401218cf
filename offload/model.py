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
    """A kernel bridge of ours, which the host stack neither hears nor speaks through.

    Value: ``vlan`` when it filters VLANs, ``plain`` on a kernel that has no such bridge.
    """

    name: str


@dataclass(frozen=True, order=True)
class Conduit(Resource):
    """The veth pair between the programs and a Python bridge. Value: ``True``.

    ``name`` is the programs' end and the switch's, ``inner`` the bridge's.
    """

    name: str
    inner: str


@dataclass(frozen=True, order=True)
class HostPair(Resource):
    """The veth pair that takes the host into a switch. Value: ``(MAC, MTU)`` of the host's end.

    The MAC is ``auto`` for any. ``name`` is the host's end, ``inner`` the switch's.
    """

    name: str
    inner: str


@dataclass(frozen=True, order=True)
class Channel(Resource):
    """The software channel of an AF_XDP port: a veth pair, a namespace and the program at its inner end.

    Value: ``(MAC, MTU, uid, program digest)``: of the inner end, which is alone in its namespace, and of
    who may open its map. ``name`` is the outer end, the switch's.
    """

    name: str
    port: str


@dataclass(frozen=True, order=True)
class NicSockets(Resource):
    """The XSKMAP of an AF_XDP port's sockets on its NIC's own queues. Value: ``(port id, uid)``.

    The uid is of who may open it.
    """

    port: str


@dataclass(frozen=True, order=True)
class Master(DeviceResource):
    """The bridge that a device is in. Value: the bridge's name, or ``None``."""


@dataclass(frozen=True, order=True)
class BridgePort(DeviceResource):
    """Bridge port flags. Value: ``(learning, unicast_flood, group_forward)``, two bools and a mask.

    Bit n of the mask lets frames to 01:80:c2:00:00:0n through (IEEE 802.1Q-2018, 8.6.3).
    """


@dataclass(frozen=True, order=True)
class BridgeVlans(DeviceResource):
    """VIDs of a port of a bridge that filters VLANs. Value: ``(untagged, (tagged, ...))``.

    ``untagged`` is the VID that frames without a tag belong to, both ways; 0: there is none.
    """


@dataclass(frozen=True, order=True)
class Fdb(DeviceResource):
    """A static entry of the bridge's forwarding table. Value: ``True``.

    ``mac`` is lower-case with colons, ``vid`` the bridge's own, 0 where it filters no VLANs.
    """

    mac: str
    vid: int


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
class Address(Resource):
    """An address of the host on an interface of ours, ``192.0.2.1/24``, which may be still to be made.

    Value: ``True``, or ``alone`` when the kernel makes no route to its network.
    """

    interface: str
    address: str


@dataclass(frozen=True, order=True)
class Carried(DeviceResource):
    """An address of the host on somebody's NIC. Value: a ``CarriedAddress``'s fields as a tuple."""

    address: str


@dataclass(frozen=True, order=True)
class Route(Resource):
    """A unicast route through one device. Value: a ``RouteTarget``'s fields as a tuple.

    ``to`` is a network: the default route is ``0.0.0.0/0`` or ``::/0``. The kernel keeps one such
    route for each of ``table``, ``metric`` and ``tos``; to give it another value replaces it in place.
    """

    to: str
    table: int
    metric: int
    tos: int


@dataclass(frozen=True, order=True)
class LinkDns(Resource):
    """DNS settings of an interface of ours, where systemd-resolved runs.

    Value: ``(servers, domains, default_route)``: two tuples of text and a bool or ``None``.
    """

    interface: str


@dataclass(frozen=True, order=True)
class Member(DeviceResource):
    """The tc programs at a device of a switch. Value: a ``MemberRow``'s fields and the programs' digest."""


@dataclass(frozen=True, order=True)
class Network(Resource):
    """A switch, by its number, as the programs know it.

    Value: ``(name, uplink, conduit, untagged, ask_bridge)`` as in ``NetworkRow``, but ``conduit`` is the
    name of the device to the Python bridge, or ``None``.
    """

    number: int


@dataclass(frozen=True, order=True)
class Roster(Resource):
    """What the Python bridge of a switch is told. Value: its devices, and its extensions as JSON text.

    The devices are a tuple with one of ``(port id, name, role, VIDs, flood, addresses, link_local)`` for
    each; VID 0 is untagged.
    """

    switch: str


@dataclass(frozen=True, order=True)
class PythonBridge(Resource):
    """The process of a Python bridge. Value: ``True`` while it runs."""

    switch: str


@dataclass(frozen=True, order=True)
class Trunk(Resource):
    """The VIDs that a trunk port takes tagged. Value: a tuple of them in order."""

    port_id: int


@dataclass(frozen=True, order=True)
class Station(Resource):
    """An address of a port in one VLAN of a switch. Value: ``(port id, ifindex, state)``.

    The programs change the state by themselves: see ``StationState``.
    """

    network: int
    mac: str
    vid: int


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


@dataclass(frozen=True, order=True)
class Functions(DeviceResource):
    """SR-IOV virtual functions of a NIC. Value: how many; each has a network device of its own here."""


@dataclass(frozen=True, order=True)
class FunctionPort(DeviceResource):
    """What the program on a virtual function's device delivers. Value: ``(NIC, port id, VID, mode, digest)``.

    The port id is ``None`` while it serves no port. The mode is an ``XdpMode``.
    """


@dataclass(frozen=True, order=True)
class FunctionAddress(DeviceResource):
    """What a NIC sorts into one of its virtual functions. Value: ``(MAC, VID)``, or ``None`` for nothing.

    VID 0 stands for frames without a tag.
    """

    index: int


@dataclass(frozen=True, order=True)
class NicAddress(DeviceResource):
    """An address that a NIC takes frames for beside its own. Value: ``True``, ``None`` when it does not."""

    mac: str


@dataclass(frozen=True, order=True)
class SteeringRule(DeviceResource):
    """A rule in a NIC. Value: the RX queue that frames to this MAC go to.

    VID 0: whatever tag they have, which XDP looks at.
    """

    mac: str
    vid: int


@dataclass(frozen=True, order=True)
class Spread(DeviceResource):
    """The RSS indirection table of a NIC. Value: RX queues, by slot."""


@dataclass(frozen=True, order=True)
class IrqAffinity(DeviceResource):
    """The CPUs that may serve an interrupt of a device. Value: as ``0-3,6``."""

    irq: int


@dataclass(frozen=True, order=True)
class NapiAffinity(DeviceResource):
    """The CPUs that the thread of a NAPI instance of a device may run on. Value: as ``0-3,6``."""

    napi: int


@dataclass(frozen=True, order=True)
class Xps(DeviceResource):
    """The CPUs whose frames leave by a TX queue of a device. Value: as ``0-3,6``; ``""`` is none."""

    tx_queue: int


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
class CarriedAddress:
    """How an address stands on a NIC, all that it takes to put it back.

    ``place`` is when, among the NIC's addresses, it has to be put back: what comes first is the host's
    choice to send from. ``scope`` and ``flags`` (IFA_F_…) are numbers of the kernel. ``valid`` and
    ``preferred`` are seconds since boot at which it ends, ``None`` for never. ``attributes`` are
    further netlink ones, number and hex.
    """

    place: int
    scope: int
    flags: int
    valid: int | None
    preferred: int | None
    attributes: tuple[tuple[int, str], ...] = ()

    def as_value(self) -> tuple[object, ...]:
        """The value of the address's ``Carried``."""
        return (self.place, self.scope, self.flags, self.valid, self.preferred, self.attributes)

    @classmethod
    def of(cls, value: tuple[object, ...]) -> CarriedAddress:
        """The inverse of ``as_value``."""
        return cls(*value)  # type: ignore[arg-type]  # as_value() made it


@dataclass(frozen=True)
class RouteTarget:
    """Where a route leads: out of ``device``, through the gateway ``via`` or to neighbours.

    ``src`` is the address preferred for what the host sends there. ``proto`` (who made it: RTPROT_…),
    ``scope`` and ``flags`` (RTNH_F_ONLINK) are numbers of the kernel; ``attributes`` are further
    netlink ones, number and hex.
    """

    device: str
    via: str | None
    src: str | None
    proto: int
    scope: int
    flags: int = 0
    attributes: tuple[tuple[int, str], ...] = ()

    def as_value(self) -> tuple[object, ...]:
        """The value of the route's ``Route``."""
        return (self.device, self.via, self.src, self.proto, self.scope, self.flags, self.attributes)

    @classmethod
    def of(cls, value: tuple[object, ...]) -> RouteTarget:
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


Role = Literal["port", "host", "uplink", "function", "conduit", "silent"]
"""What a device is to its switch: see ``bpf/switch.c``."""

StationState = Literal["expected", "here", "away"]
"""Declared and not heard yet; heard from its port; heard from the wire since."""


@dataclass(frozen=True)
class NetworkRow:
    """A switch as the programs know it. ``uplink`` is a port id, ``conduit`` an ifindex, 0 without.

    ``untagged`` is the VID that the kernel bridge keeps untagged frames in, 0 without VLAN
    filtering. ``ask_bridge``: frames for unknown addresses go to the bridge, not to the wire.
    """

    name: str
    uplink: int | None
    conduit: int
    untagged: int
    ask_bridge: bool


@dataclass(frozen=True)
class MemberRow:
    """A device of a switch. ``network`` and ``port`` are numbers of rows.

    ``pvid`` is the VID of frames without a tag, 0 on an untagged port, ``None`` where a trunk has no
    native VID. ``bypass``: frames from it may pass by the bridge. ``allow`` are names of ``AllowConfig``.
    """

    port: int
    network: int
    role: Role
    pvid: int | None = 0
    trunk: bool = False
    bypass: bool = False
    allow: frozenset[str] = frozenset()

    def as_value(self, digest: str) -> tuple[object, ...]:
        """The value of the device's ``Member``, ``digest`` being of the programs there."""
        allow = tuple(sorted(self.allow))
        return (self.port, self.network, self.role, self.pvid, self.trunk, self.bypass, allow, digest)

    @classmethod
    def of(cls, value: tuple[object, ...]) -> MemberRow:
        """The inverse of ``as_value``, without the digest."""
        *fields, allow, _ = value
        return cls(*fields, frozenset(allow))  # type: ignore[arg-type, call-arg, call-overload]  # as_value() made it


@dataclass(frozen=True)
class StationRow:
    """An address of a port: where it is, and how often it moved. ``since`` is in nanoseconds, monotonic."""

    port: int
    ifindex: int
    state: StationState = "expected"
    moves: int = 0
    since: int = 0


@dataclass(frozen=True)
class News:
    """A station that changed its state, as a program saw it."""

    network: int
    port: int
    state: StationState
    mac: str
    vid: int


@dataclass(frozen=True)
class Link:
    """One network device as the kernel shows it.

    ``kind`` is the rtnl link kind (``veth``, ``tun``, ``bridge``, ``bond`` …), ``None`` for
    hardware. ``mtu`` is in bytes without the Ethernet header. ``peer_ifindex`` is set for
    veth; ``peer_netnsid`` is ``None`` when the peer lives in the same namespace and -1 when
    it lives in a namespace that has no id here. ``lower_ifindex`` is the device below a VLAN or
    macvlan device. ``xdp_prog_id`` is 0 without a program.
    ``learning``, ``unicast_flood`` and ``group_forward`` are ``None`` unless the device is a bridge port;
    ``vlan_filtering`` is ``None`` unless it is a bridge.
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
    group_forward: int | None = None
    vlan_filtering: bool | None = None
    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0
