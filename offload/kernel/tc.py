"""The switch's tc programs on devices: as tcx links, or as classic filters where the kernel has no tcx.

tcx came with Linux 6.6. A link is pinned as ``PINS/IFINDEX/SIDE-PROGRAM-DIGEST``, which is how its program
is known. A classic filter (cls_bpf under clsact) has no pin: it lives with the device, and its name
says the same, and whether the clsact qdisc came with it. On either, another version's program is
replaced in place, between two frames.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE
from pyroute2.netlink.rtnl import (
    RTM_DELQDISC,
    RTM_DELTFILTER,
    RTM_GETTFILTER,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
)
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from ..errors import OffloadError
from ..model import Role
from .bpf import AttachType, Link, Map, Program
from .compile import Artifact
from .failures import explained
from .rtnl import RouteSocket, attributes, open_socket, text

Side = Literal["ingress", "egress"]

PROGRAMS: Mapping[Role, Mapping[Side, str]] = {
    "port": {"ingress": "sent", "egress": "guard"},
    "host": {"ingress": "sent", "egress": "guard"},
    "uplink": {"ingress": "wire"},
    "function": {"ingress": "strayed", "egress": "silence"},
    "conduit": {"ingress": "unwrap"},
    "silent": {"ingress": "silence", "egress": "silence"},
}
"""What runs on a device of each role: functions of ``bpf/switch.c``."""

_TCX = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}
_NO_DEVICE = 0x7FFFFFFF

# include/uapi/linux/pkt_sched.h, pkt_cls.h, rtnetlink.h, if_ether.h
_CLSACT = 0xFFFF0000  # TC_H_MAKE(TC_H_CLSACT, 0)
_CLSACT_PARENT = 0xFFFFFFF1  # TC_H_CLSACT
_PARENT: Mapping[Side, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_MIN_INGRESS, _EGRESS
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_NAME = 1, 2, 7
_DIRECT_ACTION = 1  # TCA_BPF_FLAG_ACT_DIRECT
_ETH_P_ALL = 0x0003
_TCMSG_SIZE = 20

_PREFIX = "offload"
_OWN_QDISC = "own_qdisc"
_PRIORITY = 0xC0F
_HANDLE = 1


@dataclass(frozen=True)
class Attached:
    """A program of ours on one side of a device. ``digest`` is of its source."""

    program: str
    digest: str


class TcPrograms:
    """Attaches the programs of ``artifact``, whose maps are ``maps``, and finds those that are attached.

    ``close`` leaves everything in place.
    """

    def __init__(self, pins: Path, artifact: Artifact, maps: Mapping[str, Map]) -> None:
        self._pins = pins
        self.artifact = artifact
        self._maps = maps
        self._programs: dict[str, Program] = {}
        self._classic = _ClassicFilters()

    @property
    def digest(self) -> str:
        """What ``Attached.digest`` says of this version's programs."""
        return self.artifact.digest[:8]

    @cached_property
    def tcx(self) -> bool:
        """Whether the kernel has tcx: it looks for the device only when it knows the kind of link."""
        try:
            with self._load("silence") as probe:
                Link.create(probe, _NO_DEVICE, AttachType.TCX_INGRESS, doing="try tcx").close()
        except OffloadError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENODEV, errno.EINVAL):
                return error.__cause__.errno == errno.ENODEV
            raise
        return True

    def on(self, ifindex: int) -> dict[Side, Attached]:
        """Our programs on a device, by side. Empty for one that has gone."""
        if not self.tcx:
            return self._classic.on(ifindex)
        found: dict[Side, Attached] = {}
        for pin, side, attached in self._pins_of(ifindex):
            with Link.pinned(pin) as link:
                if link.info().ifindex == ifindex:  # or somebody forced it off
                    found[side] = attached
        return found

    def attach(self, device: str, ifindex: int, role: Role) -> None:
        """Have this version's programs of ``role`` on a device, and none else of ours."""
        wanted = PROGRAMS[role]
        there = self.on(ifindex)
        for side, name in wanted.items():
            if there.get(side) != Attached(name, self.digest):
                self._put(device, ifindex, side, name)
        for side in there.keys() - wanted.keys():
            self._take(ifindex, side)

    def detach(self, ifindex: int) -> None:
        """Take our programs off a device. One that has gone took them along."""
        for side in self.on(ifindex):
            self._take(ifindex, side)
        self.forget(ifindex)

    def forget(self, ifindex: int) -> None:
        """Remove the pins of a device that has gone."""
        shutil.rmtree(self._pins / str(ifindex), ignore_errors=True)

    def open(self) -> None:
        """From here on devices are those of the namespace that the caller is in, whoever asks."""
        self._classic.open()

    def close(self) -> None:
        self._classic.close()
        while self._programs:
            self._programs.popitem()[1].close()

    def _pins_of(self, ifindex: int) -> list[tuple[Path, Side, Attached]]:
        found: list[tuple[Path, Side, Attached]] = []
        directory = self._pins / str(ifindex)
        for pin in sorted(directory.iterdir()) if directory.is_dir() else []:
            side, program, digest = pin.name.split("-")
            found.append((pin, "ingress" if side == "ingress" else "egress", Attached(program, digest)))
        return found

    def _pin(self, ifindex: int, side: Side) -> Path | None:
        return next((pin for pin, found, _ in self._pins_of(ifindex) if found == side), None)

    def program(self, name: str) -> Program:
        """A function of ``bpf/switch.c``, loaded. Ours to close."""
        if name not in self._programs:
            self._programs[name] = self._load(name)
        return self._programs[name]

    def _load(self, name: str) -> Program:
        label, spec = f"{name}_{self.digest}", self.artifact.programs[name]
        return Program.load(label, spec, self._maps, AttachType.NONE, frags=False)

    def _put(self, device: str, ifindex: int, side: Side, name: str) -> None:
        program = self.program(name)
        if not self.tcx:
            self._classic.put(device, ifindex, side, program, Attached(name, self.digest))
            return
        pin = self._pin(ifindex, side)
        wanted = self._pins / str(ifindex) / f"{side}-{name}-{self.digest}"
        if pin:
            with Link.pinned(pin) as link:
                if link.info().ifindex == ifindex:
                    link.replace(program)
                    pin.rename(wanted)
                    return
            pin.unlink()
        doing = f"attach the tc program {name} to {device}"
        with Link.create(program, ifindex, _TCX[side], doing=doing) as link:
            link.pin(wanted)

    def _take(self, ifindex: int, side: Side) -> None:
        if not self.tcx:
            self._classic.take(ifindex, side)
        elif pin := self._pin(ifindex, side):
            with Link.pinned(pin) as link:
                if link.info().ifindex:
                    link.detach()
            pin.unlink()


