"""A guest in QEMU: software emulation, one CPU, a virtio-net device on a tap with every offload on.

::

    with Guest(lab.host, "web1", mac, image) as guest:
        guest.run("ip address add 192.0.2.11/24 dev eth0")
        assert "0% packet loss" in guest.run("ping -c 3 192.0.2.1")
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.closing import Closing
from tests.lab import Namespace

BOOT_TIME = 120.0
"""Seconds until a guest must be up: 5 on an idle machine."""
COMMAND_TIME = 60.0
"""Seconds that a command in a guest may take."""
_END = re.compile(rb"\n--- ([0-9]+)\n")


@dataclass(frozen=True)
class Image:
    """What a guest boots: a kernel and its initramfs."""

    kernel: Path
    initramfs: Path


class Guest(Closing):
    """A context manager; on leaving, the guest's power is cut and its tap goes.

    ``device`` is the tap, which QEMU makes in ``ns``. With ``incoming`` the guest does not boot: it
    waits for another one's ``migrate`` to that unix socket.
    """

    def __init__(
        self, ns: Namespace, device: str, mac: str, image: Image, incoming: Path | None = None
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="offload-guest-"))
        self._commands, commands = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        self._replies = self._monitor.makefile("rb")
        command = [
            # It must not outlive the test, however that ends; nor take the CPUs from the network.
            *("setpriv", "--pdeathsig", "KILL", "nice", "-n", "10"),
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-smp", "1"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-serial", f"file:{self._directory / 'console'}"),
            *("-chardev", f"socket,id=commands,fd={commands.fileno()}", "-serial", "chardev:commands"),
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}", "-mon", "monitor,mode=control"),
            *("-netdev", f"tap,id=net0,ifname={device},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net0,mac={mac},romfile="),
            *(("-incoming", f"unix:{incoming}") if incoming else ()),
        ]
        with commands, monitor, (self._directory / "errors").open("wb") as errors:
            inherited = (commands.fileno(), monitor.fileno())
            self._process = subprocess.Popen(ns.argv(*command), stderr=errors, pass_fds=inherited)
        try:
            self._monitor.settimeout(BOOT_TIME)
            self._reply("QMP")
            self.monitor("qmp_capabilities")
            if incoming is None:
                self._read_answer(BOOT_TIME)
        except BaseException:
            self.close()
            raise

    def run(self, command: str, check: bool = True, timeout: float = COMMAND_TIME) -> str:
        """Run a shell command in the guest; returns what it wrote. With ``check`` it must succeed."""
        self._commands.sendall(command.encode() + b"\n")
        status, written = self._read_answer(timeout)
        assert status == 0 or not check, f"{command}: exit {status}: {written}"
        return written

    def _read_answer(self, timeout: float) -> tuple[int, str]:
        """Exit status and output of the command that runs."""
        received = b""
        self._commands.settimeout(timeout)
        while not (end := _END.search(received)):
            try:
                more = self._commands.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"the guest does not answer: {received!r}{self._told()}") from None
            assert more, f"the guest has ended{self._told()}"
            received += more
        return int(end[1]), received[: end.start()].decode().strip()

    def _told(self) -> str:
        return "".join(f"\n{(self._directory / name).read_text()}" for name in ("console", "errors"))

    def monitor(self, command: str, **arguments: object) -> Any:
        """Run one QMP command; returns what it returned."""
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self._reply("return")

    def migrate(self, incoming: Path) -> None:
        """Move to the QEMU that waits at ``incoming``; return when it runs there."""
        self.monitor("migrate", uri=f"unix:{incoming}")
        while (status := self.monitor("query-migrate")["status"]) != "completed":
            assert status in ("setup", "active", "device"), status
            time.sleep(0.2)  # asking takes time from the guest

    def _reply(self, kind: str) -> Any:
        """The next thing that QEMU says and that is no event."""
        message: dict[str, Any] = {"event": None}
        while "event" in message:
            line = self._replies.readline()
            assert line, f"QEMU has ended{self._told()}"
            message = json.loads(line)
        assert kind in message, message
        return message[kind]

    def close(self) -> None:
        """Cut the power. May be called twice."""
        self._process.kill()
        self._process.wait()
        for end in (self._commands, self._replies, self._monitor):
            end.close()
        shutil.rmtree(self._directory, ignore_errors=True)
