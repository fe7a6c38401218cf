"""A VM whose stack takes its time for every frame, which on a veth is its queue's CPU's time. Needs root."""

from __future__ import annotations

import ctypes
import socket
import struct

from offload.closing import Closing
from tests.lab import TEST_ETHERTYPE, Vm

# include/uapi/linux/filter.h, bpf_common.h; include/uapi/asm-generic/socket.h
SO_ATTACH_FILTER = 26
BPF_ALU_DIV_K = 0x34
BPF_RET_K = 0x06
DIVISIONS = 2000
"""As many as fit into the memory that a socket may have everywhere (net.core.optmem_max: 20 KiB)."""
_INSTRUCTION = struct.Struct("=HBBI")


class SlowGuest(Closing):
    """Until ``close``, each test frame to ``vm`` costs some 5 us for each of ``sockets``. Nothing is kept.

    They are packet sockets with a filter that divides for a while and then drops.
    """

    def __init__(self, vm: Vm, sockets: int) -> None:
        self._sockets: list[socket.socket] = []
        for _ in range(sockets):
            self._sockets.append(vm.ns.call(_reading))

    def close(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()


def _reading() -> socket.socket:
    code = _INSTRUCTION.pack(BPF_ALU_DIV_K, 0, 0, 3) * DIVISIONS + _INSTRUCTION.pack(BPF_RET_K, 0, 0, 0)
    kept = ctypes.create_string_buffer(code)
    reader = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # struct sock_fprog: how many instructions, and where they are
    program = struct.pack("@HP", DIVISIONS + 1, ctypes.addressof(kept))
    reader.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    reader.bind(("eth0", TEST_ETHERTYPE))
    return reader
