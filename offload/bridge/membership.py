"""Who is in a Python bridge: RUN_DIR/bridges/SWITCH.json, written by the controller.

::

    {"version": 1, "switch": "ext0", "inner": "ext0-py",
     "members": [{"id": 3, "name": "web1", "role": "port", "vids": [0], "learn": false, "flood": true,
                  "macs": ["02:15:5d:00:00:01"], "link_local": false}],
     "extensions": [{"name": "mirror", "file": "/var/log/offload/web1.pcapng"}],
     "flood_limit": {"rate": 20000, "burst": 20000}, "ageing": 300, "stations": 4096}

The last three may be left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from offload.errors import ConfigError, OffloadError, Problem
from offload.paths import Paths

VERSION = 1
MAX_ID = 0xFFFF
"""Highest id of a member: all 16 bits of a VLAN tag's TCI carry it."""
MAX_VID = 4094

Role = Literal["port", "host", "uplink"]

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SWITCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class Member:
    """One device of the switch, known by the port id that its tc program tags frames with.

    ``vids``: the VLANs it is in, 0 for frames without a tag. ``learn``: addresses it sends from are learnt.
    ``flood``: it gets unicast frames for addresses that nobody knows. ``macs`` are its own for good,
    in lower case with colons. ``link_local``: 01:80:c2:00:00:00 to 0f from and to it are forwarded.
    """

    id: int
    name: str
    role: Role
    vids: frozenset[int]
    learn: bool = False
    flood: bool = False
    macs: tuple[str, ...] = ()
    link_local: bool = False


@dataclass(frozen=True)
class FloodLimit:
    """Frames a second that a member may have sent to several members, and how many at once."""

    rate: float = 20_000.0
    burst: float = 20_000.0


