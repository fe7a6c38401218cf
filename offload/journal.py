"""Settings that are not ours, written down before they are changed.

The journal lets ``detach`` give every setting back when the daemon is dead. It
is a file of JSON lines, one for each setting::

    {"boot": "…", "netns": 4026531840, "type": "Feature",
     "fields": {"device": "eth1", "ifindex": 3, "feature": "rx-gro"}, "before": true}

An entry holds for one boot and one network namespace only: elsewhere the same
device name and ifindex mean another device. One process writes at a time.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from offload import model
from offload.errors import OffloadError
from offload.files import replace_durably, sync_directory, write_durably
from offload.model import DeviceResource, Resource, Value

_TYPES: Mapping[str, type[Resource]] = {
    name: item for name, item in vars(model).items() if isinstance(item, type) and issubclass(item, Resource)
}


@dataclass(frozen=True)
class Era:
    """The time and place in which a device's name and ifindex mean one device.

    ``boot_id`` is the kernel's random id of this boot, ``netns`` the inode number
    of the network namespace.
    """

    boot_id: str
    netns: int


class Journal:
    """The journal file at ``path``, seen from ``era``.

    Reading needs no file and changes none. What is recorded outlives the process.
    Raises ``OffloadError`` when a line cannot be understood, naming file and line.
    """

    def __init__(self, path: Path, era: Era) -> None:
        self._path = path
        self._era = era
        self._originals: dict[Resource, Value] = {}
        self._of_device: defaultdict[int, set[Resource]] = defaultdict(set)
        self._elsewhere: list[bytes] = []
        self._end = 0
        self._load()

    def originals(self) -> dict[Resource, Value]:
        """Return what each recorded setting of this era was before we changed it."""
        return dict(self._originals)

    def originals_of(self, ifindexes: Iterable[int]) -> dict[Resource, Value]:
        """As ``originals``, for settings of these devices alone."""
        return {
            resource: self._originals[resource]
            for ifindex in ifindexes
            for resource in self._of_device.get(ifindex, ())
        }

    def record(self, resource: Resource, before: Value) -> None:
        """``record_all`` for one setting."""
        self.record_all({resource: before})

    def record_all(self, befores: Mapping[Resource, Value]) -> None:
        """Write down what settings are before they are changed; on disk when this returns.

        The first value wins: a resource that is already recorded keeps its entry,
        because what we see now may be our own doing.
        """
        new = {resource: value for resource, value in befores.items() if resource not in self._originals}
        if not new:
            return
        lines = b"".join(self._encode(resource, before) for resource, before in new.items())
        _make_directory(self._path.parent)
        created = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            # A crash in the middle of an append left half a line behind the last whole one.
            file.truncate(self._end)
            file.seek(self._end)
            write_durably(file.fileno(), lines)
        if created:
            sync_directory(self._path.parent)
        self._end += len(lines)
        self._originals |= new
        for resource in new:
            self._of_device[_ifindex(resource)].add(resource)

    def forget(self, resources: Iterable[Resource]) -> None:
        """Drop the entries of settings that have been given back.

        A crash leaves the old journal or the new one. Entries of earlier boots go at the
        same time; those of other namespaces stay, because ``detach`` may yet run there.
        """
        gone = {resource for resource in resources if resource in self._originals}
        if not gone:
            return
        kept = {resource: value for resource, value in self._originals.items() if resource not in gone}
        content = b"".join([*self._elsewhere, *(self._encode(*entry) for entry in kept.items())])
        replace_durably(self._path, content, 0o600)
        self._originals = kept
        for resource in gone:
            self._of_device[_ifindex(resource)].discard(resource)
        self._end = len(content)

    def _load(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        # What follows the last newline was torn by a crash, and its setting never changed.
        self._end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._end].split(b"\n")[:-1], start=1):
            try:
                self._take(line)
            except (ValueError, KeyError, TypeError) as error:
                raise OffloadError(
                    f"{self._path}:{number}: not a journal entry ({error}). The settings it stands for "
                    "cannot be given back by offload; put them right by hand and delete this line"
                ) from error

    def _take(self, line: bytes) -> None:
        entry = json.loads(line)
        boot_id, netns = entry["boot"], entry["netns"]
        if boot_id != self._era.boot_id:
            return
        if netns != self._era.netns:
            self._elsewhere.append(line + b"\n")
            return
        resource = _decode_resource(entry["type"], entry["fields"])
        self._originals.setdefault(resource, _decode_value(entry["before"]))
        self._of_device[_ifindex(resource)].add(resource)

    def _encode(self, resource: Resource, before: Value) -> bytes:
        entry = {
            "boot": self._era.boot_id,
            "netns": self._era.netns,
            "type": type(resource).__name__,
            "fields": {field.name: getattr(resource, field.name) for field in fields(resource)},
            "before": before,
        }
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _ifindex(resource: Resource) -> int:
    """0 where it is of no device, or of one that was still to be made."""
    return resource.ifindex if isinstance(resource, DeviceResource) else 0


def _decode_resource(name: str, values: dict[str, object]) -> Resource:
    if name not in _TYPES:
        raise ValueError(f"unknown resource {name!r}")
    declared = {field.name: field.type for field in fields(_TYPES[name])}
    found = {key: type(value).__name__ for key, value in dict(values).items()}
    # model.py postpones its annotations, so that a field's type is its name.
    if found != declared:
        raise ValueError(f"{name} has the fields {declared}, not {found}")
    return _TYPES[name](**values)


def _decode_value(value: object) -> Value:
    """Undo what JSON did to a value: it has lists where the model has tuples."""
    if isinstance(value, list):
        return tuple(_decode_value(item) for item in value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"{value!r} is not the value of a resource")


def _make_directory(directory: Path) -> None:
    """Make the run directory, readable by its owner and group; one that exists keeps its mode."""
    if directory.is_dir():
        return
    directory.mkdir(parents=True)
    directory.chmod(0o750)
    sync_directory(directory.parent)
