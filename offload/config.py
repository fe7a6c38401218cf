"""The config: one YAML file, read into frozen values or refused whole with every error in it.

The way through this module: ``document.load`` gives plain data, the models below check
each value where it stands, ``_clashes`` checks what values mean to each other. Nothing
here looks at the machine: that a CPU or a NIC exists is checked where that is known.
"""

from __future__ import annotations

import difflib
import io
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)
from ruamel.yaml import YAML

from offload.document import Document, Location, dotted, load
from offload.errors import ConfigError, Problem, UsageError

MAX_FILTERS = 65_536
"""Most filters (MAC and VID) on one NIC: the size of the classifier's table."""

MAX_BRIDGE_PORTS = 1_023
"""Most devices in one kernel bridge, the uplink included (BR_MAX_PORTS - 1, net/bridge/br_private.h)."""

_SECTIONS = ("nics", "switches", "ports")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_NAME_RULE = "a name is 1 to 63 letters, digits, '_', '.' and '-', a letter or digit first"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}|[0-9a-f]{2}(-[0-9a-f]{2}){5}", re.IGNORECASE)
_MAC_FORM = 'a MAC address such as "02:15:5d:00:00:01"'
_CPU_FORM = "the number of a CPU, 0 or more"
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")

Item = TypeVar("Item")


