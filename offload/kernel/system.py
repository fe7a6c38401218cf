"""The kernel as the controller sees it: facts to decide by, state to compare, changes to make.

Everything here belongs to one network namespace and one pin directory. None of it may run
on a thread with an asyncio loop: pyroute2 brings its own.
"""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Self, cast

from .. import channels as af_xdp
from .. import steering
from ..config import Config, channel_outer, conduit_inner, host_inner
from ..errors import KernelError, OffloadError, PrivilegeError, UnsupportedError
from ..hardware import Function, Rule
from ..model import (
    Address,
    AdminUp,
    Bridge,
    BridgePort,
    BridgeVlans,
    Carried,
    Change,
    Channel,
    Conduit,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    FunctionAddress,
    FunctionPort,
    Functions,
    HostPair,
    Ipv6Disabled,
    IrqAffinity,
    Link,
    LinkDns,
    Master,
    Member,
    MemberRow,
    NapiAffinity,
    Network,
    NetworkRow,
    NicAddress,
    NicSockets,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    PythonBridge,
    QueueCpu,
    Resource,
    Roster,
    Route,
    Spread,
    State,
    Station,
    StationRow,
    StationState,
    SteeringRule,
    Trunk,
    Uplink,
    Value,
    Xps,
)
from ..paths import Paths
from ..plan import GRO, GRO_TCP, RUNNING, TAG_IN_FRAME, Facts
from ..takeovers import confirmed
from . import host, irq, load, nics, rcu
from .bonds import read_bond
from .bpf import Map
from .channels import Channels
from .dataplane import Dataplane, grace_period
from .ethtool import Ethtool, Features, Peers
from .hostnet import HostNet
from .links import LinkEvents, Links, PortVlans
from .managers import managers
from .netdev import redirects_frags
from .pybridge import rosters, running, start, stop, write_roster
from .sockets import takes_frags, user, zero_copy
from .steering import Steering

log = logging.getLogger(__name__)

