"""Packet sockets: the ring that the Python bridge reads, and its ways out.

Facts are from include/uapi/linux/if_packet.h and virtio_net.h, and from net/packet/af_packet.c.

Received frames lie in a ring of version 2: a slot for each frame, handed over at once. Version 3 keeps a
frame back until its block is full or a timer of a jiffy or more has run out, which every first ARP would
pay for. A slot has room for the largest GSO frame of 64 KiB; only what is written of it costs time.

Frames go out by sendmmsg(2), gathered from the ring by the kernel: many frames a call, and no copy here.
A ring for sending and a call per frame were both measured and found slower.

A frame stands in its slot, and goes out, behind a ``struct virtio_net_hdr`` in the order of this
machine's bytes, which carries what the kernel must know of checksum and segmentation::

    slot + VNET   virtio_net_hdr   10 bytes
    slot + FRAME  the frame, from its destination address on, without the tag in the slot's header
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import select
import socket
import struct
import sys
from typing import NamedTuple

from offload.closing import Closing
from offload.kernel.failures import explain, explained

VNET_BYTES = 10
_TPACKET2_HDRLEN = 32 + 20  # struct tpacket2_hdr, aligned, and struct sockaddr_ll
FRAME = -(-(_TPACKET2_HDRLEN + 16) // 16) * 16 + VNET_BYTES - 14
"""Where a frame begins in its slot, as tpacket_rcv() places it (the field ``tp_mac``)."""
VNET = FRAME - VNET_BYTES

SLOT = 17 * 4096
"""Bytes of a slot: 64 KiB of GSO frame, its Ethernet header and tag, and what stands before it."""
_BLOCK = 1 << 20
_SLOTS_PER_BLOCK = _BLOCK // SLOT

RECEIVED = 1 << 0  # TP_STATUS_USER: the slot is ours until its status is set to 0
TAGGED = 1 << 4 | 1 << 6  # TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID
TPID_8021AD = 0x88A8
CTAG = socket.htons(0x8100)
"""The EtherType of a VLAN tag, as ``HEADER`` reads it."""

HEADER = struct.Struct(f"=4xIIH10xHH4x{VNET - 32}xH{VNET_BYTES - 2}x6s6sHH")
"""A slot: tp_len, tp_snaplen, tp_mac, tp_vlan_tci, tp_vlan_tpid, flags and GSO type, addresses, type, TCI.

The last two are in network byte order, read as if in this machine's; the last means something only behind
``CTAG``.
"""
STAMP = struct.Struct("=16xII")
"""A slot: when the frame came, seconds and nanoseconds of the wall clock."""

_VNET = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
NEEDS_WORK = 0xFF01 if sys.byteorder == "little" else 0x01FF
"""Mask on ``HEADER``'s flags and GSO type: the checksum is partial, or the frame is to be segmented."""
_LINEAR = 256
"""Bytes that the kernel keeps in one piece of a GSO frame it gets from us: more than its headers.

The ``hdr_len`` of a received one is whatever was in one piece there, up to all 64 KiB of it.
"""
_TAG = 4

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_RX_RING = 5
_PACKET_STATISTICS = 6
_PACKET_VERSION = 10
_PACKET_VNET_HDR = 15
_PACKET_QDISC_BYPASS = 20
_PACKET_IGNORE_OUTGOING = 23
_TPACKET_V2 = 1
_SEND_BUFFER = 8 << 20  # bytes asked for; without CAP_NET_ADMIN the kernel gives net.core.wmem_max
_PATIENCE_US = 10_000
"""Longest wait for room in the send buffer, which a device that has stopped keeps full."""

_PRIVILEGE = "CAP_NET_RAW"


def ifindex_of(device: str) -> int:
    """The device's ifindex in our network namespace, 0 when there is none of that name."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return 0


class Ring(Closing):
    """A packet socket with its receive ring of ``mebibytes``, for one device at a time.

    The kernel fills the ring whoever has it mapped, so a process that inherits the socket goes on where
    another stopped. The memory is the kernel's and not charged to RLIMIT_MEMLOCK. All of it
    goes when the last process that has the socket closes it.

    Raises PrivilegeError without CAP_NET_RAW, KernelError without memory.
    """

    def __init__(self, mebibytes: int) -> None:
        self.slots = tuple(
            block * _BLOCK + slot * SLOT for block in range(mebibytes) for slot in range(_SLOTS_PER_BLOCK)
        )
        """Byte offsets of the slots, in the order in which the kernel fills them."""
        self._bytes = mebibytes * _BLOCK
        with explained("packet socket", "open it", _PRIVILEGE):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            with explained("packet socket", f"set up a ring of {mebibytes} MiB", _PRIVILEGE):
                self._set_up(mebibytes)
        except BaseException:
            self.socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)

    def _set_up(self, mebibytes: int) -> None:
        sock = self.socket
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        request = struct.pack("=IIII", _BLOCK, mebibytes, SLOT, len(self.slots))
        sock.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, _PATIENCE_US))

    def bind(self, device: str) -> None:
        """Receive from, and send to, this device from now on. Raises as ``failures.explain`` does."""
        with explained(device, "read frames from it", _PRIVILEGE):
            self.socket.bind((device, _ETH_P_ALL))

    def map(self) -> Memory:
        """The ring's memory in this process."""
        return Memory(mmap.mmap(self.socket.fileno(), self._bytes))

    def wait(self, seconds: float) -> None:
        """Return when a frame has come, or the time is over. An error of the device is cleared."""
        for _, event in self._poll.poll(seconds * 1000):
            if event & select.POLLERR:
                self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def losses(self) -> int:
        """Frames that came while no slot was free, since the last call."""
        counted = self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        _, drops = struct.unpack("=II", counted)
        return int(drops)

    def close(self) -> None:
        self.socket.close()


