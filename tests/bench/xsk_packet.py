"""What the benchmark of AF_XDP compares with: plain AF_PACKET sockets in Python.

::

    python -m tests.bench.xsk_packet DEVICE [TO]

Counts the frames that come to DEVICE, or sends each out of TO, until SIGINT. Prints ``{"frames": N}``.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from contextlib import suppress

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_LONGEST = 2048


def count(receiver: socket.socket, sender: socket.socket | None) -> int:
    """Take frames until the process is interrupted; returns how many."""
    buffer = bytearray(_LONGEST)
    view = memoryview(buffer)
    frames = 0
    receive = receiver.recv_into
    with suppress(KeyboardInterrupt):
        if sender is None:
            while True:
                receive(buffer)
                frames += 1
        send = sender.send
        while True:
            length = receive(buffer)
            with suppress(OSError):  # the device's queue is full
                send(view[:length])
            frames += 1
    return frames


def main(device: str, target: str | None = None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    receiver.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sender = None
    if target is not None:
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.bind((target, 0))
    receiver.bind((device, _ETH_P_ALL))
    print("ready", file=sys.stderr, flush=True)
    print(json.dumps({"frames": count(receiver, sender)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