_CONDUIT_MTU = 65_535
"""Bytes: whatever the devices of a switch can carry gets through to its Python bridge."""

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
        self._filtering: bool | None = None
        self._stations: Mapping[tuple[int, str, int], StationRow] = {}
        self._far_ends: dict[str, Features | OffloadError] = {}
        self._zero_copy: dict[int, bool] = {}

    def __enter__(self) -> Self:
        if platform.machine() != "x86_64":
            raise UnsupportedError(
                f"offload runs on x86-64 only: its filter table is unproven on {platform.machine()}"
            )
        _require(host.capabilities(), "cap_bpf", "cap_net_admin", "cap_perfmon")
        _require({"btf": host.btf(), "bpffs": host.bpffs(self.paths.pin_dir)}, "btf", "bpffs")
        if self._keep:
            rcu.settle(self.paths.hurrying)  # one who died in a change
        with ExitStack() as stack:
            self.links = stack.enter_context(Links())
            self.hostnet = stack.enter_context(HostNet())
            self._ethtool = stack.enter_context(Ethtool())
            self._peers = Peers(self.links)
            self.dataplane = stack.enter_context(
                Dataplane(self.paths.objects, self.paths.cache, keep=self._keep)
            )
            self.channels = Channels(self.paths, self.links, self.alias)
            self._steering = Steering(self.links, self._ethtool, self.dataplane)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def hurry(self, changes: Collection[Change]) -> AbstractContextManager[None]:
        """Where ``changes`` wait for grace periods, these are short in the body."""
        if any(isinstance(change.resource, (Member, Filter)) for change in changes):
            return rcu.hurried(self.paths.hurrying)
        return nullcontext()

    def events(self) -> LinkEvents:
        """Devices that come, go or change, from now on."""
        return self.links.events()

    def driver(self, name: str) -> str:
        """The name of a device's driver, as ethtool shows it."""
        return self._ethtool.driver(name)

    def rx_queues(self, nic: Link) -> int:
        """RX queues of a device that are in use."""
        return self._ethtool.rx_queues(nic)

    def capabilities(self, nic: Link) -> dict[str, host.Answer]:
        """What a NIC can do. Takes some milliseconds: see ``nics.capabilities``."""
        return nics.capabilities(nic, self._ethtool)

    def numa_node(self, nic: Link) -> int | None:
        """The NUMA node of a NIC, ``None`` where it is at none or nobody says."""
        return nics.numa_node(nic, self._ethtool)

    def sorting(self, nic: Link) -> tuple[Function | Rule, ...]:
        """What a NIC sorts by itself before XDP sees it, as read back."""
        return self._steering.sorting(nic)

    def hardware_fingerprint(self) -> Hashable:
        """Changes whenever somebody changes what NICs of ours do with frames before XDP sees them."""
        taken = [self.links.at(ifindex) for ifindex in self.dataplane.uplinks()]
        return self._steering.fingerprint(link for link in taken if link)

    # Facts

    def facts(
        self,
        config: Config,
        originals: State,
        *,
        detached: bool = False,
        failed: Mapping[str, str] | None = None,
        may_take: bool = False,
    ) -> Facts:
        """Read what ``plan.desire`` decides by.

        ``may_take``: the host's addresses may be taken over even if nobody has confirmed it yet.
        """
        links = self.links.snapshot(counts=False)
        self.dataplane.forget_gone({link.ifindex for link in links.values()})
        uplinks = [switch.uplink for switch in config.switches.values() if switch.uplink in links]
        members = self.dataplane.members()
        self._stations = self.dataplane.stations()
        shared = {switch.uplink for switch in config.switches.values() if switch.host}
        new = [nic for nic in uplinks if nic and links[nic].ifindex not in members]
        devices = [port.device for port in config.ports.values() if port.device and not port.af_xdp]
        veths = [links[name] for name in (*uplinks, *devices) if name in links and links[name].kind == "veth"]
        self._far_ends = self._peers.features(veths)
        return Facts(
            links=links,
            online_cpus=host.online_cpus(),
            vlan_filtering=self._vlan_filtering(),
            redirects_frags=redirects_frags(),
            digest=self.dataplane.digest,
            switch_digest=self.dataplane.switch_digest,
            detached=detached,
            own=self._own(links, originals),
            members=members,
            networks={row.name: number for number, row in self.dataplane.networks().items()},
            stations=self._stations,
            programs=self.dataplane.program_ids(),
            held={record.name: (port_id, record) for port_id, record in self.dataplane.ports().items()},
            peers=_unreachable(self._far_ends),
            features={nic: self._tag_features(links[nic], originals) for nic in uplinks if nic},
            managers={nic: _managers(links[nic], shared=nic in shared) for nic in new},
            addresses={nic: self._addresses(links[nic], links) for nic in new},
            bonds={
                nic: bond
                for nic in uplinks
                if nic and (bond := read_bond(links[nic], links, self.links, self._ethtool))
            },
            host=self.hostnet.read(
                # What is on any other NIC decides nothing, and a host may have very many routes.
                [links[nic] for nic in uplinks if nic and (nic in shared or nic in new)],
                originals,
                confirmed(self.paths.takeovers),
                may_take,
            ),
            failed=failed or {},
            af_xdp=self._for_af_xdp(config, links),
            hardware={
                nic: self._steering.hardware(
                    links[nic], config.nics[nic].queues, originals, may_try=self._keep
                )
                for nic in uplinks
                if nic
            },
            own_rules={nic: steering.own_rules(originals, links[nic].ifindex) for nic in uplinks if nic},
        )

    def facts_again(
        self,
        facts: Facts,
        devices: Collection[str],
        *,
        unless: Collection[str],
        ids: Mapping[str, int],
        stations: Iterable[tuple[int, str, int]],
    ) -> Facts | None:
        """``facts`` with some ports read anew: their ``devices``, rows (``ids``, by name) and addresses.

        ``None`` where one of ``unless``, other devices, is not as it was, where a device that was in a switch
        has gone, or something is new that all ports depend on.
        """
        if host.online_cpus() != facts.online_cpus or not facts.own.isdisjoint(devices):
            return None
        if any(self._found(name) != facts.links.get(name) for name in unless):
            return None
        links, members = facts.links.copy(), facts.members.copy()
        for name in devices:
            known, found = links.get(name), self._found(name)
            if known and known.ifindex in members and (found is None or found.ifindex != known.ifindex):
                return None
            if found is None:
                links.pop(name, None)
                continue
            if found.alias == self.alias:
                return None
            links[name] = found
            if member := self.dataplane.member(found.ifindex):
                members[found.ifindex] = member
            else:
                members.pop(found.ifindex, None)
        veths = [links[name] for name in devices if name in links and links[name].kind == "veth"]
        far_ends = self._peers.features(veths)
        self._far_ends |= far_ends
        held = facts.held.copy()
        for name, port_id in ids.items():
            record = self.dataplane.port(port_id)
            if record and record.name == name:
                held[name] = (port_id, record)
            else:
                held.pop(name, None)
        heard = facts.stations.copy()
        for at in stations:
            if row := self.dataplane.station(*at):
                heard[at] = row
            else:
                heard.pop(at, None)
        self._stations = heard
        peers = facts.peers | _unreachable(far_ends)
        return replace(facts, links=links, members=members, peers=peers, held=held, stations=heard)

    def _found(self, name: str) -> Link | None:
        """A device as ``facts`` has it."""
        link = self.links.find(name, counts=False)
        return link if link is None or link.master is None else replace(link, master_name=_name(link.master))

    def _for_af_xdp(self, config: Config, links: Mapping[str, Link]) -> af_xdp.Host:
        ports = {name: port.af_xdp for name, port in config.ports.items() if port.af_xdp}
        if not ports:
            return af_xdp.Host()
        wanted = {
            config.switches[config.ports[name].switch].uplink
            for name, asked in ports.items()
            if asked.zero_copy == "require"
        }
        return af_xdp.Host(
            users={asked.owner.user: user(asked.owner.user) for asked in ports.values() if asked.owner},
            zero_copy={nic: self._has_zero_copy(links[nic]) for nic in wanted if nic and nic in links},
            takes_frags=takes_frags(),
            digest=self.channels.digest,
        )

    def _has_zero_copy(self, nic: Link) -> bool:
        """Asked once: where the kernel does not tell, trying resets the NIC."""
        if nic.ifindex not in self._zero_copy:
            self._zero_copy[nic.ifindex] = zero_copy(nic.name, nic.ifindex)
        return self._zero_copy[nic.ifindex]

    def _vlan_filtering(self) -> bool:
        """Whether the kernel's bridge filters VLANs; that does not change while it runs."""
        if self._filtering is None:
            self._filtering = host.bridges()[1].state == "yes"
        return self._filtering

    def _own(self, links: Mapping[str, Link], originals: State) -> frozenset[str]:
        # The kernel takes no alias with a new device: one without is ours if the journal says so.
        recorded = {
            end
            for made in originals
            if isinstance(made, (Bridge, Conduit, HostPair, Channel))
            for end in (made.name, getattr(made, "inner", made.name))
        }
        return frozenset(
            name
            for name, link in links.items()
            if link.alias == self.alias or (link.alias is None and name in recorded)
        )

    def _addresses(self, nic: Link, links: Mapping[str, Link]) -> tuple[tuple[str, str], ...]:
        """Device and address of all that the host has on a VLAN or macvlan over a NIC."""
        over = [link for link in links.values() if nic.ifindex == link.lower_ifindex]
        return tuple(
            (link.name, found) for link in over for found in self.links.global_addresses(link.ifindex)
        )

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
        state = dict(self._observe_devices(facts))
        bridges = {name for name in facts.own if facts.links[name].kind == "bridge"}
        vlans = self.links.bridge_vlans() if facts.vlan_filtering else {}
        for link in facts.links.values():
            if link.master_name in bridges:
                state |= _at_bridge(link, facts, vlans)
        for ifindex, mac, vid in self.links.static_fdb():
            if ifindex in by_index and by_index[ifindex].master_name in bridges:
                state[Fdb(by_index[ifindex].name, ifindex, mac, vid)] = True
        # As the decision was made on them: a program may have changed a state since.
        for (number, mac, vid), station in facts.stations.items():
            state[Station(number, mac, vid)] = (station.port, station.ifindex, station.state)
        for ifindex, (row, digest) in facts.members.items():
            if ifindex in by_index:  # who only looks has not tidied up
                state[Member(by_index[ifindex].name, ifindex)] = row.as_value(digest)
        self._observe_dataplane(state, by_index)
        for switch, entries in rosters(self.paths).items():
            state[Roster(switch)] = entries
            if running(self.paths, switch):
                state[PythonBridge(switch)] = True
        asked = {*wanted, *originals}
        state |= self.hostnet.observe(asked)
        state |= dict(self._steering.observe(asked, originals, facts.links))
        features = cache(self._ethtool.features)  # a device has a dozen that are asked for
        for resource in asked:
            if isinstance(resource, DeviceResource) and resource not in state:
                link_now = by_index.get(resource.ifindex)
                if link_now and link_now.name == resource.device:
                    self._observe_setting(state, resource, link_now, features)
        return state

    def observe_again(self, facts: Facts, asked: Iterable[Resource]) -> dict[Resource, Value]:
        """As ``observe``, for resources of ports alone, and for all that their devices have at a bridge."""
        plane = self.dataplane
        state: dict[Resource, Value] = {}
        devices = {}
        for resource in asked:
            value: Value = None
            match resource:
                case Station(number, mac, vid):
                    if station := facts.stations.get((number, mac, vid)):
                        value = (station.port, station.ifindex, station.state)
                case PortSlot(port_id):
                    if record := plane.port(port_id):
                        value = record.as_value()
                case Trunk(port_id):
                    if (vids := plane.trunk(port_id)) is not None:
                        value = tuple(sorted(vids))
                case Filter(_, ifindex, mac, vid):
                    value = plane.filter(ifindex, mac, vid)
                case QueueCpu(_, ifindex, cpu):
                    value = plane.queue_cpus(ifindex).get(cpu)
                case DeviceResource(device, ifindex):
                    link = facts.links.get(device)
                    if link and link.ifindex == ifindex:
                        devices[device] = link
                        if isinstance(resource, Member):
                            if ifindex in facts.members:
                                row, digest = facts.members[ifindex]
                                value = row.as_value(digest)
                        elif not isinstance(resource, (Master, BridgePort, BridgeVlans, Fdb)):
                            self._observe_setting(state, resource, link, self._ethtool.features)
                case _:
                    raise TypeError(f"{resource} is no part of a port")
            if value is not None:
                state[resource] = value
        vlans = self.links.bridge_vlans() if facts.vlan_filtering else {}
        for link in devices.values():
            master = facts.links.get(link.master_name or "")
            if master and master.kind == "bridge" and master.name in facts.own:
                state |= _at_bridge(link, facts, vlans)
                for ifindex, mac, vid in self.links.static_fdb(link.ifindex):
                    state[Fdb(link.name, ifindex, mac, vid)] = True
        return state

    def _observe_devices(self, facts: Facts) -> Iterator[tuple[Resource, Value]]:
        """The bridges and veth pairs that we made."""
        for port in self.channels.ports():
            outer = facts.links.get(channel_outer(port))
            if outer and outer.name in facts.own and (value := self.channels.read(port, outer)):
                yield Channel(outer.name, port), value
        for name in facts.own:
            link = facts.links[name]
            if link.kind == "bridge":
                yield Bridge(name), "vlan" if link.vlan_filtering else "plain"
            other = next(
                (
                    end
                    for end in facts.links.values()
                    if end.peer_ifindex == link.ifindex and end.peer_netnsid is None and link.kind == "veth"
                ),
                None,
            )
            if other is None:
                continue
            if other.name == conduit_inner(name):
                yield Conduit(name, other.name), True
            elif other.name == host_inner(name):
                yield HostPair(name, other.name), (link.mac, link.mtu)

    def _observe_dataplane(self, state: dict[Resource, Value], by_index: Mapping[int, Link]) -> None:
        plane = self.dataplane
        for number, network in plane.networks().items():
            conduit = by_index.get(network.conduit)
            state[Network(number)] = (
                network.name,
                network.uplink,
                conduit.name if conduit else None,
                network.untagged,
                network.ask_bridge,
            )
        for port_id, vids in plane.trunks().items():
            state[Trunk(port_id)] = tuple(sorted(vids))
        for ifindex, program in plane.uplinks().items():
            link = by_index[ifindex]
            state[Uplink(link.name, ifindex)] = (link.xdp_mode or "none", program)
            for cpu, size in plane.queue_cpus(ifindex).items():
                state[QueueCpu(link.name, ifindex, cpu)] = size
            for mac, vid, port_id in plane.filters(ifindex):
                state[Filter(link.name, ifindex, mac, vid)] = port_id
        for port_id, record in plane.ports().items():
            state[PortSlot(port_id)] = record.as_value()
            owner = self.channels.owner(record.name, "nic_sockets")
            if owner is not None and plane.nic_sockets(port_id):
                state[NicSockets(record.name)] = (port_id, owner)

    def _observe_setting(
        self,
        state: dict[Resource, Value],
        resource: DeviceResource,
        link: Link,
        features: Callable[[str], Mapping[str, tuple[bool, bool]]],
    ) -> None:
        match resource:
            case AdminUp():
                state[resource] = link.up
            case NicAddress(mac=mac):
                if mac in self.links.own_addresses(link.ifindex):
                    state[resource] = True
            case Promiscuous():
                state[resource] = link.promiscuous
            case Ipv6Disabled():
                # Where there is no IPv6 there is nothing to switch off.
                state[resource] = self.links.ipv6_disabled(link.name) is not False
            case Feature(feature=feature):
                state[resource] = features(link.name)[feature][0]
            case PeerFeature(feature=feature):
                found = self._far_ends.get(link.name) or self._peers.features([link])[link.name]
                if not isinstance(found, OffloadError):
                    state[resource] = found[feature][0]
                elif not isinstance(found, KernelError):
                    raise found
                # Else its namespace has gone or cannot be found: nothing can be given back there.
            case IrqAffinity() | NapiAffinity() | Xps():
                value = irq.observe(resource)
                if value is not None:
                    state[resource] = value

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
            case Bridge() | Conduit() | HostPair() | Channel():
                self._execute_device(change)
            case DeviceResource(device=device, ifindex=0):
                # It has been made by an earlier change of the same plan.
                self._execute(replace(change, resource=replace(change.resource, ifindex=_ifindex(device))))
            case Master(_, ifindex):
                self.links.set_master(ifindex, _ifindex(str(change.after)) if change.after else 0)
            case BridgePort(_, ifindex):
                flags = change.after if isinstance(change.after, tuple) else (True, True, 0)
                learning, flood, group_forward = flags
                self.links.set_bridge_port(ifindex, bool(learning), bool(flood), _int(group_forward))
            case BridgeVlans(_, ifindex):
                self.links.set_bridge_vlans(ifindex, _vlans(change.before), _vlans(change.after))
            case Fdb(_, ifindex, mac, vid):
                (self.links.add_fdb if change.after else self.links.del_fdb)(ifindex, mac, vid)
            case NicAddress(_, ifindex, mac):
                self.links.set_own_address(ifindex, mac, bool(change.after))
            case AdminUp(_, ifindex):
                self.links.set_up(ifindex, bool(change.after))
            case Promiscuous(_, ifindex):
                self.links.set_promiscuous(ifindex, bool(change.after))
            case Ipv6Disabled(device, _):
                self.links.set_ipv6_disabled(device, bool(change.after))
            case Feature(device, _, feature):
                self._ethtool.set_feature(device, feature, bool(change.after))
            case IrqAffinity() | NapiAffinity() | Xps():
                irq.execute(change)
            case PeerFeature(device, _, feature):
                link = self.links.find(device)
                if link is None:
                    raise KernelError(f"there is no device {device} any more")
                self._peers.find(link).set_feature(feature, bool(change.after))
            case Address() | Carried() | LinkDns() | Route():
                self.hostnet.execute(change)
            case Functions() | FunctionPort() | FunctionAddress() | SteeringRule() | Spread():
                self._steering.execute(change)
            case Roster(switch):
                write_roster(self.paths, switch, change.after if isinstance(change.after, tuple) else None)
            case PythonBridge(switch):
                (start if change.after else stop)(self.paths, switch)
            case _:
                self._execute_dataplane(change)

    def _execute_device(self, change: Change) -> None:
        """Make or delete a device of ours. What the host must not hear or say is silent from the start."""
        match change.resource, change.after:
            case Channel(name, port), None:
                self.channels.remove(name, port)
            case Channel(name, port), (str(mac), int(mtu), int(uid), str()):
                put = self.channels.make if change.before is None else self.channels.change
                put(name, port, mac, mtu, uid)
            case ((Bridge(name) | Conduit(name) | HostPair(name)), None):
                self.links.delete_link(_ifindex(name))
            case Bridge(name), kind:
                if change.before is not None:
                    raise KernelError(
                        f"{name}: VLAN filtering cannot be changed: `offload detach --all` first"
                    )
                self._make_bridge(name, kind == "vlan")
            case Conduit(name, inner), _:
                self._make_conduit(name, inner)
            case HostPair(name, inner), (str(mac), int(mtu)):
                if change.before is None:
                    self._make_host_pair(name, inner, None if mac == "auto" else mac, mtu)
                    return
                self.links.set_mac(_ifindex(name), mac)
                for end in (inner, name):
                    self.links.set_mtu(_ifindex(end), mtu)

    def _make_host_pair(self, name: str, inner: str, mac: str | None, mtu: int) -> None:
        self.links.create_veth(name, inner, self.alias, mac, mtu)
        with _removed_on_failure(self.links, _ifindex(name)):
            self.links.set_ipv6_disabled(inner, True)

    def _make_bridge(self, name: str, vlan_filtering: bool) -> None:
        ifindex = self.links.create_bridge(name, self.alias, vlan_filtering)
        with _removed_on_failure(self.links, ifindex):
            self.links.set_ipv6_disabled(name, True)
            self.dataplane.set_member(name, ifindex, MemberRow(0, 0, "silent"))
            self.links.set_up(ifindex, True)

    def _make_conduit(self, name: str, inner: str) -> None:
        self.links.create_veth(name, inner, self.alias, mtu=_CONDUIT_MTU)
        ifindex, inner_ifindex = self.links.ifindex(name), self.links.ifindex(inner)
        with _removed_on_failure(self.links, ifindex):
            for device in (name, inner):
                self.links.set_ipv6_disabled(device, True)
            self.dataplane.set_member(name, ifindex, MemberRow(0, 0, "conduit"))
            self.dataplane.set_member(inner, inner_ifindex, MemberRow(0, 0, "silent"))
            for end in (ifindex, inner_ifindex):
                self.links.set_up(end, True)

    def _set_nic_sockets(self, port: str, change: Change) -> None:
        pin = self.channels.pins(port) / "nic_sockets"
        before, after = change.before, change.after
        if isinstance(before, tuple):
            self.dataplane.set_nic_sockets(_int(before[0]), None)
        if not isinstance(after, tuple):
            for each in (pin, pin.with_name("nic_sockets_probe")):
                each.unlink(missing_ok=True)
            return
        port_id, uid = _numbers(after)
        if not pin.exists():
            with self.dataplane.new_nic_sockets() as made:
                made.pin(pin)
        with Map.pinned(pin) as sockets:
            self.dataplane.set_nic_sockets(port_id, sockets)
        self.channels.watch(port, "nic_sockets")
        self.channels.set_owner(port, uid, "nic_sockets")

    def _execute_dataplane(self, change: Change) -> None:
        plane, after = self.dataplane, change.after
        match change.resource:
            case Member(device, ifindex):
                if isinstance(after, tuple):
                    plane.set_member(device, ifindex, MemberRow.of(after))
                else:
                    plane.clear_member(ifindex)
            case Network(number):
                plane.set_network(number, _network(after) if isinstance(after, tuple) else None)
            case Trunk(port_id):
                plane.set_trunk(port_id, frozenset(_numbers(after)) if after else None)
            case Station(number, mac, vid):
                moves = row.moves if (row := self._stations.get((number, mac, vid))) else 0
                plane.set_station(
                    number, mac, vid, _station(after, moves) if isinstance(after, tuple) else None
                )
            case Uplink(device, ifindex):
                if isinstance(after, tuple):
                    if change.before is not None and change.before != after:
                        _refuse_mode_change(device, change)
                    plane.attach(device, ifindex, "generic" if after[0] == "generic" else "native")
                else:
                    plane.detach(ifindex)
            case QueueCpu(_, ifindex, cpu):
                plane.set_queue_cpu(ifindex, cpu, None if after is None else _int(after))
            case NicSockets(port):
                self._set_nic_sockets(port, change)
            case PortSlot(port_id):
                if self._filters_left and (after is None or change.before is None):
                    grace_period()  # a program may still hold a port id that its filter no longer gives
                    self._filters_left = False
                record = PortRecord.of(after) if isinstance(after, tuple) else None
                if record and (before := _rerouted(change)):
                    source = before.cpu
                    threads = [] if source is None else load.threads(plane.queue_map_ids(), source)
                    if not plane.move_port(port_id, record, lambda: load.all_asleep(threads)):
                        log.info("%s: frames that are under way may be overtaken", record.name)
                else:
                    plane.set_port(port_id, record)
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


