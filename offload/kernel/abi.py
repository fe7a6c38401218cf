"""The C structs of ``bpf/abi.h`` as Python sees them, built from the compiler's own description."""

from __future__ import annotations

import ctypes as ct
import struct
from collections.abc import Mapping
from typing import Any

_NUMBERS: dict[str, Any] = {
    "unsigned char": ct.c_uint8,
    "unsigned short": ct.c_uint16,
    "unsigned int": ct.c_uint32,
    "int": ct.c_int32,
    "unsigned long long": ct.c_uint64,
}
_FORMATS = {ct.c_uint8: "B", ct.c_uint16: "H", ct.c_uint32: "I", ct.c_int32: "i", ct.c_uint64: "Q"}


class Layout:
    """One struct: its size in bytes, and reading and packing by field names, in host byte order.

    ``description`` is bcc's: ``[name, [[field, type], …], "struct_packed"]``. Padding would appear
    as a ``__pad_N`` field, and is refused: what the kernel compares or copies whole must have no holes.
    """

    def __init__(self, description: Any) -> None:
        self._type = _structure(description)
        self.size = ct.sizeof(self._type)
        members, formats = _members(self._type, 0)
        after = self.size - struct.calcsize(f"={formats}")
        self._members = members
        self._numbers = struct.Struct(f"={formats}{after}x")

    def read(self, raw: bytes) -> dict[str, Any]:
        """Field values by name, nested structs as dicts, arrays as tuples. ``raw`` has ``size`` bytes."""
        return _read(self._members, self._numbers.unpack(raw))

    def pack(self, **fields: int | tuple[int, ...]) -> bytes:
        """The struct as bytes; every field must be given."""
        names = {name for name, _ in self._type._fields_}
        if names != set(fields):
            raise ValueError(f"fields {sorted(fields)} given for a struct of {sorted(names)}")
        return bytes(self._type(**fields))

    def per_cpu_size(self, cpus: int) -> int:
        """Bytes of a per-CPU value of so many CPUs: each CPU's part is rounded up to 8."""
        return -(-self.size // 8) * 8 * cpus

    def total(self, raw: bytes) -> dict[str, Any]:
        """Field by field the sum over CPUs of a per-CPU value of ``per_cpu_size`` bytes.

        For structs of 64-bit counters only.
        """
        words = memoryview(raw).cast("Q").tolist()
        step = self.per_cpu_size(1) // 8
        of_cpus = [words[at : at + step] for at in range(0, len(words), step)]
        return _read(self._members, tuple(map(sum, zip(*of_cpus, strict=True))))


def _structure(description: Any) -> Any:
    name, members, _ = description
    fields = []
    for field, kind, *dimension in members:
        if field.startswith("__pad"):
            raise ValueError(f"struct {name} has padding before its end: {field}")
        element = _NUMBERS[kind] if isinstance(kind, str) else _structure_or_union(kind)
        fields.append((field, element * dimension[0][0] if dimension else element))
    return type(name, (ct.Structure,), {"_fields_": fields})


def _structure_or_union(description: Any) -> Any:
    name, members, shape = description
    if shape != "union":
        return _structure(description)
    fields = [(field, _NUMBERS[kind]) for field, kind in members]
    return type(name or "union", (ct.Union,), {"_fields_": fields})


_Members = Mapping[str, Any]
"""Where a struct's fields are among its numbers: one, a slice (an array), or those of a nested struct."""


def _members(kind: Any, first: int) -> tuple[_Members, str]:
    """The fields of a struct whose first number is the ``first``, and their formats as in ``struct``."""
    found: dict[str, Any] = {}
    formats = ""
    for name, member in kind._fields_:
        at = first + len(formats)
        if issubclass(member, ct.Structure):
            found[name], format_ = _members(member, at)
        elif issubclass(member, ct.Union):  # nobody reads one
            size = ct.sizeof(member)
            found[name], format_ = slice(at, at + size), "B" * size
        elif issubclass(member, ct.Array):
            size = member._length_
            found[name], format_ = slice(at, at + size), _FORMATS[member._type_] * size
        else:
            found[name], format_ = at, _FORMATS[member]
        formats += format_
    return found, formats


def _read(members: _Members, numbers: tuple[int, ...]) -> dict[str, Any]:
    return {name: _read(at, numbers) if isinstance(at, dict) else numbers[at] for name, at in members.items()}
