"""The C structs of ``bpf/abi.h`` as Python sees them, built from the compiler's own description."""

from __future__ import annotations

import ctypes as ct
from typing import Any

_NUMBERS: dict[str, Any] = {
    "unsigned char": ct.c_uint8,
    "unsigned short": ct.c_uint16,
    "unsigned int": ct.c_uint32,
    "int": ct.c_int32,
    "unsigned long long": ct.c_uint64,
}


class Layout:
    """One struct: its size in bytes, and reading and packing by field names, in host byte order.

    ``description`` is bcc's: ``[name, [[field, type], …], "struct_packed"]``. Padding would appear
    as a ``__pad_N`` field, and is refused: what the kernel compares or copies whole must have no holes.
    """

    def __init__(self, description: Any) -> None:
        self._type = _structure(description)
        self.size = ct.sizeof(self._type)

    def read(self, raw: bytes) -> dict[str, Any]:
        """Field values by name, nested structs as dicts, arrays as tuples. ``raw`` has ``size`` bytes."""
        return _as_dict(self._type.from_buffer_copy(raw))

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
        step = self.per_cpu_size(1) // 8
        words = memoryview(raw).cast("Q")
        sums = [sum(words[index::step]) for index in range(step)]
        return _as_dict(self._type.from_buffer_copy(b"".join(word.to_bytes(8, "little") for word in sums)))


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


def _as_dict(value: Any) -> dict[str, Any]:
    result = {}
    for name, _ in value._fields_:
        member = getattr(value, name)
        if isinstance(member, ct.Array):
            member = tuple(member)
        result[name] = _as_dict(member) if isinstance(member, ct.Structure) else member
    return result