def _at_bridge(link: Link, facts: Facts, vlans: Mapping[int, PortVlans]) -> dict[Resource, Value]:
    """What a device is at its bridge. ``vlans`` are those of all ports, by ifindex."""
    assert link.master_name, "only a device at a bridge is asked for"
    at = (link.name, link.ifindex)
    state: dict[Resource, Value] = {
        Master(*at): link.master_name,
        BridgePort(*at): (bool(link.learning), bool(link.unicast_flood), link.group_forward or 0),
    }
    if facts.links[link.master_name].vlan_filtering:
        state[BridgeVlans(*at)] = vlans.get(link.ifindex, (0, ()))
    return state


def _require(answers: Mapping[str, host.Answer], *names: str) -> None:
    """Raise for the first of ``names`` that this host answers with no."""
    for name in names:
        answer = answers[name]
        if answer.state == "no":
            kind = PrivilegeError if name.startswith("cap_") else UnsupportedError
            raise kind(f"{answer.why}: {answer.remedy}" if answer.remedy else answer.why)


def _unreachable(far_ends: Mapping[str, Features | OffloadError]) -> dict[str, str | None]:
    """``Facts.peers``."""
    return {name: str(found) if isinstance(found, OffloadError) else None for name, found in far_ends.items()}


def _managers(link: Link, *, shared: bool) -> tuple[str, ...]:
    """Who manages a NIC and would not stand for its being taken.

    ifupdown acts on a NIC only when somebody tells it to. Where the host's addresses move with
    the NIC, its remedy, `ifdown`, would cut the host off.
    """
    return tuple(
        f"{link.name} is managed by {manager.name} ({manager.evidence}): {manager.remedy}"
        for manager in managers(link.name, link.ifindex)
        if not (shared and manager.name == "ifupdown")
    )


