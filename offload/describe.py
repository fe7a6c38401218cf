"""Changes in plain words, for ``plan``, ``apply`` and the API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from pydantic import JsonValue

from offload.model import (
    Address,
    AdminUp,
    Bridge,
    BridgePort,
    BridgeVlans,
    Carried,
    Change,
    Channel,
    Conduit,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    FunctionAddress,
    FunctionPort,
    Functions,
    HostPair,
    Ipv6Disabled,
    IrqAffinity,
    LinkDns,
    Master,
    Member,
    MemberRow,
    NapiAffinity,
    Network,
    NicAddress,
    NicSockets,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    PythonBridge,
    QueueCpu,
    Resource,
    Roster,
    Route,
    RouteTarget,
    Spread,
    Station,
    SteeringRule,
    Trunk,
    Uplink,
    Xps,
)
from offload.plan import RUNNING
from offload.views import ChangeView


def describe(change: Change) -> ChangeView:
    """The change as people and programs are shown it. ``text`` says what to do, not what was done."""
    return ChangeView(
        resource=_name(change.resource),
        before=_json(change.before),
        after=_json(change.after),
        text=_text(change),
    )


def _name(resource: Resource) -> str:
    """``Filter eth1 02:15:5d:00:00:01 0``: the kind, then what tells it from others of its kind."""
    # The ifindex is left out: it means nothing to people, and it differs from boot to boot.
    parts = [str(getattr(resource, field.name)) for field in fields(resource) if field.name != "ifindex"]
    return " ".join([type(resource).__name__, *parts])


def _json(value: object) -> JsonValue:
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return str(value)


def _text(change: Change) -> str:
    after = change.after
    gone = after is None
    match change.resource:
        case Bridge(name):
            return f"remove the bridge {name}" if gone else f"make the bridge {name}"
        case Conduit(name):
            return f"remove the veth pair {name}" if gone else f"make {name}, a veth pair to a Python bridge"
        case HostPair(name, inner):
            return _host_pair(name, inner, change)
        case Channel(name, port):
            what = f"the AF_XDP channel of port {port}: {name} and its inner end"
            return f"remove {what}" if gone else f"{'make' if change.before is None else 'change'} {what}"
        case NicSockets(port):
            return f"{_verb(change)} the map for sockets of port {port} on the queues of its NIC"
        case Address(interface, address):
            return f"take {address} from {interface}" if gone else f"give {interface} the address {address}"
        case Carried(device, _, address):
            return (
                f"take the host's address {address} off {device}"
                if gone
                else f"give {device} back the host's address {address}"
            )
        case Route(to):
            return _route(to, change)
        case LinkDns(interface):
            return f"let systemd-resolved ask the DNS servers of the uplink through {interface}"
        case Network(_):
            return f"{_verb(change)} what the programs know of the switch {_named(change)}"
        case Roster(switch):
            return f"{_verb(change)} what the Python bridge of {switch} knows of its devices"
        case PythonBridge(switch):
            return f"end the Python bridge of {switch}" if gone else f"start the Python bridge of {switch}"
        case Trunk(port_id):
            return f"{_verb(change)} the VLANs of port {port_id}"
        case Station(_, mac, vid):
            return _station(mac, vid, change)
        case Master(device):
            return _master(device, change)
        case Fdb(device, _, mac, vid):
            what = f"{mac}{f', VLAN {vid},' if vid else ''} is"
            return (
                f"forget on the bridge where {what}" if gone else f"tell the bridge that {what} at {device}"
            )
        case Filter(device, _, mac, vid):
            where = f"frames for {mac}, {_vlan(vid)}, on {device}"
            return (
                f"send {where} to the default queue" if gone else f"send {where} to the queue of port {after}"
            )
        case PortSlot(port_id):
            return _port(port_id, change)
        case DeviceResource():
            return _setting(change.resource, change)
        case _:
            return f"{_verb(change)} {_name(change.resource)}"


def _host_pair(name: str, inner: str, change: Change) -> str:
    match change.before, change.after:
        case _, None:
            return f"remove the host's interface {name}"
        case None, _:
            return f"make the host's interface {name}, with {inner} at the switch"
        case _, (mac, mtu):
            return f"give the host's interface {name} the MAC {mac} and the MTU {mtu}"
        case _:
            return f"change the host's interface {name}"


def _route(to: str, change: Change) -> str:
    where = "default" if to in ("0.0.0.0/0", "::/0") else to
    if not isinstance(change.after, tuple):
        return f"remove the route to {where}"
    target = RouteTarget.of(change.after)
    return f"lead {where} through {target.device}" + (f" via {target.via}" if target.via else "")


def _named(change: Change) -> str:
    value = change.before if change.after is None else change.after
    return str(value[0]) if isinstance(value, tuple) else "?"


def _station(mac: str, vid: int, change: Change) -> str:
    match change.before, change.after:
        case _, None:
            return f"take {mac}, {_vlan(vid)}, from its switch"
        case None, (port_id, *_):
            return f"expect {mac}, {_vlan(vid)}, at port {port_id}"
        case _, (port_id, _, state):
            return f"note that {mac}, {_vlan(vid)}, of port {port_id} is {state}"
        case _:
            return f"change {mac}, {_vlan(vid)}"


def _port(port_id: int, change: Change) -> str:
    value = change.before if change.after is None else change.after
    record = PortRecord.of(value) if isinstance(value, tuple) else None
    name = f"port {port_id} ({record.name if record else 'unknown'})"
    if change.after is None or record is None:
        return f"forget {name}"
    if not record.flags & RUNNING:
        return f"serve {name} through the bridge"
    cpu = "the CPU where the NIC receives" if record.cpu is None else f"CPU {record.cpu}"
    return f"serve {name} with queue {record.queue} on {cpu}"


def _master(device: str, change: Change) -> str:
    if change.after is None:
        return f"take {device} out of the bridge {change.before}"
    if change.before is None:
        return f"put {device} into the bridge {change.after}"
    return f"move {device} from the bridge {change.before} to {change.after}"


def _setting(resource: DeviceResource, change: Change) -> str:
    device, after = resource.device, change.after
    on = "on" if after else "off"
    match resource, after:
        case AdminUp(), _:
            return f"set {device} {'up' if after else 'down'}"
        case Promiscuous(), _:
            return f"switch promiscuous mode of {device} {on}"
        case Feature(_, _, feature), _:
            return f"switch {feature} of {device} {on}"
        case PeerFeature(_, _, feature), _:
            return f"switch {feature} of the other end of {device} {on}"
        case Ipv6Disabled(), _:
            return f"switch IPv6 on {device} {'off' if after else 'on'}"
        case BridgePort(), (learning, flood, group_forward):
            words = ("off", "on")
            return (
                f"switch address learning {words[bool(learning)]}, "
                f"flooding of unknown addresses {words[bool(flood)]} and "
                f"link-local protocols {words[bool(group_forward)]} at {device}"
            )
        case BridgeVlans(), (untagged, tagged) if isinstance(tagged, tuple):
            own = f"{len(tagged)} VLANs tagged" if len(tagged) > 8 else f"VLANs {_list(tagged)} tagged"
            return f"let the bridge carry {own} and {untagged or 'none'} untagged at {device}"
        case Member(), None:
            return f"take the switch programs off {device}"
        case Member(), value if isinstance(value, tuple):
            return _member(device, MemberRow.of(value), change)
        case Uplink(), (mode, _):
            verb = "attach" if change.before is None else "replace"
            return f"{verb} the XDP program on {device} ({mode} mode)"
        case Uplink(), None:
            return f"take the XDP program off {device}"
        case Functions() | FunctionPort() | FunctionAddress() | SteeringRule() | Spread(), _:
            return _steering(resource, change)
        case NicAddress(_, _, mac), _:
            return f"let {device} {'' if after else 'no longer '}take frames for {mac} by itself"
        case IrqAffinity(_, _, irq), _:
            return f"serve interrupt {irq} of {device} on CPU {after}"
        case NapiAffinity(_, _, napi), _:
            return f"run the thread of NAPI {napi} of {device} on CPU {after}"
        case Xps(_, _, queue), "":
            return f"let TX queue {queue} of {device} belong to no CPU"
        case Xps(_, _, queue), _:
            return f"send what CPU {after} sends to {device} by TX queue {queue}"
        case QueueCpu(_, _, cpu), None:
            return f"take CPU {cpu} from the queues of {device}"
        case QueueCpu(_, _, cpu), _:
            return f"let CPU {cpu} serve queues of {device}, with a ring of {after} frames"
        case _:
            return f"{_verb(change)} {_name(resource)}"


def _steering(resource: DeviceResource, change: Change) -> str:
    """What is said to a NIC that sorts frames itself."""
    device, after = resource.device, change.after
    match resource, after:
        case Functions(), _:
            return (
                f"make {after} virtual functions of {device}"
                if after
                else (f"remove the virtual functions of {device}")
            )
        case FunctionPort(), (_, port_id, vid, mode, _):
            verb = "attach" if change.before is None else "set"
            use = "nobody's frames" if port_id is None else f"frames of port {port_id}, {_vlan(_number(vid))}"
            return f"{verb} the XDP program on the virtual function {device} ({mode} mode) for {use}"
        case FunctionPort(), _:
            return f"take the XDP program off the virtual function {device}"
        case FunctionAddress(_, _, index), (mac, vid):
            where = f"its virtual function {index}"
            return f"let {device} sort frames for {mac}, {_vlan(_number(vid))}, into {where}"
        case FunctionAddress(_, _, index), _:
            return f"let {device} sort nothing into its virtual function {index}"
        case SteeringRule(_, _, mac, vid), None:
            return f"remove the rule of {device} for {mac}{f', VLAN {vid}' if vid else ''}"
        case SteeringRule(_, _, mac, vid), _:
            return (
                f"let {device} sort frames for {mac}{f', VLAN {vid},' if vid else ''} into RX queue {after}"
            )
        case Spread(), (*table,):
            return f"let {device} spread the other frames over its RX queues {_list(dict.fromkeys(table))}"
        case _:
            return f"{_verb(change)} {_name(resource)}"


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _member(device: str, row: MemberRow, change: Change) -> str:
    """What the programs at a device do with its frames."""
    match row.role:
        case "silent":
            return f"keep the host from hearing and speaking on {device}"
        case "conduit":
            return f"carry frames of a Python bridge through {device}"
        case "uplink":
            return f"watch what comes in from {device}"
        case "function":
            return f"give what the virtual function {device} does not deliver to its NIC"
    verb = "switch" if change.before is None else "change how to switch"
    mode = "the VLANs of its trunk" if row.trunk else _vlan(row.pvid or 0)
    allowed = f", allowing {_list(sorted(row.allow))}" if row.allow else ""
    past = "" if row.bypass else ", all of it through the bridge"
    return f"{verb} what {device} sends and gets: {mode}{allowed}{past}"


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"


def _vlan(vid: int) -> str:
    return f"VLAN {vid}" if vid else "untagged"


def _verb(change: Change) -> str:
    return "write" if change.before is None else "remove" if change.after is None else "change"
