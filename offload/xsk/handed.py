"""Sockets and maps that a provider hands over, for programs without any privilege.

A provider listens on a unix socket (SOCK_SEQPACKET) and speaks the protocol of the AF_XDP device plugin for
Kubernetes, as DPDK's ``use_cni`` does, and an extension of it: it makes an AF_XDP socket, with a UMEM,
puts it into the XSKMAP of the device's program, and hands it over. ``offload`` is such a provider::

    with handed.connect(Path("/run/offload/xsk/db1.sock")) as provider, provider.socket("xsk0") as bound:
        for batch in Socket(bound):
            ...

The connection may be closed when everything has been handed over: the provider keeps nothing. When the
program ends, however it ends, the queue is free. This module does without NumPy.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .bound import BoundSocket, Particulars
from .bpf import XskMap
from .closing import Closing
from .errors import XskError, explain
from .umem import Umem

_MESSAGE = 1 << 16
_DESCRIPTORS = 2
_CONNECT = {
    errno.ENOENT: "Nobody hands anything over there: the provider does not run, or has no such port",
    errno.ECONNREFUSED: "Its provider does not run any more",
    errno.EACCES: "It belongs to another user",
    errno.EPROTOTYPE: "It speaks another protocol",
}


class RefusedError(XskError):
    """The provider says no; the message is its reason."""

    def __init__(self, message: str, device: str | None = None, queue: int | None = None) -> None:
        super().__init__(0, message, device, queue)


@dataclass(frozen=True)
class Channel:
    """What a provider has to give.

    ifname    device, to be named when something of it is asked for
    kind      ``hardware``: a NIC, whose sockets only receive; ``software``: a virtual device
    queues    RX queues, each of which can have one socket
    mtu       of the device
    netns     path of the network namespace that the device is in; None for the provider's own
    map_path  where the XSKMAP is pinned
    """

    ifname: str
    kind: Literal["hardware", "software"]
    queues: int
    mtu: int
    netns: str | None
    map_path: str


class HandedSocket(BoundSocket):
    """A bound socket whose UMEM is its own: ``close`` lets go of both."""

    def close(self) -> None:
        super().close()
        self.umem.close()


class Provider(Closing):
    """A connection to a provider, from ``connect``. ``close`` leaves what was handed over as it is.

    All methods raise RefusedError with the provider's reason, and XskError when it goes away.
    """

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self._socket = sock
        self._path = path

    def channels(self) -> list[Channel]:
        """What there is."""
        answer, _ = self._ask("/channels")
        try:
            return [Channel(**each) for each in json.loads(answer)]
        except (ValueError, TypeError) as error:
            raise RefusedError(f"{self._path}: does not tell what there is: {answer[:200]}") from error

    def socket(self, device: str, queue: int = 0, frames: int = 4096) -> HandedSocket:
        """An AF_XDP socket on a queue of ``device``, with a UMEM of ``frames`` chunks of its own.

        Frames are collected in its RX ring from now on.
        """
        answer, descriptors = self._ask(f"/xsk_socket,{device},{queue},{frames}", device, queue)
        with _Owned(descriptors) as owned:
            document = self._granted(answer, owned, 2, device, queue)
            try:
                particulars = Particulars.of(json.loads(document))
                umem = Umem.adopt(owned.descriptors.pop(), particulars.umem)
            except ValueError as error:
                raise RefusedError(f"{self._path}: {error}", device, queue) from error
            try:
                return HandedSocket.adopt(owned.descriptors.pop(), umem, particulars)
            except BaseException:
                umem.close()
                raise

    def map(self, device: str) -> XskMap:
        """The XSKMAP of ``device``, for a socket that this process binds itself; it needs privileges to."""
        answer, descriptors = self._ask(f"/xsk_map_fd,{device}", device)
        with _Owned(descriptors) as owned:
            self._granted(answer, owned, 1, device)
            return XskMap(owned.descriptors.pop())

    def close(self) -> None:
        self._socket.close()

    def _granted(self, answer: str, owned: _Owned, count: int, device: str, queue: int | None = None) -> str:
        """What follows on /fd_ack."""
        word, _, rest = answer.partition(",")
        if word != "/fd_ack" or len(owned.descriptors) != count:
            raise RefusedError(rest or f"{self._path}: answers {answer!r}", device, queue)
        return rest

    def _ask(
        self, request: str, device: str | None = None, queue: int | None = None
    ) -> tuple[str, list[int]]:
        try:
            self._socket.send(request.encode())
            answer, descriptors = self._receive()
            if not answer:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        except OSError as error:
            raise explain(error.errno or errno.ETIMEDOUT, f"ask {self._path}", {}, device, queue) from error
        return answer.decode(errors="replace"), descriptors

    def _receive(self) -> tuple[bytes, list[int]]:
        """A message and its file descriptors. ``socket.recv_fds`` of Python 3.11 ignores its flags."""
        descriptors = array.array("i")
        room = socket.CMSG_SPACE(_DESCRIPTORS * descriptors.itemsize)
        message, ancillary, _, _ = self._socket.recvmsg(_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        return message, descriptors.tolist()


class _Owned(Closing):
    """File descriptors that came in; ``close`` closes those that nobody took."""

    def __init__(self, descriptors: list[int]) -> None:
        self.descriptors = descriptors

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def connect(path: Path, timeout: float = 10.0) -> Provider:
    """Connect to the provider that listens at ``path``; it has ``timeout`` seconds for each answer.

    Raises RefusedError, or XskError when there is nobody.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    provider = Provider(sock, path)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        answer, _ = provider._ask(f"/connect,{socket.gethostname()}")
        if answer != "/host_ok":
            raise RefusedError(answer.partition(",")[2] or f"{path}: answers {answer!r}")
    except XskError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise explain(error.errno or errno.ETIMEDOUT, f"connect to {path}", _CONNECT) from error
    return provider