@contextmanager
def _removed_on_failure(links: Links, ifindex: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        links.delete_link(ifindex)
        raise


def _network(value: tuple[object, ...]) -> NetworkRow:
    name, uplink, conduit, untagged, ask_bridge = value
    return NetworkRow(
        name=str(name),
        uplink=None if uplink is None else _int(uplink),
        conduit=_ifindex(str(conduit)) if conduit else 0,
        untagged=_int(untagged),
        ask_bridge=bool(ask_bridge),
    )


def _station(value: tuple[object, ...], moves: int) -> StationRow:
    """A row of the controller's making: any that a program wrote is newer."""
    port, ifindex, state = value
    return StationRow(_int(port), _int(ifindex), cast(StationState, state), moves, since=0)


def _numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is no tuple of numbers")
    return tuple(_int(item) for item in value)


def _vlans(value: Value) -> PortVlans:
    untagged, tagged = value if isinstance(value, tuple) else (0, ())
    return _int(untagged), _numbers(tagged)


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


def _name(ifindex: int) -> str | None:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return None  # it went while we looked


def _ifindex(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise KernelError(f"there is no device {name} any more") from error


def _runs(value: Value) -> bool:
    return isinstance(value, tuple) and bool(PortRecord.of(value).flags & RUNNING)


def _rerouted(change: Change) -> PortRecord | None:
    """The row of a port before, where all that changes is its queue's CPU, or which frames GRO merges."""
    if not isinstance(change.before, tuple) or not isinstance(change.after, tuple):
        return None
    before, after = PortRecord.of(change.before), PortRecord.of(change.after)
    flags = before.flags & ~(GRO | GRO_TCP) | after.flags & (GRO | GRO_TCP)
    return before if replace(before, cpu=after.cpu, flags=flags) == after else None


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value