class _FaultsError(ValueError):
    """Several faults inside one value: where, counted from that value, and what is allowed there."""

    def __init__(self, faults: Iterable[tuple[Location, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(allowed for _, allowed in self.faults))


def _object_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(_NAME_RULE)
    return value


def _interface_name(value: str) -> str:
    """The kernel's rule: dev_valid_name() in net/core/dev.c. Its isspace() includes the byte 0xa0."""
    try:
        octets = value.encode()
    except UnicodeEncodeError:
        octets = b""
    fits = 1 <= len(octets) <= 15 and value not in (".", "..")
    if not fits or any(octet in b"/: \t\n\v\f\r\xa0\0" for octet in octets):
        raise ValueError(
            "an interface name is 1 to 15 bytes without '/', ':' or a space, and not '.' or '..'"
        )
    return value


def mac_octets(mac: str) -> bytes:
    """The six octets of a MAC address in lower-case colon form, in the order of the wire."""
    return bytes.fromhex(mac.replace(":", ""))


def parse_mac(value: object, allowed: str = _MAC_FORM) -> str:
    """A unicast address as lower-case with colons; capitals and dashes are taken too. Raises ValueError."""
    if not isinstance(value, str) or not _MAC.fullmatch(value):
        raise ValueError(f"must be {allowed}")
    mac = value.lower().replace("-", ":")
    octets = mac_octets(mac)
    if octets[0] & 1:
        raise ValueError("a group address cannot be a port's: the lowest bit of the first octet must be 0")
    if not any(octets):
        raise ValueError("the all-zero address cannot be a port's")
    return mac


def _each(values: object, check: Callable[[object], Item], allowed: str) -> tuple[Item, ...]:
    """Every item of a list through ``check``, which raises ValueError; all faults are told. No item twice."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"must be {allowed}")
    good: dict[Item, None] = {}
    faults: list[tuple[Location, str]] = []
    for index, value in enumerate(values):
        try:
            item = check(value)
        except ValueError as error:
            faults.append(((index,), str(error)))
            continue
        if item in good:
            faults.append(((index,), "is in the list already"))
        good[item] = None
    if faults:
        raise _FaultsError(faults)
    return tuple(good)


def _macs(value: object) -> object:
    allowed = f"{_MAC_FORM}, a list of them, or auto"
    if value == "auto":
        return value
    if isinstance(value, list | tuple):
        return _each(value, parse_mac, allowed)
    return (parse_mac(value, allowed),)


def _cpu(value: object, allowed: str = _CPU_FORM) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"must be {allowed}")
    return value


def _cpus(value: object) -> object:
    return None if value is None else _each(value, _cpu, "a list of CPUs, or absent for any CPU")


def _port_cpu(value: object) -> object:
    return value if value in ("auto", "nic") else _cpu(value, f"{_CPU_FORM}, auto, or nic")


def _vid(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 4095:
        raise ValueError("must be a VID, 1 to 4094")
    if value == 0:
        raise ValueError("VID 0 means untagged (IEEE 802.1Q): leave vlan out for an untagged port")
    if value == 4095:
        raise ValueError("VID 4095 is reserved (IEEE 802.1Q): use 1 to 4094")
    return value


def _vid_range(value: object) -> range:
    if not isinstance(value, str):
        return range(_vid(value), _vid(value) + 1)
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value)
    if match is None:
        raise ValueError('must be a VID or a range such as "100-199"')
    first, last = _vid(int(match[1])), _vid(int(match[2]))
    if first > last:
        raise ValueError("the first VID of a range must not be above the last")
    return range(first, last + 1)


@dataclass(frozen=True)
class VlanMode:
    """Which VIDs a port takes part in.

    ``native`` is the VID whose frames the port sends and receives untagged: 0 stands for
    frames that are untagged on the wire too, a number without ``trunk`` makes an access
    port. ``trunk`` holds the VIDs whose frames keep their tag (the native one may be among
    them and still goes untagged); ``native`` is then ``None`` if no VID goes untagged.
    """

    native: int | None = 0
    trunk: frozenset[int] = frozenset()

    @property
    def vids(self) -> tuple[int, ...]:
        """Every VID that a filter is needed for, in order. 0 stands for untagged and priority-tagged."""
        if not self.trunk:
            return () if self.native is None else (self.native,)
        return tuple(sorted(self.trunk if self.native is None else self.trunk | {self.native}))

    def __str__(self) -> str:
        """``-`` (untagged), ``10``, or ``trunk:10,20,100-199/native:1``: what ``parse`` takes."""
        if not self.trunk:
            return str(self.native or "-")
        native = "" if self.native is None else f"/native:{self.native}"
        return f"trunk:{vid_ranges(self.trunk)}{native}"

    @staticmethod
    def parse(text: str) -> VlanMode:
        """The form of the command line; ``none`` is ``-``. Raises UsageError."""
        if text in ("-", "none"):
            return VlanMode()
        value: object = _number(text)
        if text.startswith("trunk:"):
            vids, has_native, native = text.removeprefix("trunk:").partition("/native:")
            trunk: object = [_number(vid) for vid in vids.split(",")]
            value = {"trunk": trunk, "native": _number(native) if has_native else None}
        elif isinstance(value, str):
            raise UsageError(
                f"vlan {text}: must be a VID, trunk:10,20,100-199, trunk:10,20/native:1, or none"
            )
        try:
            return _vlan(value)
        except ValueError as error:
            raise UsageError(f"vlan {text}: {error}") from None

    def plain(self) -> object:
        """The form of the config file."""
        if not self.trunk:
            return self.native or None
        ranges = [_number(item) for item in vid_ranges(self.trunk).split(",")]
        return {"trunk": ranges} if self.native is None else {"trunk": ranges, "native": self.native}


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def vid_ranges(vids: Iterable[int]) -> str:
    """``{10, 11, 12, 20}`` becomes ``10-12,20``."""
    runs: list[list[int]] = []
    for vid in sorted(vids):
        if runs and vid == runs[-1][-1] + 1:
            runs[-1][1:] = [vid]
        else:
            runs.append([vid])
    return ",".join("-".join(map(str, run)) for run in runs)


def _vlan(value: object) -> VlanMode:
    if isinstance(value, VlanMode):
        return value
    if value is None:
        return VlanMode()
    if not isinstance(value, Mapping):
        if isinstance(value, int):
            return VlanMode(native=_vid(value))
        raise ValueError("must be a VID, or {trunk: [10, 20, ...], native: 1}; leave it out for untagged")
    keys = ("trunk", "native")
    faults: list[tuple[Location, str]] = [((key,), _unknown(key, keys)) for key in value if key not in keys]
    trunk: tuple[range, ...] = ()
    try:
        trunk = _each(value.get("trunk", ()), _vid_range, "a list of VIDs and ranges, with at least one")
    except _FaultsError as error:
        faults += [(("trunk", *location), allowed) for location, allowed in error.faults]
    except ValueError as error:
        faults.append((("trunk",), str(error)))
    native = value.get("native")
    try:
        native = None if native is None else _vid(native)
    except ValueError as error:
        faults.append((("native",), str(error)))
    if faults:
        raise _FaultsError(faults)
    return VlanMode(native, frozenset(vid for vids in trunk for vid in vids))


def _version(value: object) -> object:
    if value != 1 or isinstance(value, bool):
        raise ValueError("must be 1: this version of offload reads no other")
    return value


def _section(value: object) -> object:
    """``ports:`` with nothing under it is an empty section, ``eth1:`` a NIC with every default."""
    return {} if value is None else value


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_interface(value if "/" in value else ""))
    except ValueError:
        raise ValueError("must be an address with its prefix length, such as 192.0.2.1/24") from None


def _addresses(value: object) -> object:
    return _each(value, lambda item: _address(str(item)), "a list of addresses such as 192.0.2.1/24")


def _destination(value: str) -> str:
    if value == "default":
        return value
    try:
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise ValueError("must be default, or a network such as 198.51.100.0/24") from None


def _gateway(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an address such as 192.0.2.254") from None


def _listen(value: str) -> str:
    split_listen(value)
    return value


def split_listen(value: str) -> tuple[str, int]:
    """``127.0.0.1:9808`` or ``[2001:db8::1]:9808`` as host and port. Raises ValueError."""
    host, colon, port = value.rpartition(":")
    allowed = "must be host:port, such as 127.0.0.1:9808 or [::]:9808"
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise ValueError(f"{allowed}; the port is 1 to 65535")
    if not host:
        raise ValueError(f"{allowed}; for every address write 0.0.0.0 or [::]")
    bracketed = re.fullmatch(r"\[(.*)\]", host)
    if bracketed is None and ":" in host:
        raise ValueError(f"{allowed}; an IPv6 address stands in brackets")
    try:
        if bracketed:
            return str(ipaddress.IPv6Address(bracketed[1])), int(port)
        if re.fullmatch(r"[0-9.]+", host):
            return str(ipaddress.IPv4Address(host)), int(port)
    except ValueError:
        raise ValueError(allowed) from None
    if not _HOST_NAME.fullmatch(host):
        raise ValueError(allowed)
    return host, int(port)


ObjectName = Annotated[str, AfterValidator(_object_name)]
InterfaceName = Annotated[str, AfterValidator(_interface_name)]
SwitchName = Annotated[str, AfterValidator(_object_name), AfterValidator(_interface_name)]
Mac = Annotated[str, BeforeValidator(parse_mac)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class MetricsConfig(_Model):
    """Where Prometheus scrapes."""

    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:9808"


class MacRange(_Model):
    """The addresses that ``mac: auto`` draws from, both ends included."""

    first: Mac = Field(description=_MAC_FORM)
    last: Mac = Field(description=_MAC_FORM)


class QueuesConfig(_Model):
    """VM queues of a NIC.

    ``cpus``: those that queues may use, ``None`` for any. ``max``: most VM queues,
    ``None`` for all hardware ones and any number of software ones. ``rebalance``: busy
    queues move to idle CPUs. ``vf_xdp_mode``: the NIC's SR-IOV virtual functions may be queues, with XDP
    on them in this mode; ``None``: they are left alone. ``vfs``: how many to make, ``None`` for all.
    """

    cpus: Annotated[tuple[int, ...] | None, BeforeValidator(_cpus)] = None
    max: Annotated[int, Field(ge=0)] | None = None
    rebalance: bool = False
    vf_xdp_mode: Literal["native", "generic"] | None = None
    vfs: Annotated[int, Field(ge=1, le=256)] | None = None


class NicConfig(_Model):
    """A physical adapter. ``xdp_mode`` is never changed silently."""

    xdp_mode: Literal["native", "generic"] = "native"
    queues: QueuesConfig = QueuesConfig()


class RouteConfig(_Model):
    """A route of the host over its switch interface; ``via`` is ``None`` on the link itself."""

    to: Annotated[str, AfterValidator(_destination)] = Field(description="default or a network")
    via: Annotated[str, AfterValidator(_gateway)] | None = None


class HostConfig(_Model):
    """The host's own interface on a switch. ``vlan`` ``None``: untagged; ``mac`` ``None``: the kernel's."""

    interface: InterfaceName = Field(description="a name for the host's interface")
    addresses: Annotated[tuple[str, ...], BeforeValidator(_addresses)] = ()
    vlan: Annotated[int | None, BeforeValidator(lambda value: None if value is None else _vid(value))] = None
    mac: Mac | None = None
    routes: Annotated[tuple[RouteConfig, ...], Field(strict=False)] = ()


class ExtensionConfig(BaseModel):
    """An extension of a Python bridge, found by the name of its entry point; it checks its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: ObjectName = Field(description="the name of an extension that is installed, such as mirror")


class SwitchConfig(_Model):
    """A virtual switch. ``uplink`` is for an external one alone, ``host`` always for an internal one."""

    type: Literal["private", "internal", "external"] = Field(description="private, internal or external")
    uplink: InterfaceName | None = None
    host: HostConfig | None = None
    bridge: Literal["kernel", "python"] = "kernel"
    extensions: Annotated[tuple[ExtensionConfig, ...], Field(strict=False)] = ()


class OwnerConfig(_Model):
    """Whose processes may open a port's AF_XDP sockets, besides root's."""

    user: ObjectName = Field(description="the name of a user")


class AfXdpConfig(_Model):
    """AF_XDP delivery, in place of a device.

    ``mode`` ``software``: through a veth pair of the port's own. ``hardware``: besides that, sockets on
    the NIC's own queues. ``auto``: hardware where the NIC steers frames into queues, which no NIC is made
    to do yet, so software. ``zero_copy`` is about the NIC's queues: a veth copies. ``trusted``: the
    consumer may bind sockets of its own there, with which it can send past the switch and its guards.
    """

    mode: Literal["auto", "hardware", "software"] = "auto"
    zero_copy: Literal["auto", "require", "off"] = "auto"
    trusted: bool = False
    owner: OwnerConfig | None = None


class AllowConfig(_Model):
    """Port guards; what is not allowed is dropped."""

    mac_spoofing: bool = False
    dhcp_server: bool = False
    router_advertisement: bool = False
    link_local_protocols: bool = False


class PortConfig(_Model):
    """A VM's port. Exactly one of ``device`` and ``af_xdp`` is set, until ``with_channels``.

    ``mac`` holds lower-case addresses with colons, or ``auto`` until ``macs.resolve_auto``.
    ``cpu``: ``auto`` (the product picks one), a number, or ``nic``. ``nic`` is an extension
    of ours: the frame is delivered on whichever CPU the NIC's RX queue runs on, without
    the hop to a CPU of the queue's own. ``delivery``: the device gets each frame as it comes (``frames``),
    or merged with its neighbours (``gro``), or TCP merged while that is worth it (``auto``).
    ``weight`` is 0 to 100; 0 means no queue.
    """

    switch: str = Field(description="the name of a switch")
    device: InterfaceName | None = None
    af_xdp: AfXdpConfig | None = None
    mac: Annotated[tuple[str, ...] | Literal["auto"], BeforeValidator(_macs)] = "auto"
    vlan: Annotated[VlanMode, BeforeValidator(_vlan), PlainSerializer(VlanMode.plain)] = VlanMode()
    queue: Literal["auto", "hardware", "software", "off"] = "auto"
    cpu: Annotated[int | Literal["auto", "nic"], BeforeValidator(_port_cpu)] = "auto"
    delivery: Literal["auto", "frames", "gro"] = "auto"
    weight: Annotated[int, Field(ge=0, le=100)] = 100
    allow: AllowConfig = AllowConfig()


AnyNic = Annotated[NicConfig, BeforeValidator(_section)]


class Config(_Model):
    """The whole file. ``metrics`` is ``None`` where the file says null: no metrics are served."""

    version: Annotated[Literal[1], BeforeValidator(_version)] = Field(description="1")
    metrics: MetricsConfig | None = MetricsConfig()
    mac_range: MacRange | None = None
    nics: Annotated[Mapping[InterfaceName, AnyNic], BeforeValidator(_section)] = {}
    switches: Annotated[Mapping[SwitchName, SwitchConfig], BeforeValidator(_section)] = {}
    ports: Annotated[Mapping[ObjectName, PortConfig], BeforeValidator(_section)] = {}


# --- reading -------------------------------------------------------------------------------------


def parse(text: str, source: str = "config") -> Config:
    """Raises ConfigError with every problem of ``text``; ``source`` names it to people."""
    return _check(load(text, source), source)


def parse_port(name: str, port: str | Mapping[str, object], source: str) -> PortConfig:
    """One port from the text of a ports.d file or from a request's mapping. Raises ConfigError.

    What the port means to the rest of the config is checked by ``merge_ports``.
    """
    document = load(port, source, ("ports", name)) if isinstance(port, str) else Document(dict(port))
    whole = replace(document, data={"version": 1, "ports": {name: document.data}})
    config, problems = _fields(whole)
    problems = [*document.problems, *problems]
    if problems:
        raise ConfigError(problems, source)
    return config.ports[name]


def merge_ports(
    config: Config, extra: Mapping[str, PortConfig], source: str = "config", known: Config | None = None
) -> Config:
    """``config`` with the ports of ports.d; the config's own win. Raises ConfigError if they clash.

    ``known`` came from here before. What has not changed since is not compared with itself again.
    """
    # The config's ports come first, so that of two ports that clash the other one is blamed.
    ports = {**config.ports, **{name: port for name, port in extra.items() if name not in config.ports}}
    merged = config.model_copy(update={"ports": ports})
    compared = merged
    if known and (known.nics, known.switches, known.mac_range) == (
        merged.nics,
        merged.switches,
        merged.mac_range,
    ):
        compared = _around(differing(known.ports, ports), merged)
    problems = list(_clashes(compared, Document(None), ports.values()))
    if problems:
        raise ConfigError(problems, source)
    return merged


def differing(before: Mapping[str, PortConfig], after: Mapping[str, PortConfig]) -> set[str]:
    """The ports that are not the same in both."""
    changed = {name for name, port in after.items() if (was := before.get(name)) is not port and was != port}
    return changed | (before.keys() - after.keys())


def _around(names: Collection[str], config: Config) -> Config:
    """``config`` with those ports alone that can clash because of the ports ``names``."""
    changed = {name: config.ports[name] for name in names if name in config.ports}
    macs = {mac for port in changed.values() if port.mac != "auto" for mac in port.mac}
    interfaces = {port.device for port in changed.values()} | {channel_outer(name) for name in changed}
    ports = {
        name: port
        for name, port in config.ports.items()
        if name in changed or port.af_xdp or port.device in interfaces or not macs.isdisjoint(port.mac)
    }
    return config.model_copy(update={"ports": ports})


def _check(document: Document, source: str) -> Config:
    config, problems = _fields(document)
    problems = [*document.problems, *problems, *_clashes(config, document)]
    if problems:
        raise ConfigError(problems, source)
    return config


def _fields(document: Document) -> tuple[Config, list[Problem]]:
    """What each value is by itself. With problems, the config holds the entries that have none."""
    data = document.data
    if not isinstance(data, Mapping):
        allowed = "must be a mapping that starts with version: 1"
        return Config(version=1), [Problem("line 1", document.shown((), data), allowed)]
    problems = list(_shape(document))
    try:
        return Config.model_validate(data), problems
    except ValidationError as error:
        faults = error.errors(include_url=False)
    problems += [problem for fault in faults for problem in _told(fault, document)]
    return Config.model_validate(_without(data, [fault["loc"] for fault in faults])), problems


def _without(data: Mapping[str, object], locations: Iterable[Location]) -> dict[str, object]:
    """``data`` without the entries and the top-level keys that ``locations`` lie in."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for section, *rest in locations:
        entries = kept.get(str(section))
        if rest and section in _SECTIONS and isinstance(entries, dict):
            entries.pop(rest[0], None)
        else:
            kept.pop(str(section), None)
    return {**kept, "version": 1}


_TYPES = {
    "bool_type": "must be true or false (in YAML 1.2 yes, no, on and off are text)",
    "int_type": "must be a whole number",
    "string_type": "must be text",
    "model_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
}


def _told(fault: Mapping[str, Any], document: Document) -> Iterator[Problem]:
    """One of pydantic's errors in the words of this product."""
    location: Location = fault["loc"]
    kind, context = fault["type"], fault.get("ctx", {})
    shown = document.shown(location, fault["input"])
    match kind:
        case "missing":
            shown, allowed = (
                "",
                f"missing: must be {_model_at(location).model_fields[_last(location)].description}",
            )
        case "extra_forbidden":
            allowed = _unknown(_last(location), _model_at(location).model_fields)
        case "literal_error":
            options = re.findall("'([^']*)'", context["expected"])
            allowed = f"must be {_either(options)}{_did_you_mean(fault['input'], options)}"
        case "greater_than_equal":
            allowed = f"must be at least {context['ge']}"
        case "less_than_equal":
            allowed = f"must be at most {context['le']}"
        case "value_error" if isinstance(context["error"], _FaultsError):
            for inner, allowed in context["error"].faults:
                yield _problem(document, (location + inner, _inside(fault["input"], inner), allowed))
            return
        case "value_error":
            if location[-1] == "[key]":
                location, shown = location[:-1], ""
            allowed = str(context["error"])
        case _:
            allowed = _TYPES.get(kind, fault["msg"])
    yield Problem(dotted(location), shown, allowed)


def _last(location: Location) -> str:
    return str(location[-1])


def _inside(value: Any, location: Location) -> object:
    """What is at ``location`` in ``value``, or no text at all if nothing is."""
    for part in location:
        try:
            value = value[part]
        except LookupError:
            return ""
    return value


def _model_at(location: Location) -> type[BaseModel]:
    """The model whose field (or unknown key) ``location`` is."""
    model: type[BaseModel] = Config
    # The second part of a section's location is a name of the operator's.
    keys = location[:1] + location[2:] if location[0] in _SECTIONS else location
    for key in keys[:-1]:
        if isinstance(key, str):
            model = _model_in(model.model_fields[key].annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside ``X | None``, ``Mapping[str, X]`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _either(options: Iterable[str]) -> str:
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last


def _did_you_mean(word: object, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word)[:64], list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(key: str, keys: Collection[str]) -> str:
    return "unknown key" + (_did_you_mean(key, keys) or f"; allowed are {', '.join(keys)}")


# --- what values mean to each other --------------------------------------------------------------

Fault = tuple[Location, object, str]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shape(document: Document) -> Iterator[Problem]:
    """Which keys may stand together in one entry, whatever else is wrong with it."""
    for name, switch in _mapping(_mapping(document.data).get("switches")).items():
        for key, allowed in _switch_shape(_mapping(switch)):
            yield _problem(document, (("switches", name, key), _mapping(switch).get(key, ""), allowed))
    for name, port in _mapping(_mapping(document.data).get("ports")).items():
        if isinstance(port, Mapping):
            ends = sum(port.get(key) is not None for key in ("device", "af_xdp"))
            if ends != 1:
                found = "missing: " if ends == 0 else "both are there: "
                yield Problem(
                    dotted(("ports", name, "device")), "", found + "exactly one of device and af_xdp"
                )
            for place, wanted in _af_xdp_shape(port, _mapping(port.get("af_xdp"))):
                yield _problem(document, (("ports", name, *place), _value_at(port, place), wanted))


def _value_at(entry: Mapping[str, Any], location: Location) -> object:
    for key in location:
        entry = _mapping(entry).get(str(key), "")
    return entry


def _af_xdp_shape(port: Mapping[str, Any], af_xdp: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    hardware = af_xdp.get("mode") == "hardware"
    if af_xdp.get("zero_copy") == "require" and not hardware:
        yield (
            ("af_xdp", "zero_copy"),
            "only a NIC's own queue can do without copying: mode: hardware with it, or zero_copy: auto",
        )
    if af_xdp.get("trusted") is True and not hardware:
        yield (
            ("af_xdp", "trusted"),
            "must be absent: only with mode: hardware is there a queue of the NIC to trust somebody with",
        )
    if hardware and port.get("queue") == "off":
        yield ("queue",), "must not be off with af_xdp.mode: hardware: the NIC's sockets would get no frame"


def _switch_shape(switch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = switch.get("type")
    has_uplink = switch.get("uplink") is not None
    if kind == "external" and not has_uplink:
        yield "uplink", "missing: an external switch needs the NIC that it shares"
    if kind in ("private", "internal") and has_uplink:
        yield "uplink", f"must be absent: a switch of type {kind} has no uplink"
    has_host = switch.get("host") is not None
    if kind == "private" and has_host:
        yield "host", "must be absent: the host has no part in a private switch; use type: internal"
    if switch.get("extensions") and switch.get("bridge") != "python":
        yield "extensions", "must be absent: only a switch with bridge: python has extensions"
    if kind == "internal" and not has_host:
        yield "host", "missing: an internal switch joins the host to its VMs; without it use type: private"
    if kind == "external" and has_host and switch.get("bridge") == "python":
        yield (
            "host",
            "must be absent with bridge: python: the host's own traffic shall not hang on a process; "
            "use bridge: kernel",
        )


def _clashes(
    config: Config, document: Document, counted: Collection[PortConfig] | None = None
) -> Iterator[Problem]:
    """``document`` is where ``config`` came from: an entry that is wrong there still has its name.

    ``counted`` are all ports, where ``config`` has fewer.
    """
    counted = config.ports.values() if counted is None else counted
    whole = _mapping(document.data)
    nics = {*config.nics, *_mapping(whole.get("nics"))}
    switches = {*config.switches, *_mapping(whole.get("switches"))}
    has_mac_range = config.mac_range is not None or whole.get("mac_range") is not None
    for fault in (
        *_mac_range_faults(config),
        *_uplink_faults(config, nics),
        *_port_faults(config, switches, has_mac_range),
        *_interface_faults(config),
        *_bridge_faults(config, counted),
        *_filter_faults(config, counted),
        *_hardware_channel_faults(config),
        *_queue_faults(config),
    ):
        yield _problem(document, fault)


def _problem(document: Document, fault: Fault) -> Problem:
    location, value, allowed = fault
    return Problem(dotted(location), "" if value == "" else document.shown(location, value), allowed)


def _mac_range_faults(config: Config) -> Iterator[Fault]:
    if config.mac_range is None:
        return
    first, last = config.mac_range.first, config.mac_range.last
    if first > last:
        yield ("mac_range", "last"), last, f"must not be below mac_range.first, {first}"
    elif first[:2] != last[:2]:
        allowed = f"must begin with {first[:2]} like mac_range.first: there are group addresses in between"
        yield ("mac_range", "last"), last, allowed


def _uplink_faults(config: Config, nics: Collection[str]) -> Iterator[Fault]:
    users: dict[str, str] = {}
    for name, switch in config.switches.items():
        if switch.uplink is None:
            continue
        location = ("switches", name, "uplink")
        if switch.uplink not in nics:
            yield location, switch.uplink, _absent(switch.uplink, "nics", nics)
        other = users.setdefault(switch.uplink, name)
        if other != name:
            allowed = f"must be a NIC of its own: {dotted(('switches', other))} has this one"
            yield location, switch.uplink, allowed


def _absent(name: str, section: str, names: Collection[str]) -> str:
    there = f"; there are {', '.join(sorted(names)[:8])}" if names else ""
    return f"must be listed under {section}{_did_you_mean(name, names) or there}"


def _port_faults(config: Config, switches: Collection[str], has_mac_range: bool) -> Iterator[Fault]:
    for name, port in config.ports.items():
        if port.switch not in switches:
            yield ("ports", name, "switch"), port.switch, _absent(port.switch, "switches", switches)
        if port.mac == "auto" and not has_mac_range:
            allowed = (
                "needs mac_range to draw from: set mac_range: {first: ..., last: ...}, or an address here"
            )
            yield ("ports", name, "mac"), port.mac, allowed
        if port.af_xdp and port.delivery == "gro":
            allowed = "must be auto or frames: an AF_XDP socket takes frames as they come"
            yield ("ports", name, "delivery"), port.delivery, allowed
        switch = config.switches.get(port.switch)
        taken = {switch.uplink, "host" if switch.host else None} if switch else set()
        if switch and switch.bridge == "python" and name in taken:
            yield ("ports", name), "", f"a Python bridge calls another device {name}: rename this port"


def _queue_faults(config: Config) -> Iterator[Fault]:
    """Queues that ask for a NIC where there is none, or for a CPU that the NIC's queues may not use."""
    for name, port in config.ports.items():
        switch = config.switches.get(port.switch)
        if switch is None:
            continue
        if switch.uplink is None:
            if port.queue == "hardware":
                allowed = "must be auto, software or off: its switch has no NIC"
                yield ("ports", name, "queue"), port.queue, allowed
            continue
        nic = config.nics.get(switch.uplink, NicConfig())
        if nic.queues.cpus and isinstance(port.cpu, int) and port.cpu not in nic.queues.cpus:
            cpus = ", ".join(map(str, nic.queues.cpus))
            where = dotted(("nics", switch.uplink, "queues", "cpus"))
            yield ("ports", name, "cpu"), port.cpu, f"must be of {where}: {cpus}; or auto, or nic"


def _hardware_channel_faults(config: Config) -> Iterator[Fault]:
    """While NICs are not told which frames belong in which queue, all queues of one have one owner."""
    owners: dict[str, str] = {}
    for name, port in config.ports.items():
        switch = config.switches.get(port.switch)
        if port.af_xdp is None or port.af_xdp.mode != "hardware" or switch is None:
            continue
        at: Location = ("ports", name, "af_xdp", "mode")
        if switch.uplink is None:
            yield at, "hardware", "must be software or auto: its switch has no NIC"
            continue
        other = owners.setdefault(switch.uplink, name)
        if other != name:
            allowed = (
                f"must be software or auto: {dotted(('ports', other))} has the queues of {switch.uplink}, "
                "which does not steer, so that one port alone can have sockets there"
            )
            yield at, "hardware", allowed


def _interface_faults(config: Config) -> Iterator[Fault]:
    """Every network interface has one use: a NIC, a switch's bridge, its host interface, or a port."""
    claims: list[tuple[Location, str, str]] = [(("nics", name), name, "") for name in config.nics]
    for name, switch in config.switches.items():
        claims.append((("switches", name), name, "must not be the name of another interface"))
        if switch.bridge == "python":
            inner = conduit_inner(name)
            allowed = f"its Python bridge is at an interface {inner}: must not be the name of another"
            claims.append((("switches", name, "bridge"), inner, allowed))
        if switch.uplink is not None and switch.uplink not in config.nics:
            claims.append((("switches", name, "uplink"), switch.uplink, "must be a NIC of its own"))
        if switch.host is not None:
            place = ("switches", name, "host", "interface")
            claims.append((place, switch.host.interface, "must not be the name of another interface"))
            inner = host_inner(switch.host.interface)
            allowed = f"its end at the switch is {inner}: must not be the name of another interface"
            claims.append((place, inner, allowed))
    for name, port in config.ports.items():
        if port.device is not None:
            claims.append((("ports", name, "device"), port.device, "must be a device of its own"))
        if port.af_xdp is not None:
            outer = channel_outer(name)
            allowed = f"its end at the switch is {outer}: must not be the name of another interface"
            claims.append((("ports", name, "af_xdp"), outer, allowed))
    owners: dict[str, Location] = {}
    for location, interface, allowed in claims:
        owner = owners.setdefault(interface, location)
        both_uplinks = location[-1] == owner[-1] == "uplink"
        if owner != location and not both_uplinks:
            value = "" if location[-1] == interface else interface
            yield location, value, f"{allowed}: {dotted(owner)} has this one"


def _bridge_faults(config: Config, ports: Iterable[PortConfig]) -> Iterator[Fault]:
    members = Counter(port.switch for port in ports)
    for name, switch in config.switches.items():
        count = members[name] + (switch.uplink is not None) + (switch.host is not None)
        if switch.bridge == "kernel" and count > MAX_BRIDGE_PORTS:
            allowed = f"has {count} devices, uplink included; a kernel bridge takes {MAX_BRIDGE_PORTS}"
            yield ("switches", name), "", f"{allowed}: move ports to another switch"


def _filter_faults(config: Config, ports: Iterable[PortConfig]) -> Iterator[Fault]:
    """No two ports on one NIC (or on one switch without a NIC) share a MAC in one VLAN, nor the host's.

    Where there are too many, nothing is compared, which also bounds the work.
    """
    counts = _filter_counts(config, ports)
    owners: dict[tuple[Location, str, int], Location] = {}
    for switch_name, shared_by in config.switches.items():
        if shared_by.host is not None and shared_by.host.mac is not None:
            at = _filtered_at(config, switch_name)
            owners[at, shared_by.host.mac, shared_by.host.vlan or 0] = ("switches", switch_name, "host")
    for name, port in config.ports.items():
        where = _filtered_at(config, port.switch)
        if port.mac == "auto" or counts[where] > MAX_FILTERS:
            continue
        for index, mac in enumerate(port.mac):
            own: Location = ("ports", name)
            shared: dict[Location, list[int]] = {}
            for vid in port.vlan.vids:
                other = owners.setdefault((where, mac, vid), own)
                if other != own:
                    shared.setdefault(other, []).append(vid)
            for other, vids in shared.items():
                place: Location = ("ports", name, "mac", *((index,) if len(port.mac) > 1 else ()))
                vlan = "untagged" if vids == [0] else f"VID {vid_ranges(vids)}"
                yield place, mac, f"must be unique on {dotted(where)} ({vlan}): {dotted(other)} has it"
    for where, count in counts.items():
        if count > MAX_FILTERS:
            allowed = f"has {count} filters (addresses times VIDs of its ports); at most {MAX_FILTERS}"
            yield where, "", allowed


def _filter_counts(config: Config, ports: Iterable[PortConfig]) -> Counter[Location]:
    """How many filters ``ports`` need, by NIC or by switch without one."""
    by_switch: Counter[str] = Counter()
    for port in ports:
        by_switch[port.switch] += len(port.vlan.vids) * (1 if port.mac == "auto" else len(port.mac))
    counts: Counter[Location] = Counter()
    for switch, count in by_switch.items():
        counts[_filtered_at(config, switch)] += count
    return counts


def _filtered_at(config: Config, name: str) -> Location:
    """The NIC that has the filters of a switch, or the switch."""
    switch = config.switches.get(name)
    return ("nics", switch.uplink) if switch is not None and switch.uplink is not None else ("switches", name)


# --- what the product does with it ---------------------------------------------------------------


def conduit_inner(switch: str) -> str:
    """The interface where the Python bridge of a switch listens."""
    return _derived(switch, "-py")


def channel_outer(port: str) -> str:
    """The switch's end of an AF_XDP port's veth pair."""
    return _derived(port, "-xsk")


def with_channels(config: Config) -> Config:
    """``config`` with the name of the device in every AF_XDP port: for the switch it is one like others."""
    ports = {
        name: port.model_copy(update={"device": channel_outer(name)}) if port.af_xdp else port
        for name, port in config.ports.items()
    }
    return config.model_copy(update={"ports": ports})


def host_inner(interface: str) -> str:
    """The switch's end of the host's interface."""
    return _derived(interface, "-sw")


def _derived(name: str, suffix: str) -> str:
    """``name`` with a suffix, cut to what the kernel takes: 15 bytes (IFNAMSIZ less the NUL)."""
    room = 15 - len(suffix)
    return name.encode()[:room].decode(errors="ignore") + suffix


def warnings(config: Config) -> list[str]:
    """What is accepted and has no effect, each once, for people."""
    return [
        f"{dotted(('nics', name, 'queues', 'rebalance'))}: queues.cpus has one CPU, so no queue can move"
        for name, nic in config.nics.items()
        if nic.queues.rebalance and nic.queues.cpus and len(set(nic.queues.cpus)) == 1
    ]


def cpus_named(config: Config) -> dict[str, int]:
    """Every CPU number in the config by its dotted path, for whoever knows which CPUs exist."""
    named: dict[str, int] = {}
    for name, nic in config.nics.items():
        for index, cpu in enumerate(nic.queues.cpus or ()):
            named[dotted(("nics", name, "queues", "cpus", index))] = cpu
    for name, port in config.ports.items():
        if isinstance(port.cpu, int):
            named[dotted(("ports", name, "cpu"))] = port.cpu
    return named


def dump(value: Config | PortConfig) -> str:
    """YAML that ``parse`` (or ``parse_port``) reads back as the same value; what is default is left out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # ruamel.yaml declares no type for it, so that None, its default, is taken for the type.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(value.model_dump(mode="json", exclude_defaults=True), text)
    return text.getvalue()
