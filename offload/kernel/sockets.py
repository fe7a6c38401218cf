"""AF_XDP sockets that are made here for somebody else, and what kernel and drivers can do with them."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import pwd
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..channels import CHUNK_MTU, INNER
from ..errors import KernelError, OffloadError, PrivilegeError, UnsupportedError
from ..xsk import abi, atomic, bound, errors, libc, umem
from .bpf import Map
from .channels import QUEUES, Channels
from .ethtool import Ethtool
from .holders import Holders
from .links import Links
from .netdev import XdpFeatures, xdp_features
from .netns import OWN_NETNS, call_in

_NO_DEVICE = 0x7FFFFFFF
_FEW = umem.UmemShape(frames=64)


def user(name: str) -> tuple[int, int] | None:
    """Uid and gid of a user of this host, ``None`` when there is no such user."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return None
    return found.pw_uid, found.pw_gid


def user_name(uid: int) -> str:
    """The name of a user of this host, or the number of one that it does not know."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def takes_frags() -> bool:
    """Whether an AF_XDP socket can take frames of several buffers: from Linux 6.6 on.

    A kernel that does not know the flag says so before it looks for the device (xsk_bind(), net/xdp/xsk.c).
    """
    with socket.socket(abi.AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as sock:
        try:
            libc.bind(sock.fileno(), abi.SOCKADDR_XDP.pack(abi.AF_XDP, abi.XDP_USE_SG, _NO_DEVICE, 0, 0))
        except OSError as error:
            return error.errno != errno.EINVAL
    raise KernelError(f"an AF_XDP socket could be bound to ifindex {_NO_DEVICE}")


def zero_copy(device: str, ifindex: int) -> bool:
    """Whether a NIC's driver has zero copy. Before Linux 6.3 that is found out by trying, on queue 0."""
    try:
        return bool(xdp_features(device, ifindex) & XdpFeatures.XSK_ZEROCOPY)
    except UnsupportedError:
        pass
    try:
        with umem.Umem(_FEW) as memory, bound.BoundSocket.bind(memory, device, copy="zero-copy"):
            return True
    except errors.UnsupportedError:
        return False
    except errors.XskError as error:
        raise _ours(error) from error


def open_socket(
    device: str,
    queue: int,
    shape: umem.UmemShape,
    *,
    netns: str = OWN_NETNS,
    rings: bound.RingSizes | None = None,
    copy: bound.Copy = "auto",
    multi_buffer: bool = False,
) -> bound.BoundSocket:
    """A socket with a UMEM of its own, bound to a queue of ``device`` in the namespace ``netns``."""

    def open_it() -> bound.BoundSocket:
        memory = umem.Umem(shape)
        try:
            return bound.BoundSocket.bind(
                memory, device, queue, rings=rings, copy=copy, multi_buffer=multi_buffer
            )
        except BaseException:
            memory.close()
            raise

    try:
        return call_in(netns, open_it)
    except errors.XskError as error:
        raise _ours(error) from error


def _ours(error: errors.XskError) -> OffloadError:
    """The library's error as one of the product's."""
    match error:
        case errors.PrivilegeError():
            return PrivilegeError(str(error))
        case errors.UnsupportedError():
            return UnsupportedError(str(error))
        case _:
            return KernelError(str(error))


_CHUNK = 4096
"""Bytes of a chunk: what holds a frame of ``CHUNK_MTU``."""
_RX_ENTRIES = 2048
_OBJ_GET, _F_WRONLY = 7, 1 << 4  # include/uapi/linux/bpf.h


@dataclass(frozen=True)
class Parcel:
    """What a consumer gets: file descriptors, and what he has to know of them (JSON's values).

    ``kind`` says in few words what it is.
    """

    kind: str
    descriptors: tuple[int, ...]
    particulars: Mapping[str, Any]

    def handed_to(self, pid: int) -> None:
        """The process ``pid`` has it now."""


@dataclass(frozen=True)
class _SocketParcel(Parcel):
    """A socket, whose holder is remembered."""

    port: str
    device: str
    queue: int
    inode: int
    holders: Holders

    def handed_to(self, pid: int) -> None:
        self.holders.note(self.port, self.device, self.queue, pid, self.inode, self.particulars)