@dataclass(frozen=True)
class Configured:
    """An extension as the config names it: an entry point of ``offload.extensions``, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal name and options."""
        return json.dumps([self.name, self.options], sort_keys=True)

    def entry(self) -> dict[str, Any]:
        """Name and options as they stand in a file."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class Membership:
    """A whole file. ``ageing`` is in seconds; ``stations``: most addresses that are learnt per member."""

    switch: str
    inner: str
    members: tuple[Member, ...] = ()
    extensions: tuple[Configured, ...] = ()
    flood_limit: FloodLimit = FloodLimit()
    ageing: float = 300.0
    stations: int = 4096


def membership_file(run_dir: Path, switch: str) -> Path:
    """Where the membership of ``switch`` is. Raises ConfigError when that is no name of a switch."""
    return Paths(run_dir).bridges / f"{valid_switch(switch)}.json"


def valid_switch(switch: str) -> str:
    """The same name, which leads out of no directory. Raises ConfigError when no switch can have it."""
    if not _SWITCH.fullmatch(switch):
        raise ConfigError(
            [Problem("SWITCH", switch, "must be 1 to 63 letters, digits, '_', '.' and '-', no sign first")],
            "command line",
        )
    return switch


def write(run_dir: Path, membership: Membership) -> None:
    """Put the file in place, in one step for whoever reads it. Raises ConfigError for what ``load`` would."""
    file = membership_file(run_dir, membership.switch)
    text = render(membership)
    parse(text, f"switch {membership.switch}")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text)


def replace_file(file: Path, text: str) -> None:
    """Write ``text`` beside ``file`` and give it its name, so that nobody reads half of it."""
    draft = file.with_name(f"{file.name}.new")
    draft.write_text(text)
    os.replace(draft, file)


def render(membership: Membership) -> str:
    """The text that ``parse`` reads."""
    return json.dumps(
        {
            "version": VERSION,
            "switch": membership.switch,
            "inner": membership.inner,
            "members": [asdict(member) | {"vids": sorted(member.vids)} for member in membership.members],
            "extensions": [item.entry() for item in membership.extensions],
            "flood_limit": asdict(membership.flood_limit),
            "ageing": membership.ageing,
            "stations": membership.stations,
        },
        indent=1,
    )


def load(run_dir: Path, switch: str) -> Membership:
    """Read the file of ``switch``.

    Raises FileNotFoundError, ConfigError when it is wrong, OffloadError when it cannot be read.
    """
    file = membership_file(run_dir, switch)
    try:
        text = file.read_text()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise OffloadError(f"{file}: cannot be read: {error}") from error
    membership = parse(text, str(file))
    if membership.switch != switch:
        raise ConfigError(
            [Problem("switch", membership.switch, f"must be {switch}, as the file's name")], str(file)
        )
    return membership


def file_version(file: Path) -> tuple[int, ...] | None:
    """What changes when the file is replaced or written to; ``None`` without it."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def parse(text: str, source: str = "membership") -> Membership:
    """Read a file's text. Raises ConfigError with every problem in it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError([Problem("line 1", "", f"must be JSON: {error}")], source) from error
    reader = _Reader()
    membership = reader.membership(data)
    if reader.problems:
        raise ConfigError(reader.problems, source)
    return membership


class _Reader:
    """Takes JSON apart; what is wrong is noted, and something harmless taken for it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def membership(self, data: Any) -> Membership:
        keys = {"version", "switch", "inner", "members", "extensions", "flood_limit", "ageing", "stations"}
        data = self._object("file", data, keys)
        self._value("version", data.get("version"), lambda value: value == VERSION, str(VERSION))
        members = tuple(
            self._member(f"members[{index}]", item)
            for index, item in enumerate(self._list("members", data.get("members", [])))
        )
        self._unique(members)
        limit = self._object("flood_limit", data.get("flood_limit", {}), {"rate", "burst"})
        default = FloodLimit()
        return Membership(
            switch=self._text("switch", data.get("switch")),
            inner=self._text("inner", data.get("inner")),
            members=members,
            extensions=tuple(
                self._extension(f"extensions[{index}]", item)
                for index, item in enumerate(self._list("extensions", data.get("extensions", [])))
            ),
            flood_limit=FloodLimit(
                self._number("flood_limit.rate", limit.get("rate", default.rate), 0),
                self._number("flood_limit.burst", limit.get("burst", default.burst), 1),
            ),
            ageing=self._number("ageing", data.get("ageing", Membership.ageing), 1),
            stations=int(self._number("stations", data.get("stations", Membership.stations), 0)),
        )

    def _member(self, path: str, data: Any) -> Member:
        keys = {"id", "name", "role", "vids", "learn", "flood", "macs", "link_local"}
        data = self._object(path, data, keys)
        number = data.get("id")
        self._value(f"{path}.id", number, _within(0, MAX_ID), f"a number from 0 to {MAX_ID}")
        role = data.get("role", "port")
        self._value(f"{path}.role", role, get_args(Role).__contains__, " | ".join(get_args(Role)))
        vids = self._list(f"{path}.vids", data.get("vids", []))
        for index, vid in enumerate(vids):
            self._value(f"{path}.vids[{index}]", vid, _within(0, MAX_VID), f"a number from 0 to {MAX_VID}")
        macs = self._list(f"{path}.macs", data.get("macs", []))
        for index, mac in enumerate(macs):
            self._value(
                f"{path}.macs[{index}]", mac, _is_unicast, "a unicast address in lower case with colons"
            )
        return Member(
            id=number if isinstance(number, int) else 0,
            name=self._text(f"{path}.name", data.get("name")),
            role=role,
            vids=frozenset(vid for vid in vids if isinstance(vid, int)),
            learn=self._flag(f"{path}.learn", data.get("learn", False)),
            flood=self._flag(f"{path}.flood", data.get("flood", False)),
            macs=tuple(mac for mac in macs if isinstance(mac, str)),
            link_local=self._flag(f"{path}.link_local", data.get("link_local", False)),
        )

    def _extension(self, path: str, data: Any) -> Configured:
        options = dict(self._object(path, data, None))
        return Configured(self._text(f"{path}.name", options.pop("name", None)), options)

    def _unique(self, members: tuple[Member, ...]) -> None:
        seen: dict[object, str] = {}
        for index, member in enumerate(members):
            path = f"members[{index}]"
            claims: list[tuple[str, object, str]] = [
                ("id", ("id", member.id), str(member.id)),
                ("name", ("name", member.name), member.name),
            ]
            claims += [
                ("macs", (mac, vid), f"{mac} in VLAN {vid}") for mac in member.macs for vid in member.vids
            ]
            for key, claim, shown in claims:
                other = seen.setdefault(claim, path)
                if other != path:
                    self.problems.append(Problem(f"{path}.{key}", shown, f"belongs to {other} already"))

    def _value(self, path: str, value: Any, fits: Callable[[Any], bool], allowed: str) -> None:
        if isinstance(value, list | dict) or not fits(value):
            self.problems.append(Problem(path, json.dumps(value), f"must be {allowed}"))

    def _object(self, path: str, value: Any, keys: set[str] | None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.problems.append(Problem(path, json.dumps(value), "must be an object"))
            return {}
        if keys is not None:
            self.problems += [
                Problem(f"{path}.{key}", "", f"unknown key; there is: {', '.join(sorted(keys))}")
                for key in value.keys() - keys
            ]
        return value

    def _list(self, path: str, value: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        self.problems.append(Problem(path, json.dumps(value), "must be a list"))
        return []

    def _text(self, path: str, value: Any) -> str:
        if isinstance(value, str) and value:
            return value
        self.problems.append(Problem(path, json.dumps(value), "must be a text that is not empty"))
        return ""

    def _flag(self, path: str, value: Any) -> bool:
        self._value(path, value, lambda given: isinstance(given, bool), "true or false")
        return value is True

    def _number(self, path: str, value: Any, least: float) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= least:
            return value
        self.problems.append(Problem(path, json.dumps(value), f"must be a number, {least:g} or more"))
        return least


def _within(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_unicast(value: Any) -> bool:
    return isinstance(value, str) and bool(_MAC.fullmatch(value)) and not int(value[1], 16) & 1
