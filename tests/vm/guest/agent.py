"""Runs inside the machine: takes commands from a virtio serial port, one at a time, and sends their output.

Each message is a line of JSON. In: ``{"argv": [...], "env": {...}}``. Out: ``{"stdout": base64}`` and
``{"stderr": base64}`` as they come, then ``{"exit": code}``. Who is outside watches the time.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import subprocess
from pathlib import Path
from typing import IO, Any

PORT = "offload"


def port() -> Path:
    """The character device of the port named ``PORT``."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return Path("/dev", name.parent.name)
    raise RuntimeError("no virtio serial port of that name")


def serve(outside: IO[bytes]) -> None:
    while line := outside.readline():
        answer(outside, json.loads(line))


def answer(outside: IO[bytes], request: dict[str, Any]) -> None:
    """Run one command and send what it says, and how it ended."""

    def send(message: dict[str, object]) -> None:
        left = memoryview(json.dumps(message).encode() + b"\n")
        while left:  # the port takes 32 KiB at once
            left = left[outside.write(left) :]

    try:
        child = subprocess.Popen(
            request["argv"],
            env=os.environ | request["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        send({"stderr": base64.b64encode(f"{error}\n".encode()).decode()})
        send({"exit": 127})
        return
    with selectors.DefaultSelector() as pipes:
        for name in ("stdout", "stderr"):
            pipes.register(getattr(child, name), selectors.EVENT_READ, name)
        # A process that the command left behind may hold the pipes; it is not waited for.
        while (pipes.get_map() and child.poll() is None) or pipes.select(0):
            for key, _ in pipes.select(0.5):
                data = os.read(key.fd, 1 << 16)
                if data:
                    send({key.data: base64.b64encode(data).decode()})
                else:
                    pipes.unregister(key.fileobj)
    send({"exit": child.wait()})


if __name__ == "__main__":
    with open(port(), "r+b", buffering=0) as outside:
        serve(outside)