class Supply:
    """Maps and sockets of AF_XDP ports for their consumers.

    May be used by several threads at once; a call may take some seconds. What is given out is closed here
    on leaving the ``with`` block, and lives on with whoever was sent it.
    ``nic`` is the NIC whose queues are meant, ``None`` the software channel.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._holders = channels.holders

    def channel(self, port: str, nic: str | None) -> dict[str, Any]:
        """What there is to know of a channel. Raises KernelError when it is not there."""
        with self._there(port):
            if nic:
                with Ethtool() as ethtool, Links() as links:
                    link = links.snapshot()[nic]
                    queues, mtu = ethtool.rx_queues(link), link.mtu
            else:
                queues, mtu = QUEUES, self._mtu(port)
            return {
                "ifname": nic or INNER,
                "kind": "hardware" if nic else "software",
                "queues": queues,
                "mtu": mtu,
                "netns": None if nic else self._channels.namespace(port),
                "map_path": str(self._pin(port, nic)),
            }

    @contextmanager
    def map(self, port: str, nic: str | None) -> Iterator[Parcel]:
        """The map that the program of the channel redirects to, to be written only."""
        with self._there(port):
            descriptor = _writable(self._pin(port, nic))
        try:
            yield Parcel("map", (descriptor,), {})
        finally:
            os.close(descriptor)

    @contextmanager
    def socket(
        self, port: str, nic: str | None, queue: int, frames: int, copy: bound.Copy
    ) -> Iterator[Parcel]:
        """A socket in its place in the map, and the memory of its UMEM, which has ``frames`` chunks.

        On a NIC's queue it can only receive. Its fill ring holds chunks already: frames that come before
        the consumer is ready are kept, up to the size of the RX ring, which a part of the chunks can fill:
        a NIC that does not copy needs the others for frames of other ports.
        """
        entries = min(_RX_ENTRIES, 1 << (frames // 2).bit_length() - 1)
        device = nic or INNER
        with self._there(port):
            made = open_socket(
                device,
                queue,
                umem.UmemShape(frames, _CHUNK),
                netns=OWN_NETNS if nic else self._channels.namespace(port),
                rings=bound.RingSizes(rx=entries, tx=0 if nic else entries),
                copy=copy if nic else "copy",
                multi_buffer=nic is None and self._mtu(port) > CHUNK_MTU,
            )
        with made.umem, made:
            _require_mappable(made)
            with self._there(port), Map.pinned(self._pin(port, nic)) as sockets:
                _fill(made, frames if nic else frames // 2)
                sockets.update(struct.pack("=I", queue), struct.pack("=I", made.fileno()))
            kind = f"{'zero-copy' if made.zero_copy else 'copying'} socket"
            yield _SocketParcel(
                kind,
                (made.fileno(), made.umem.fd),
                made.particulars.document(),
                port,
                device,
                queue,
                os.fstat(made.fileno()).st_ino,
                self._holders,
            )

    def _pin(self, port: str, nic: str | None) -> Path:
        return self._channels.pins(port) / ("nic_sockets" if nic else "xsks")

    def _mtu(self, port: str) -> int:
        def read() -> int:
            with Links() as inside:
                return inside.snapshot()[INNER].mtu

        return call_in(self._channels.namespace(port), read)

    @contextmanager
    def _there(self, port: str) -> Iterator[None]:
        """One of our errors for each. What is not there is of a channel that is not made, or was lost."""
        try:
            yield
        except (FileNotFoundError, KeyError) as error:
            raise KernelError(
                f"port {port} does not have that channel now: `offload ports` says why"
            ) from error
        except errors.XskError as error:
            raise _ours(error) from error
        except OSError as error:
            raise KernelError(f"port {port}: {error}") from error


def _require_mappable(made: bound.BoundSocket) -> None:
    """Before Linux 6.4 nobody can map the rings of a bound socket any more (xsk_mmap(), net/xdp/xsk.c)."""
    try:
        bound.BoundSocket.adopt(os.dup(made.fileno()), made.umem, made.particulars).close()
    except errors.BusyError as error:
        raise UnsupportedError(
            "this kernel lets nobody else use a socket that is bound (Linux 6.4 does): take the map, "
            "/xsk_map_fd or its pin, and bind a socket of your own"
        ) from error


def _fill(made: bound.BoundSocket, count: int) -> None:
    """Give the kernel the first ``count`` chunks to receive into."""
    ring = made.fill
    addresses = range(0, count * _CHUNK, _CHUNK)
    struct.pack_into(f"={count}Q", ring.memory, ring.entries_at, *addresses)
    atomic.Word(ring.producer).store(count)
    made.wake_rx()


def _writable(pin: Path) -> int:
    """A descriptor of a pinned map that it can be written by, not read."""
    name = ct.create_string_buffer(os.fsencode(pin))
    request = struct.pack("=QII", ct.addressof(name), 0, _F_WRONLY)
    try:
        return libc.bpf(_OBJ_GET, ct.create_string_buffer(request, len(request)))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KernelError(f"{pin}: {error.strerror}") from error