class Memory:
    """A mapped ring: ``octets``, and the same as 32-bit ``words``, whose first in each slot is its status."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.octets = memoryview(mapped)
        self.words = self.octets.cast("I")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))


class Failure(NamedTuple):
    """Which frame of a batch was refused, counted from 0, and with what."""

    frame: int
    errno: int


class _Iovec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("msg_name", ctypes.c_void_p),
        ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.c_void_p),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("msg_hdr", _Msghdr), ("msg_len", ctypes.c_uint32))


_PARTS = 3  # header and addresses, tag, the rest
_PARTS_OF = struct.Struct("@6N")  # three times struct iovec
_HEAD = VNET_BYTES + 12

_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_sendmmsg.restype = ctypes.c_int


class Outbox:
    """Frames of a ring on their way out of its device, each behind an 802.1ad tag of its own.

    A frame must keep its slot until ``flush`` has returned.
    """

    def __init__(self, ring: Ring, memory: Memory, size: int) -> None:
        self.size = size
        self.waiting = 0
        """Frames that ``flush`` will send; never more than ``size``."""
        self._fd = ring.socket.fileno()
        self._memory = memory
        self._tags = ctypes.create_string_buffer(
            b"".join(struct.pack("!HH", TPID_8021AD, tci) for tci in range(1 << 16)), _TAG << 16
        )
        self._tag_address = ctypes.addressof(self._tags)
        self._parts = (_Iovec * (_PARTS * size))()
        self._messages = (_Mmsghdr * size)()
        start = ctypes.addressof(self._parts)
        for index, message in enumerate(self._messages):
            message.msg_hdr.msg_iov = start + index * _PARTS_OF.size
            message.msg_hdr.msg_iovlen = _PARTS
        self._view = memoryview(self._parts).cast("B")
        self._first = ctypes.addressof(self._messages)

    def add(self, slot: int, length: int, tci: int) -> None:
        """Send the frame of ``length`` bytes in the slot at this offset, under the tag ``tci``."""
        start = self._memory.address + slot + VNET
        tag = self._tag_address + tci * _TAG
        _PARTS_OF.pack_into(
            self._view, self.waiting * _PARTS_OF.size, start, _HEAD, tag, _TAG, start + _HEAD, length - 12
        )
        self.waiting += 1

    def flush(self) -> list[Failure]:
        """Send what was added, in order; returns what the kernel did not take."""
        total, self.waiting = self.waiting, 0
        done = flags = 0
        failures: list[Failure] = []
        while done < total:
            sent = _sendmmsg(
                self._fd, self._first + done * ctypes.sizeof(_Mmsghdr), min(total - done, 1024), flags
            )
            if sent > 0:
                done += sent
                continue
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code == errno.EAGAIN:
                flags = socket.MSG_DONTWAIT  # one wait is enough for everybody behind
            failures.append(Failure(done, code))
            done += 1
        return failures


def tagged_header(memory: memoryview, slot: int) -> None:
    """Make a received virtio_net_hdr right for the frame with four bytes more behind its addresses."""
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = _VNET.unpack_from(memory, slot + VNET)
    if flags & _NEEDS_CSUM:
        csum_start += _TAG
    if hdr_len:
        hdr_len = min(hdr_len + _TAG, _LINEAR)
    _VNET.pack_into(memory, slot + VNET, flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


class Sender(Closing):
    """Sends whole frames, each behind its virtio_net_hdr, out of one device, through its queueing discipline.

    Raises PrivilegeError without CAP_NET_RAW.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        with explained(device, "open a packet socket for it", _PRIVILEGE):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._ifindex = 0

    def send(self, parts: list[memoryview]) -> None:
        """Send one frame. Raises what ``failures.explain`` makes of it when the kernel does not take it.

        The device is looked for by name again once it has gone.
        """
        try:
            if not self._ifindex:
                self._socket.bind((self.device, 0))
                self._ifindex = ifindex_of(self.device)
            self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENODEV):
                self._ifindex = 0
            raise explain(error, self.device, "send a frame out of it", _PRIVILEGE) from error

    def close(self) -> None:
        self._socket.close()
