"""What makes NICs sort frames themselves: rules, virtual functions and the RSS table, read and set.

``System`` gives its part of every reconciliation that is about ``offload/steering.py`` to this module.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace

from ..config import QueuesConfig
from ..errors import KernelError, UnsupportedError
from ..hardware import Function, Hardware, Rule
from ..model import (
    Change,
    DeviceResource,
    FunctionAddress,
    FunctionPort,
    Functions,
    Link,
    Resource,
    Spread,
    State,
    SteeringRule,
    Value,
)
from ..steering import STEERING_FEATURE
from . import nics, ntuple, rss, sriov
from .dataplane import Dataplane
from .ethtool import Ethtool
from .host import Answer
from .links import Links


class Steering:
    """Reads and sets what NICs of this namespace do with frames before XDP sees them."""

    def __init__(self, links: Links, ethtool: Ethtool, plane: Dataplane) -> None:
        self._links = links
        self._ethtool = ethtool
        self._plane = plane
        self._tried: dict[int, Answer] = {}

    def hardware(self, nic: Link, settings: QueuesConfig, originals: State, *, may_try: bool) -> Hardware:
        """What a NIC offers, and what of it is in use.

        ``may_try``: whether it takes rules may be tried with one that no frame fits. That is done once.
        """
        found = nics.hardware(
            nic,
            self._ethtool,
            self._links,
            settings,
            functions_are_ours=Functions(nic.name, nic.ifindex) in originals,
            takes_rules=self._takes_rules(nic) if may_try else None,
        )
        return replace(found, functions=tuple(map(self._used, found.functions)))

    def sorting(self, nic: Link) -> tuple[Function | Rule, ...]:
        """What a NIC sorts by itself, read back: into virtual functions, and by rules, exact ones first."""
        functions = [self._used(one) for one in sriov.functions(self._links, nic) if one.mac]
        rules = ntuple.rules(self._ethtool, nic.name)
        return (*functions, *sorted(rules, key=lambda rule: rule.vid is None))

    def _used(self, function: Function) -> Function:
        """A virtual function with what our program there and its device say."""
        device = self._links.find(function.device) if function.device else None
        row = self._plane.functions().get(function.ifindex or 0)
        return replace(
            function,
            running=bool(device and device.up and device.running),
            serves=row.port if row else None,
        )

    def _takes_rules(self, nic: Link) -> Answer:
        if nic.ifindex not in self._tried:
            self._tried[nic.ifindex] = self._try_rules(nic.name)
        return self._tried[nic.ifindex]

    def _try_rules(self, nic: str) -> Answer:
        known = ntuple.could_tell_without_trying(self._ethtool, nic)
        if known.state == "no":
            return known
        active, _ = self._ethtool.features(nic)[STEERING_FEATURE]
        if active:
            return ntuple.probe(self._ethtool, nic)
        self._ethtool.set_feature(nic, STEERING_FEATURE, True)
        try:
            return ntuple.probe(self._ethtool, nic)
        finally:
            self._ethtool.set_feature(nic, STEERING_FEATURE, False)

    def observe(
        self, asked: Iterable[Resource], originals: State, links: Mapping[str, Link]
    ) -> Iterator[tuple[Resource, Value]]:
        """What stands of ours, and the settings in ``asked``."""
        by_index = {link.ifindex: link for link in links.values()}
        for ifindex, row in self._plane.functions().items():
            if ifindex in by_index and row.nic in by_index:
                link = by_index[ifindex]
                mode = link.xdp_mode or "none"
                value = (by_index[row.nic].name, row.port, row.vid, mode, row.digest)
                yield FunctionPort(link.name, ifindex), value
        for resource in originals:
            nic = _standing(resource, by_index) if isinstance(resource, Functions) else None
            if nic:
                for one in sriov.functions(self._links, nic):
                    if one.mac:
                        yield FunctionAddress(nic.name, nic.ifindex, one.index), (one.mac, one.vid)
        for resource in asked:
            nic = _standing(resource, by_index)
            match resource:
                case Functions() if nic:
                    yield resource, sriov.made(nic.name)
                case Spread() if nic:
                    yield resource, rss.spread(self._ethtool, nic.name)
                case SteeringRule(_, _, mac, vid) if nic:
                    if rule := self._rule(nic.name, mac, vid):
                        yield resource, rule.rx_queue

    def _rule(self, nic: str, mac: str, vid: int) -> Rule | None:
        found = ntuple.rules(self._ethtool, nic)
        return next((rule for rule in found if rule.mac == mac and (rule.vid or 0) == vid), None)

    def execute(self, change: Change) -> None:
        """Make one change to a NIC."""
        after = change.after
        match change.resource:
            case Functions(device, _):
                self._set_functions(device, change)
            case FunctionPort(device, ifindex):
                self._set_function_port(device, ifindex, after)
            case FunctionAddress(device, _, index):
                mac, vid = after if isinstance(after, tuple) else (None, 0)
                sriov.set_address(self._nic(device), index, str(mac) if mac else None, _number(vid))
            case SteeringRule(device, _, mac, vid):
                if rule := self._rule(device, mac, vid):
                    ntuple.delete(self._ethtool, device, rule.location)
                if isinstance(after, int):
                    ntuple.insert(self._ethtool, device, mac, vid or None, after)
            case Spread(device, _):
                table = after if isinstance(after, tuple) else ()
                rss.set_spread(self._ethtool, device, tuple(map(_number, table)))

    def _set_functions(self, device: str, change: Change) -> None:
        if not change.after:
            sriov.unmake(device)
            return
        if change.before:
            raise UnsupportedError(
                f"{device}: the number of virtual functions cannot go from {change.before} to {change.after} "
                "while there are any: `offload detach` first"
            )
        sriov.make(self._nic(device), _number(change.after))

    def _nic(self, device: str) -> Link:
        nic = self._links.find(device)
        if nic is None:
            raise KernelError(f"there is no device {device} any more")
        return nic

    def _set_function_port(self, device: str, ifindex: int, after: Value) -> None:
        if not isinstance(after, tuple):
            self._plane.detach_function(ifindex)
            return
        nic, port, vid, mode, _ = after
        self._plane.attach_function(
            device, ifindex, self._links.ifindex(str(nic)), "generic" if mode == "generic" else "native"
        )
        self._plane.set_function(ifindex, port if isinstance(port, int) else None, _number(vid))

    def fingerprint(self, nics_now: Iterable[Link]) -> Hashable:
        """What somebody else may change of these NICs without the kernel telling."""
        return tuple(nics.fingerprint(nic, self._ethtool, self._links) for nic in nics_now)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _standing(resource: Resource, by_index: Mapping[int, Link]) -> Link | None:
    """The device of a setting, while it has the name that it had."""
    if not isinstance(resource, DeviceResource):
        return None
    link = by_index.get(resource.ifindex)
    return link if link and link.name == resource.device else None
