"""The software channels of AF_XDP ports, and the maps that consumers put their sockets into.

A channel is a veth pair whose inner end is alone in a namespace, kept at ``Paths.namespace``, with a
program of its own (``bpf/channel.c``). What is pinned for a port, below ``PIN_DIR/v4/xsk/PORT``::

    xsks               its sockets at the inner end, by RX queue
    channel_counters   what the program saw
    channel-DIGEST     the program as attached
    xsks_probe         tells whether a queue has a socket
    link               the XDP link at the inner end
    nic_sockets        its sockets on the NIC's own queues, by RX queue (mode: hardware)
    nic_sockets_probe  as above

All of it outlives the process; a consumer needs none of ours to go on. To libxdp the program looks like
its own, so that a consumer which would load that one takes ours: see btf.py.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from ..channels import INNER
from ..errors import KernelError, PrivilegeError
from ..model import Link as Device
from ..paths import Paths
from .abi import Layout
from .bpf import XDP_FLAGS_DRV_MODE, AttachType, Link, Map, Program, possible_cpus
from .btf import LIBXDP_MAP, LIBXDP_PROGRAM, like_libxdp
from .compile import Artifact, compiled
from .holders import Holders
from .links import Links
from .netns import as_init_sees, call_in, is_kept, keep_new, let_go

QUEUES = 1
"""RX queues of an inner end, and slots of its map."""

_XDP_REDIRECT = 4
_FRAME = 14  # bytes that BPF_PROG_TEST_RUN wants at least (bpf_prog_test_run_xdp(), net/bpf/test_run.c)
_U32 = struct.Struct("=I")
_PROGRAM, _PROBE = "channel", "taken"
_OWNER_AND_ROOT = 0o660
_PASS = 0o711  # of directories: others may pass, and not list


class Channels:
    """The channels of an instance. It holds nothing open: everything is found by its pins."""

    def __init__(self, paths: Paths, links: Links, alias: str) -> None:
        self._paths = paths
        self._links = links
        self._alias = alias
        self.holders = Holders(paths)

    @cached_property
    def _artifact(self) -> Artifact:
        """Not compiled before there is an AF_XDP port."""
        return compiled("channel.c", {"MAX_CHANNEL_QUEUES": QUEUES}, self._paths.cache)

    @cached_property
    def _counters(self) -> Layout:
        return Layout(self._artifact.maps["channel_counters"].value)

    @property
    def digest(self) -> str:
        """What ``read`` says of a channel that runs this version's program."""
        return self._artifact.digest[:8]

    def pins(self, port: str) -> Path:
        return self._paths.objects / "xsk" / port

    def ports(self) -> Iterator[str]:
        """Every port of which something is pinned."""
        directory = self._paths.objects / "xsk"
        if directory.is_dir():
            yield from sorted(each.name for each in directory.iterdir())

    def namespace(self, port: str) -> str:
        """The path of a channel's namespace, to enter it by."""
        return as_init_sees(self._paths.namespace(port))

    # The software channel

    def inner(self, outer: Device) -> Device:
        """The inner end, with its counters."""
        return self._links.peer(outer)

    def read(self, port: str, outer: Device) -> tuple[str, int, int, str] | None:
        """MAC, MTU, owner's uid and program digest of a channel; ``None`` when it is not whole."""
        pins = self.pins(port)
        if not (pins / "link").exists() or not is_kept(self._paths.namespace(port)):
            return None
        try:
            inner = self.inner(outer)
        except KernelError:
            return None  # somebody has moved it away
        digest = self._attached(port, inner.xdp_prog_id) if inner.up else ""
        return inner.mac, inner.mtu, (pins / "xsks").stat().st_uid, digest

    def _attached(self, port: str, program_id: int) -> str:
        """The digest of the program that was attached last, if it is that one."""
        for pin in self.pins(port).glob(f"{_PROGRAM}-*"):
            with Program.pinned(pin) as program:
                if program.info().id == program_id:
                    return pin.name.removeprefix(f"{_PROGRAM}-")
        return ""

    def make(self, name: str, port: str, mac: str, mtu: int, owner: int) -> None:
        """Make a channel with everything that belongs to it, or nothing. What was left of one goes first."""
        self.remove(name, port)
        with ExitStack() as undo:
            undo.callback(self.remove, name, port)
            try:
                keep_new(self._paths.namespace(port))
            except PermissionError as error:
                needs = "CAP_SYS_ADMIN and CAP_SYS_CHROOT are needed"
                raise PrivilegeError(f"port {port}: cannot make its network namespace: {needs}") from error
            except OSError as error:
                raise KernelError(f"port {port}: cannot make its network namespace: {error}") from error
            self._links.create_veth(name, INNER, self._alias, mtu=mtu, netns=self.namespace(port))
            self._links.set_ipv6_disabled(name, True)
            with Links(self.namespace(port)) as inside:
                inside.set_ipv6_disabled(INNER, True)
                inside.set_mac(inside.ifindex(INNER), mac)
            self._attach(port)
            self.set_owner(port, owner)
            with Links(self.namespace(port)) as inside:
                inside.set_up(inside.ifindex(INNER), True)
            undo.pop_all()

    def change(self, name: str, port: str, mac: str, mtu: int, owner: int) -> None:
        """Change what differs, under the sockets that are there."""
        with Links(self.namespace(port)) as inside:
            ifindex = inside.ifindex(INNER)
            inside.set_mac(ifindex, mac)
            inside.set_mtu(ifindex, mtu)
            inside.set_up(ifindex, True)
        self._links.set_mtu(self._links.ifindex(name), mtu)
        self._attach(port)
        self.set_owner(port, owner)

    def remove(self, name: str, port: str) -> None:
        """Remove a channel, whatever is there of it. Idempotent."""
        device = self._links.find(name)
        if device and device.alias == self._alias:
            self._links.delete_link(device.ifindex)
        let_go(self._paths.namespace(port))
        self._paths.hand_over(port).unlink(missing_ok=True)
        self.holders.forget(port)
        shutil.rmtree(self.pins(port), ignore_errors=True)

    def _attach(self, port: str) -> None:
        """Have this version's program at the inner end, in place of another version's."""
        pins = self.pins(port)
        with ExitStack() as stack:
            maps = {}
            for name, declared in self._artifact.maps.items():
                if not (pins / name).exists():
                    label = LIBXDP_MAP if name == "xsks" else name
                    stack.enter_context(Map.create(label, declared)).pin(pins / name)
                maps[name] = stack.enter_context(Map.pinned(pins / name))
            spec = self._artifact.programs[_PROGRAM]
            loading = Program.load(
                LIBXDP_PROGRAM, spec, maps, AttachType.XDP, frags=True, types=like_libxdp()
            )
            program = stack.enter_context(loading)
            if not self._replaced(pins / "link", program):
                stack.enter_context(self._link(port, program)).pin(pins / "link")
            for old in pins.glob(f"{_PROGRAM}-*"):
                old.unlink()
            program.pin(pins / f"{_PROGRAM}-{self.digest}")
        self.watch(port, "xsks")

    @staticmethod
    def _replaced(pin: Path, program: Program) -> bool:
        """Whether a link is there still, and runs ``program`` from now on."""
        if not pin.exists():
            return False
        with Link.pinned(pin) as link:
            if link.info().ifindex:
                link.replace(program)
                return True
        pin.unlink()
        return False

    def _link(self, port: str, program: Program) -> Link:
        def create() -> Link:
            with Links() as inside:
                ifindex = inside.ifindex(INNER)
            doing = f"attach XDP to the inner end of port {port}"
            return Link.create(program, ifindex, AttachType.XDP, flags=XDP_FLAGS_DRV_MODE, doing=doing)

        return call_in(self.namespace(port), create)

    # The maps of sockets

    def watch(self, port: str, name: str) -> None:
        """Make it possible to see which slots of this map are taken."""
        pin = self.pins(port) / name
        with Map.pinned(pin) as sockets:
            spec = self._artifact.programs[_PROBE]
            with Program.load(_PROBE, spec, {"xsks": sockets}, AttachType.XDP, frags=True) as probe:
                probe.pin_anew(pin.with_name(f"{name}_probe"))

    def has_consumer(self, port: str, name: str = "xsks", queue: int = 0) -> bool:
        """Whether somebody's socket is in a slot of a map, which user space cannot read from the map."""
        with Program.pinned(self.pins(port) / f"{name}_probe") as probe:
            return probe.test_run(_U32.pack(queue).ljust(_FRAME, b"\0")).verdict == _XDP_REDIRECT

    def set_owner(self, port: str, uid: int, name: str = "xsks") -> None:
        """Let this user open a map of the port by its pin; besides it only root may.

        It stays root's by its group, as a service may lack CAP_DAC_OVERRIDE.
        """
        pin = self.pins(port) / name
        found = pin.stat()
        if stat.S_IMODE(found.st_mode) != _OWNER_AND_ROOT:
            pin.chmod(_OWNER_AND_ROOT)
        if found.st_uid != uid:
            os.chown(pin, uid, 0)
        for directory in (pin.parent, *list(pin.parent.parents)[:3]):
            directory.chmod(_PASS)

    def owner(self, port: str, name: str) -> int | None:
        """Whose a map of the port is, ``None`` when there is none."""
        try:
            return (self.pins(port) / name).stat().st_uid
        except FileNotFoundError:
            return None

    # What goes on

    def counters(self, port: str) -> dict[str, Any]:
        """What the program at the inner end saw, with the fields of ``struct channel_counters``."""
        size = self._counters.per_cpu_size(possible_cpus())
        with Map.pinned(self.pins(port) / "channel_counters") as counters:
            raw = counters.lookup(_U32.pack(0), size)
        if raw is None:
            raise KernelError(f"the counters of port {port} are gone")
        return self._counters.total(raw)
