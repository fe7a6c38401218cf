"""Changes in plain words, for ``plan``, ``apply`` and the API."""

from __future__ import annotations

from dataclasses import fields

from pydantic import JsonValue

from offload.model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    Guard,
    Ipv6Disabled,
    Master,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    QueueCpu,
    Resource,
    Uplink,
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
        case Master(device):
            return _master(device, change)
        case Fdb(device, _, mac):
            return (
                f"forget on the bridge where {mac} is"
                if gone
                else f"tell the bridge that {mac} is at {device}"
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
        case BridgePort(), (learning, flood):
            words = ("off", "on")
            return (
                f"switch address learning {words[bool(learning)]} and "
                f"flooding of unknown addresses {words[bool(flood)]} at {device}"
            )
        case Guard(), (_, pvid, _) if isinstance(pvid, int):
            return f"let only frames of its own, {_vlan(pvid)}, through to {device}"
        case Guard(), None:
            return f"take the guard at {device} away"
        case Uplink(), (mode, _):
            verb = "attach" if change.before is None else "replace"
            return f"{verb} the XDP program on {device} ({mode} mode)"
        case Uplink(), None:
            return f"take the XDP program off {device}"
        case QueueCpu(_, _, cpu), None:
            return f"take CPU {cpu} from the queues of {device}"
        case QueueCpu(_, _, cpu), _:
            return f"let CPU {cpu} serve queues of {device}, with a ring of {after} frames"
        case _:
            return f"{_verb(change)} {_name(resource)}"


def _vlan(vid: int) -> str:
    return f"VLAN {vid}" if vid else "untagged"


def _verb(change: Change) -> str:
    return "write" if change.before is None else "remove" if change.after is None else "change"