class _ClassicFilters:
    """cls_bpf filters of ours under clsact, told by their names."""

    def __init__(self) -> None:
        self._opened: RouteSocket | None = None

    def open(self) -> None:
        if self._opened is None:
            self._opened = RouteSocket(open_socket())

    def close(self) -> None:
        if self._opened:
            self._opened.close()
            self._opened = None

    @property
    def _route(self) -> RouteSocket:
        if self._opened is None:
            raise ValueError("tc is not open")
        return self._opened

    def on(self, ifindex: int) -> dict[Side, Attached]:
        """Empty also for a device that has gone, or has no clsact: the kernel lists nothing then."""
        found: dict[Side, Attached] = {}
        for side in _PARENT:
            for name in self._names(ifindex, side):
                match name.split("-"):
                    case [prefix, program, digest, *_] if prefix == _PREFIX:
                        found[side] = Attached(program, digest)
        return found

    def put(self, device: str, ifindex: int, side: Side, program: Program, attached: Attached) -> None:
        """Add our filter, or put the program into the one that is there; and clsact where it is missing."""
        with explained(device, f"attach the tc program {attached.program}"):
            own_qdisc = self._add_clsact(ifindex) or self._owns_qdisc(ifindex)
            name = [_PREFIX, attached.program, attached.digest, *([_OWN_QDISC] if own_qdisc else [])]
            options: list[list[object]] = [
                ["TCA_BPF_FD", program.fd],
                ["TCA_BPF_NAME", "-".join(name)],
                ["TCA_BPF_FLAGS", _DIRECT_ACTION],
            ]
            request = _message(ifindex, _PARENT[side], handle=_HANDLE, kind="bpf", options=options)
            self._route.change(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, request)

    def take(self, ifindex: int, side: Side) -> None:
        """Take our filter off; with the last one the qdisc too, if it came with us and nobody uses it."""
        with explained(f"device {ifindex}", "take a tc program off"):
            own_qdisc = self._owns_qdisc(ifindex)
            request = _message(ifindex, _PARENT[side], handle=_HANDLE, kind="bpf")
            self._route.change(RTM_DELTFILTER, 0, request)
            if own_qdisc and not any(self._names(ifindex, each) for each in _PARENT):
                self._route.change(
                    RTM_DELQDISC, 0, _message(ifindex, _CLSACT_PARENT, handle=_CLSACT, kind="clsact")
                )

    def _owns_qdisc(self, ifindex: int) -> bool:
        names = [name for side in _PARENT for name in self._names(ifindex, side)]
        return any(name.startswith(f"{_PREFIX}-") and name.endswith(f"-{_OWN_QDISC}") for name in names)

    def _add_clsact(self, ifindex: int) -> bool:
        """Whether it was not there yet."""
        request = _message(ifindex, _CLSACT_PARENT, handle=_CLSACT, kind="clsact")
        try:
            self._route.change(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, request)
        except FileExistsError:
            return False
        return True

    def _names(self, ifindex: int, side: Side) -> list[str]:
        """Of every filter on this side, whoever made it; of other kinds than bpf the kind."""
        names = []
        for body in self._route.dump(RTM_GETTFILTER, _message(ifindex, _PARENT[side])):
            found = attributes(body, _TCMSG_SIZE)
            options = attributes(found.get(_TCA_OPTIONS, b""))
            names.append(text(options.get(_TCA_BPF_NAME, found[_TCA_KIND])))
        return names


def _message(
    ifindex: int, parent: int, *, handle: int = 0, kind: str = "", options: list[list[object]] | None = None
) -> tcmsg:
    message = tcmsg()
    message.update(index=ifindex, parent=parent, handle=handle)
    if kind:
        message["attrs"] = [["TCA_KIND", kind]]
    if kind == "bpf":
        message["info"] = _PRIORITY << 16 | _ETH_P_ALL << 8  # the protocol is in network byte order
    if options:
        message["attrs"].append(["TCA_OPTIONS", {"attrs": options}])
    return message
