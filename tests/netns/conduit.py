"""A Python bridge in a laboratory, without a controller: the conduit, the process, and VMs behind it.

::

    web1 (VM) ==== web1 -- tc `sent` --> ext0 ==== ext0-py -- packet ring --> the bridge's process
                        <- tc `unwrap` --
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from offload.bridge import state
from offload.bridge.membership import Configured, Member, Membership, write
from offload.bridge.state import BridgeState
from offload.closing import Closing
from offload.kernel.bpf import AttachType, Map, Program
from offload.kernel.compile import compiled_file
from tests.instance import BPFFS, shared_cache
from tests.lab import Lab, Vm, tag, test_frame, wait_until

SWITCH, INNER = "ext0", "ext0-py"
MTU = 9000
"""Of the conduit. Every frame has the conduit's own tag beside its own."""
ROOT = Path(__file__).resolve().parents[2]

_HOP = struct.Struct("=III")
_U32 = struct.Struct("=I")


def member(number: int, name: str, **more: Any) -> Member:
    """A member that learns and is flooded to, without a VLAN, unless ``more`` says otherwise."""
    settings: dict[str, Any] = {"vids": frozenset({0}), "learn": True, "flood": True}
    return Member(number, name, "port", **settings | more)


def service_tag(number: int) -> bytes:
    """The conduit's tag: all 16 bits are the member's id."""
    return struct.pack("!HH", 0x88A8, number)


def conduit_frame(
    number: int, dst: str, src: str, seq: int = 0, vid: int | None = None, **more: Any
) -> bytes:
    """A test frame on the conduit, from or for the member with this id."""
    inner = b"" if vid is None else tag(vid)
    return test_frame(dst, src, seq, tags=service_tag(number) + inner, **more)


class Bridge(Closing):
    """The conduit ``ext0`` in the lab's host namespace, and a bridge's process at its inner end.

    ``installed`` are modules by the name of their entry point, with a class ``Lab``; for this process alone.
    Everything goes with ``close``.
    """

    def __init__(
        self, lab: Lab, *members: Member, installed: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        self.lab = lab
        self._held = ExitStack()
        self.directory = Path(self._held.enter_context(tempfile.TemporaryDirectory()))
        self.membership = Membership(SWITCH, INNER, members, **more)
        self._environment = os.environ | {"PYTHONPATH": f"{ROOT}:{self._install(installed or {})}"}
        self.process: subprocess.Popen[str] | None = None
        try:
            self.make_conduit()
            self.tell()
            self.start()
        except BaseException:
            self.close()
            raise

    def _install(self, extensions: Mapping[str, str]) -> Path:
        """A directory as an installed package has it."""
        packages = self.directory / "packages"
        info = packages / "lab_extensions-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-extensions\nVersion: 1\n")
        lines = [f"{name} = lab_{name}:Lab\n" for name in extensions]
        (info / "entry_points.txt").write_text("[offload.extensions]\n" + "".join(lines))
        for name, source in extensions.items():
            (packages / f"lab_{name}.py").write_text(source)
        return packages

    def make_conduit(self) -> None:
        host = self.lab.host
        host.ip(f"link add {SWITCH} mtu {MTU} type veth peer name {INNER} mtu {MTU}")
        host.ip(f"link set {SWITCH} up")
        host.ip(f"link set {INNER} up")

    def tell(self, *members: Member, **changes: Any) -> None:
        """Write the membership, with these members if there are any, and with ``changes``."""
        if members:
            changes["members"] = members
        self.membership = replace(self.membership, **changes)
        write(self.directory, self.membership)

    def argv(self) -> list[str]:
        """The command line of the process."""
        return [sys.executable, "-m", "offload.bridge", "--run-dir", str(self.directory), SWITCH]

    def start(self, *, bound: bool = True, within: Sequence[str] = ()) -> None:
        """Start the process; with ``bound`` it reads frames when this returns.

        ``within`` is a command that runs it.
        """
        self.log = (self.directory / "log").open("a+")
        argv = self.lab.host.argv(*within, *self.argv())
        self.process = subprocess.Popen(argv, stderr=self.log, env=self._environment, cwd=ROOT, text=True)
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, f"the bridge ended with {process.returncode}: {self.said()}"
            return state.state_file(self.directory, SWITCH).exists() and self._is_new(bound)

        wait_until(ready, "the bridge is up")

    def _is_new(self, bound: bool) -> bool:
        """Whether the state is of a worker of our process."""
        assert self.process is not None
        found = self.state()
        stat = Path(f"/proc/{found.pid}/stat")
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
        return found.bound == bound and parent == self.process.pid

    def state(self) -> BridgeState:
        """As last written, up to a second ago."""
        return state.read(self.directory, SWITCH)

    def wait_for(self, what: str, condition: Any, timeout: float = 5.0) -> BridgeState:
        """The first state that fits."""
        wait_until(lambda: bool(condition(self.state())), what, timeout)
        return self.state()

    def settled(self) -> BridgeState:
        """A state that was written after this call."""
        now = time.time()
        return self.wait_for("another state is written", lambda found: found.written > now)

    def said(self) -> str:
        """What it has logged."""
        return (self.directory / "log").read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the process; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(5)
        self.process = None
        self.log.close()
        return code

    def connect(self, vids: Mapping[str, int] | None = None, *vms: Vm) -> None:
        """Lead frames between these VMs, of the members with the same names, and the bridge, as tc does.

        ``vids`` are access VLANs.
        """
        artifact = compiled_file(Path(__file__).with_name("conduit.c"), {}, shared_cache())
        maps = {
            name: self._held.enter_context(Map.create(name, spec)) for name, spec in artifact.maps.items()
        }
        pins = Path(self._held.enter_context(tempfile.TemporaryDirectory(dir=BPFFS)))
        for name, spec in artifact.programs.items():
            with Program.load(name, spec, maps, AttachType.NONE, frags=False) as program:
                program.pin(pins / name)
                self._held.callback((pins / name).unlink)
        host = self.lab.host
        self._attach(INNER, pins / "silence", "ingress")
        self._attach(INNER, pins / "silence", "egress")
        self._attach(SWITCH, pins / "unwrap", "ingress")
        ids = {item.name: item.id for item in self.membership.members}
        for vm in vms:
            ifindex, number = host.ifindex(vm.device), ids[vm.device]
            vid = (vids or {}).get(vm.device, 0)
            maps["hops"].update(_U32.pack(ifindex), _HOP.pack(number, host.ifindex(SWITCH), vid))
            maps["devices"].update(_U32.pack(number), _U32.pack(ifindex))
            self._attach(vm.device, pins / "sent", "ingress")

    def _attach(self, device: str, pin: Path, side: str) -> None:
        host = self.lab.host
        host.run("tc", "qdisc", "replace", "dev", device, "clsact")
        host.run(
            "tc", "filter", "add", "dev", device, side, "bpf", "direct-action", "object-pinned", str(pin)
        )

    def close(self) -> None:
        if self.process is not None:
            self.stop()
        self._held.close()


def configured(name: str, **options: Any) -> Configured:
    """An extension as the membership names it."""
    return Configured(name, options)
