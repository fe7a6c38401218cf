"""The kernel as the controller sees it: facts to decide by, state to compare, changes to make.

Everything here belongs to one network namespace and one pin directory. None of it may run
on a thread with an asyncio loop: pyroute2 brings its own.
"""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from ..config import Config
from ..errors import KernelError, OffloadError, PrivilegeError, UnsupportedError
from ..model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    Guard,
    Ipv6Disabled,
    Link,
    Master,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    QueueCpu,
    Resource,
    State,
    Uplink,
    Value,
)
from ..paths import Paths
from ..plan import RUNNING, TAG_IN_FRAME, Facts
from . import host
from .dataplane import Dataplane, grace_period
from .ethtool import Ethtool, Peers
from .links import LinkEvents, Links
from .managers import managers
from .netdev import redirects_frags

log = logging.getLogger(__name__)

_DRAIN = 0.02
"""Seconds in which a queue's CPU is done with a full ring, unless it is kept from running."""


class System:
    """Reads and changes the kernel. A context manager; what it changed outlives it.

    Raises ``PrivilegeError`` or ``UnsupportedError`` on entry when this host cannot do the job at all.
    ``keep`` false is for looking only: nothing is pinned.
    """

    def __init__(self, paths: Paths, *, keep: bool = True) -> None:
        self.paths = paths
        self._keep = keep
        self.alias = f"offload:{paths.pin_dir}"
        self._stack = ExitStack()
        self._filters_left = False
        self._stopped = False

    def __enter__(self) -> Self:
        if platform.machine() != "x86_64":
            raise UnsupportedError(
                f"offload runs on x86-64 only: its filter table is unproven on {platform.machine()}"
            )
        _require(host.capabilities(), "cap_bpf", "cap_net_admin", "cap_perfmon")
        _require({"btf": host.btf(), "bpffs": host.bpffs(self.paths.pin_dir)}, "btf", "bpffs")
        with ExitStack() as stack:
            self.links = stack.enter_context(Links())
            self._ethtool = stack.enter_context(Ethtool())
            self._peers = Peers(self.links)
            self.dataplane = stack.enter_context(
                Dataplane(self.paths.objects, self.paths.cache, keep=self._keep)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def events(self) -> LinkEvents:
        """Devices that come, go or change, from now on."""
        return self.links.events()

    def driver(self, name: str) -> str:
        """The name of a device's driver, as ethtool shows it."""
        return self._ethtool.driver(name)

    # Facts

    def facts(
        self,
        config: Config,
        originals: State,
        *,
        detached: bool = False,
        failed: Mapping[str, str] | None = None,
    ) -> Facts:
        """Read what ``plan.desire`` decides by."""
        links = self.links.snapshot()
        self.dataplane.forget_gone({link.ifindex for link in links.values()})
        uplinks = [switch.uplink for switch in config.switches.values() if switch.uplink in links]
        bridges = self._own_bridges(links, originals)
        new = [nic for nic in uplinks if nic and links[nic].master_name not in bridges]
        devices = [port.device for port in config.ports.values() if port.device]
        tagged = any(port.vlan.vids != (0,) for port in config.ports.values())
        return Facts(
            links=links,
            online_cpus=host.online_cpus(),
            vlan_filtering=tagged and host.bridges()[1].state == "yes",
            redirects_frags=redirects_frags(),
            digest=self.dataplane.digest,
            guard_digest=self.dataplane.guard_digest,
            detached=detached,
            bridges=bridges,
            programs=self.dataplane.program_ids(),
            held={record.name: (port_id, record) for port_id, record in self.dataplane.ports().items()},
            peers={
                name: self._peer_trouble(links[name])
                for name in (*uplinks, *devices)
                if name in links and links[name].kind == "veth"
            },
            features={nic: self._tag_features(links[nic], originals) for nic in uplinks if nic},
            managers={nic: _managers(links[nic]) for nic in new},
            addresses={nic: self._addresses(links[nic], links) for nic in new},
            failed=failed or {},
        )

    def _own_bridges(self, links: Mapping[str, Link], originals: State) -> frozenset[str]:
        # The kernel takes no alias with a new bridge: one without is ours if the journal says so.
        return frozenset(
            name
            for name, link in links.items()
            if link.kind == "bridge"
            and (link.alias == self.alias or (link.alias is None and Bridge(name) in originals))
        )

    def _addresses(self, nic: Link, links: Mapping[str, Link]) -> tuple[tuple[str, str], ...]:
        """Device and address of all that the host has on a NIC, or on a VLAN or macvlan over it."""
        over = [link for link in links.values() if nic.ifindex in (link.ifindex, link.lower_ifindex)]
        return tuple(
            (link.name, found) for link in over for found in self.links.global_addresses(link.ifindex)
        )

    def _peer_trouble(self, link: Link) -> str | None:
        """Why the other end of a veth cannot be set, or ``None``."""
        try:
            self._peers.find(link).features()
        except OffloadError as error:
            return str(error)
        return None

    def _tag_features(self, link: Link, originals: State) -> dict[str, bool]:
        """Features that hide tags from XDP, and whether they can be switched off."""
        if link.kind == "veth":
            return {}  # there it is the other end that hides them
        features = self._ethtool.features(link.name)
        return {
            name: not features[name][1]
            for name in TAG_IN_FRAME
            if name in features and (features[name][0] or Feature(link.name, link.ifindex, name) in originals)
        }

    # State

    def observe(self, facts: Facts, wanted: Iterable[Resource], originals: State) -> dict[Resource, Value]:
        """The state of everything of ours, and of every setting in ``wanted`` or ``originals``.

        Devices are as ``facts`` has them; settings of devices that have gone are left out.
        """
        by_index = {link.ifindex: link for link in facts.links.values()}
        state: dict[Resource, Value] = {Bridge(name): True for name in facts.bridges}
        for link in facts.links.values():
            if link.master_name in facts.bridges:
                state[Master(link.name, link.ifindex)] = link.master_name
                state[BridgePort(link.name, link.ifindex)] = (bool(link.learning), bool(link.unicast_flood))
        for ifindex, mac in self.links.static_fdb():
            if ifindex in by_index and by_index[ifindex].master_name in facts.bridges:
                state[Fdb(by_index[ifindex].name, ifindex, mac)] = True
        self._observe_dataplane(state, by_index)
        for resource in {*wanted, *originals}:
            if isinstance(resource, DeviceResource) and resource not in state:
                link_now = by_index.get(resource.ifindex)
                if link_now and link_now.name == resource.device:
                    self._observe_setting(state, resource, link_now)
        return state

    def _observe_dataplane(self, state: dict[Resource, Value], by_index: Mapping[int, Link]) -> None:
        plane = self.dataplane
        for ifindex, guard in plane.guards().items():
            state[Guard(by_index[ifindex].name, ifindex)] = guard
        for ifindex, digest in plane.uplinks().items():
            link = by_index[ifindex]
            state[Uplink(link.name, ifindex)] = (link.xdp_mode or "none", digest)
            for cpu, size in plane.queue_cpus(ifindex).items():
                state[QueueCpu(link.name, ifindex, cpu)] = size
            for mac, vid, port_id in plane.filters(ifindex):
                state[Filter(link.name, ifindex, mac, vid)] = port_id
        for port_id, record in plane.ports().items():
            state[PortSlot(port_id)] = record.as_value()

    def _observe_setting(self, state: dict[Resource, Value], resource: DeviceResource, link: Link) -> None:
        match resource:
            case AdminUp():
                state[resource] = link.up
            case Promiscuous():
                state[resource] = link.promiscuous
            case Ipv6Disabled():
                # Where there is no IPv6 there is nothing to switch off.
                state[resource] = self.links.ipv6_disabled(link.name) is not False
            case Feature(feature=feature):
                state[resource] = self._ethtool.features(link.name)[feature][0]
            case PeerFeature(feature=feature):
                try:
                    state[resource] = self._peers.find(link).features()[feature][0]
                except KernelError:
                    return  # its namespace has gone or cannot be found: nothing can be given back there

    # Changes

    def execute(self, change: Change) -> None:
        """Make one change. A device that has gone meanwhile needs none: the next look will tell."""
        try:
            self._execute(change)
        except OffloadError:
            if not isinstance(change.resource, DeviceResource) or _is_there(change.resource):
                raise
            log.info("%s has gone meanwhile", change.resource.device)

    def _execute(self, change: Change) -> None:
        match change.resource:
            case Bridge(name):
                if change.after:
                    self._make_bridge(name)
                else:
                    self.links.delete_link(_ifindex(name))
            case Master(_, ifindex):
                self.links.set_master(ifindex, _ifindex(str(change.after)) if change.after else 0)
            case BridgePort(_, ifindex):
                learning, flood = change.after if isinstance(change.after, tuple) else (True, True)
                self.links.set_bridge_port(ifindex, bool(learning), bool(flood))
            case Fdb(_, ifindex, mac):
                (self.links.add_fdb if change.after else self.links.del_fdb)(ifindex, mac)
            case AdminUp(_, ifindex):
                self.links.set_up(ifindex, bool(change.after))
            case Promiscuous(_, ifindex):
                self.links.set_promiscuous(ifindex, bool(change.after))
            case Ipv6Disabled(device, _):
                self.links.set_ipv6_disabled(device, bool(change.after))
            case Feature(device, _, feature):
                self._ethtool.set_feature(device, feature, bool(change.after))
            case PeerFeature(device, _, feature):
                link = self.links.snapshot().get(device)
                if link is None:
                    raise KernelError(f"there is no device {device} any more")
                self._peers.find(link).set_feature(feature, bool(change.after))
            case _:
                self._execute_dataplane(change)

    def _make_bridge(self, name: str) -> None:
        ifindex = self.links.create_bridge(name, self.alias)
        try:
            self.links.set_ipv6_disabled(name, True)
            self.links.set_up(ifindex, True)
        except BaseException:
            self.links.delete_link(ifindex)
            raise

    def _execute_dataplane(self, change: Change) -> None:
        plane, after = self.dataplane, change.after
        match change.resource:
            case Guard(device, ifindex):
                if isinstance(after, tuple):
                    port_id, pvid, _ = after
                    plane.set_guard(device, ifindex, _int(port_id), _int(pvid))
                else:
                    plane.clear_guard(ifindex)
            case Uplink(device, ifindex):
                if isinstance(after, tuple):
                    if change.before is not None and change.before != after:
                        _refuse_mode_change(device, change)
                    plane.attach(device, ifindex, "generic" if after[0] == "generic" else "native")
                else:
                    plane.detach(ifindex)
            case QueueCpu(_, ifindex, cpu):
                plane.set_queue_cpu(ifindex, cpu, None if after is None else _int(after))
            case PortSlot(port_id):
                if self._filters_left and (after is None or change.before is None):
                    grace_period()  # a program may still hold a port id that its filter no longer gives
                    self._filters_left = False
                plane.set_port(port_id, PortRecord.of(after) if isinstance(after, tuple) else None)
                self._stopped |= _runs(change.before) and not _runs(after)
            case Filter(_, ifindex, mac, vid):
                if self._stopped:
                    # Frames that wait for a queue's CPU shall still find whose they are, to be counted.
                    time.sleep(_DRAIN)
                    self._stopped = False
                plane.set_filter(ifindex, mac, vid, None if after is None else _int(after))
                self._filters_left |= change.before is not None
            case _:
                raise TypeError(f"nothing knows how to change {change.resource}")


def _require(answers: Mapping[str, host.Answer], *names: str) -> None:
    """Raise for the first of ``names`` that this host answers with no."""
    for name in names:
        answer = answers[name]
        if answer.state == "no":
            kind = PrivilegeError if name.startswith("cap_") else UnsupportedError
            raise kind(f"{answer.why}: {answer.remedy}" if answer.remedy else answer.why)


def _managers(link: Link) -> tuple[str, ...]:
    return tuple(
        f"{link.name} is managed by {manager.name} ({manager.evidence}): {manager.remedy}"
        for manager in managers(link.name, link.ifindex)
    )


def _refuse_mode_change(device: str, change: Change) -> None:
    before, after = change.before, change.after
    if isinstance(before, tuple) and isinstance(after, tuple) and before[0] != after[0]:
        raise UnsupportedError(
            f"{device}: XDP cannot go from {before[0]} to {after[0]} mode while it is attached: "
            "`offload detach` first"
        )


def _is_there(resource: DeviceResource) -> bool:
    try:
        return socket.if_indextoname(resource.ifindex) == resource.device
    except OSError:
        return False


def _ifindex(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise KernelError(f"there is no device {name} any more") from error


def _runs(value: Value) -> bool:
    return isinstance(value, tuple) and bool(PortRecord.of(value).flags & RUNNING)


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value
