"""A process without privileges that is handed an AF_XDP socket.

``python -m tests.netns.xsk_receiver FD COUNT``: FD is a unix socket, by which come the socket, its memory
and its particulars. What is refused to the process and then COUNT frames go back by it, a message each.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from offload import xsk
from offload.xsk import abi


def main(fd: int, count: int) -> None:
    capabilities = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    )
    given = socket.socket(fileno=fd)
    message, fds, _, _ = socket.recv_fds(given, 65536, 2)
    particulars = xsk.Particulars.of(json.loads(message))
    with (
        xsk.Umem.adopt(fds[1], particulars.umem) as umem,
        xsk.BoundSocket.adopt(fds[0], umem, particulars) as bound,
        xsk.Socket(bound) as received,
    ):
        refused = []
        for attempt in (
            lambda: xsk.BoundSocket.bind(xsk.Umem(), particulars.device),
            lambda: socket.socket(abi.AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(bound.fileno())).setsockopt(
                abi.SOL_XDP, abi.XDP_TX_RING, 64
            ),
            lambda: received.send([bytes(60)]),
        ):
            try:
                attempt()
            except (OSError, ValueError) as error:
                refused.append(type(error).__name__)
        given.send(json.dumps([capabilities.split()[1], *refused]).encode())
        while count:
            with received.receive(timeout=5) as batch:
                for frame in batch:
                    given.send(frame)
                    count -= 1


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
