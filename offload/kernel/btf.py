"""The type information by which libxdp knows a program that it can use as it is.

A consumer that goes by libxdp (Suricata, DPDK without options, ...) wants to load a program of its own. It
does without when it finds one on the device that looks like libxdp's: of the kernel name
``xsk_def_prog``, with an XSKMAP of the kernel name ``xsks_map``, and with BTF in which the section
``xdp_metadata`` has an ``xsk_prog_version`` (xsk_lookup_program() and check_xsk_prog_version() in
libxdp's xsk.c, lib/libxdp/libxdp.c of xdp-tools). The format is Documentation/bpf/btf.rst of Linux.
"""

from __future__ import annotations

import struct

LIBXDP_PROGRAM = "xsk_def_prog"
LIBXDP_MAP = "xsks_map"
_VERSION = 1
"""Of libxdp's default program: newer ones would be replaced by nobody."""

_MAGIC, _FORMAT = 0xEB9F, 1
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")  # name, kind and number of members, size or type
_INT, _PTR, _ARRAY, _FUNC, _FUNC_PROTO, _VAR, _DATASEC = 1, 2, 3, 12, 13, 14, 15
_GLOBAL = 1
FUNC_INFO = struct.Struct("=II")
"""struct bpf_func_info: which instruction begins a function, and the function's type."""


class _Types:
    """A BTF blob in the making."""

    def __init__(self) -> None:
        self._names = b"\0"
        self._types = b""
        self._count = 0

    def add(self, name: str, kind: int, members: int, size_or_type: int, *rest: int) -> int:
        """A type; returns its number."""
        at = len(self._names) if name else 0
        self._names += name.encode() + b"\0" if name else b""
        self._types += _TYPE.pack(at, kind << 24 | members, size_or_type)
        self._types += struct.pack(f"={len(rest)}I", *rest)
        self._count += 1
        return self._count

    def name(self, name: str) -> int:
        at = len(self._names)
        self._names += name.encode() + b"\0"
        return at

    def blob(self) -> bytes:
        types, names = len(self._types), len(self._names)
        header = _HEADER.pack(_MAGIC, _FORMAT, 0, _HEADER.size, 0, types, types, names)
        return header + self._types + self._names


def like_libxdp() -> tuple[bytes, bytes]:
    """The BTF, and the function information of a program of one function: ``int xsk_def_prog(void *)``."""
    types = _Types()
    signed = 1 << 24
    number = types.add("int", _INT, 0, 4, signed | 32)
    context = types.add("", _PTR, 0, 0)
    prototype = types.add("", _FUNC_PROTO, 1, number, types.name("ctx"), context)
    function = types.add(LIBXDP_PROGRAM, _FUNC, _GLOBAL, prototype)
    # __uint(xsk_prog_version, 1): a pointer to an array whose length is the number.
    length = types.add("", _ARRAY, 0, 0, number, number, _VERSION)
    pointer = types.add("", _PTR, 0, length)
    version = types.add("xsk_prog_version", _VAR, 0, pointer, _GLOBAL)
    types.add("xdp_metadata", _DATASEC, 1, 8, version, 0, 8)
    return types.blob(), FUNC_INFO.pack(0, function)
