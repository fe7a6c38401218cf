"""A consumer of an AF_XDP port: puts a socket of its own into the port's map, as a VM's backend does.

``python -m tests.netns.consumer DEVICE MAP QUEUES`` does so on every queue of a NIC, and waits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from offload.channels import INNER
from offload.closing import Closing
from offload.kernel.netns import call_in
from offload.xsk.bound import BoundSocket, RingSizes
from offload.xsk.bpf import XskMap
from offload.xsk.socket import Socket
from offload.xsk.umem import Umem, UmemShape
from tests.instance import Instance
from tests.lab import QUIET, test_frame, wait_until

SHAPE = UmemShape(frames=16_384, chunk_size=4096)
RINGS = RingSizes(rx=8192, tx=2048)
"""Room for all that a test sends, as nobody reads meanwhile."""


class Consumer(Closing):
    """A socket on the port's software channel, or with ``queue`` on that queue of its NIC.

    ``frames`` are those that came in, in order. ``close`` ends it as its process's death would.
    """

    def __init__(
        self,
        instance: Instance,
        port: str,
        *,
        queue: int | None = None,
        shape: UmemShape = SHAPE,
        rings: RingSizes = RINGS,
        multi_buffer: bool = False,
    ) -> None:
        channels = instance.port(port)["af_xdp"]["channels"]
        at = next(one for one in channels if (one["ifname"], one["queue"]) == _place(instance, queue))
        self._held = ExitStack()
        umem = self._held.enter_context(Umem(shape))

        def bind() -> BoundSocket:
            return BoundSocket.bind(umem, at["ifname"], at["queue"], rings=rings, multi_buffer=multi_buffer)

        inside = instance.paths.namespace(port) if queue is None else Path(instance.host.path)
        self.socket = self._held.enter_context(Socket(call_in(str(inside), bind)))
        with XskMap.pinned(Path(at["map_path"])) as sockets:
            sockets.insert(at["map_index"], self.socket)
        self.frames: list[bytes] = []

    def take(self) -> list[bytes]:
        """Everything that has come in, and is not counted again."""
        while True:
            with self.socket.receive(1024, timeout=0) as batch:
                if not len(batch):
                    break
                self.frames += map(bytes, batch)
        taken, self.frames = self.frames, []
        return taken

    def expect(self, count: int, seconds: float = 5) -> list[bytes]:
        """Wait for ``count`` frames, and see that no more come."""
        found: list[bytes] = []

        def enough() -> bool:
            found.extend(self.take())
            return len(found) >= count

        wait_until(enough, f"{count} frames", seconds)
        self.socket.wait(QUIET)
        return found + self.take()

    def announce(self, mac: str, tags: bytes = b"") -> None:
        """Be heard on the port."""
        self.send([test_frame(mac, mac, tags=tags)])

    def send(self, frames: Iterable[bytes]) -> None:
        wanted = list(frames)
        assert self.socket.send(wanted, timeout=5) == len(wanted)

    def close(self) -> None:
        self._held.close()


def _place(instance: Instance, queue: int | None) -> tuple[str, int]:
    if queue is None:
        return INNER, 0
    nic = next(iter(instance.json("nics")))["name"]
    return str(nic), queue


def main(device: str, sockets: str, queues: str) -> None:
    with ExitStack() as held:
        for queue in range(int(queues)):
            umem = held.enter_context(Umem(SHAPE))
            bound = held.enter_context(BoundSocket.bind(umem, device, queue, rings=RINGS))
            consumer = held.enter_context(Socket(bound))
            with XskMap.pinned(Path(sockets)) as entries:
                entries.insert(queue, consumer)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
