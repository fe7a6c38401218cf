"""Making the kernel what the config says: read, decide, compare, journal, change, read back.

``Reconciler.apply`` is that sentence as code. What fails is undone in reverse, and the
undoing never hides what failed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .config import Config, differing
from .describe import describe
from .errors import OffloadError, VerifyError
from .journal import Journal
from .model import (
    Bridge,
    Change,
    Channel,
    Conduit,
    DeviceResource,
    HostPair,
    Resource,
    State,
    Station,
    Value,
)
from .plan import (
    SETTINGS,
    Desired,
    Facts,
    desire,
    desire_again,
    difference,
    port_ids_again,
    without_fast_path,
)

log = logging.getLogger(__name__)

_FEW = 32
"""Ports that are looked at one by one; with more of them it takes less time to look at everything."""

_ROUNDS = 6
"""How often to look again: taking a device can bring news of it, such as virtual functions."""


class Kernel(Protocol):
    """What a reconciler needs of ``kernel.system.System``."""

    def facts(
        self,
        config: Config,
        originals: State,
        *,
        detached: bool = ...,
        failed: Mapping[str, str] | None = ...,
        may_take: bool = ...,
    ) -> Facts: ...

    def observe(self, facts: Facts, wanted: State, originals: State) -> dict[Resource, Value]: ...

    def facts_again(
        self,
        facts: Facts,
        devices: Collection[str],
        *,
        unless: Collection[str],
        ids: Mapping[str, int],
        stations: Iterable[tuple[int, str, int]],
    ) -> Facts | None: ...

    def observe_again(self, facts: Facts, asked: Iterable[Resource]) -> dict[Resource, Value]: ...

    def execute(self, change: Change) -> None: ...

    def hurry(self, changes: Collection[Change]) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class _Known:
    """How the kernel was when nothing was left to do for ``config``, and was decided to be."""

    config: Config
    facts: Facts
    desired: Desired


@dataclass(frozen=True)
class Result:
    """What was decided, and what was changed for it in order. ``failed``: ports left out, and why.

    ``ports`` were looked at, ``None``: everything was.
    """

    facts: Facts
    desired: Desired
    changes: tuple[Change, ...]
    failed: Mapping[str, str]
    ports: Collection[str] | None = None


class _StepError(Exception):
    """A change that failed, after what came before it was undone."""

    def __init__(self, change: Change, cause: OffloadError) -> None:
        self.change = change
        self.cause = cause
        super().__init__(str(cause))


class Reconciler:
    """Brings the kernel and a config together."""

    def __init__(self, kernel: Kernel, journal: Journal) -> None:
        self._kernel = kernel
        self._journal = journal
        self._ages: dict[str, int] = {}
        self._known: _Known | None = None

    def plan(self, config: Config, *, detached: bool = False, may_take: bool = True) -> Result:
        """What ``apply`` would do, changing nothing. Raises what ``apply`` would refuse."""
        facts, desired, changes = self._compare(config, detached, {}, {}, may_take=may_take)
        _raise_first(desired.refusals)
        return Result(facts, desired, changes, {})

    def apply(
        self,
        config: Config,
        *,
        strict: bool,
        detached: bool = False,
        failed: Mapping[str, str] | None = None,
        moved: Mapping[str, int] | None = None,
        merging: Mapping[str, bool] | None = None,
        news: Collection[str] | None = None,
        may_take: bool = True,
    ) -> Result:
        """Make the kernel what ``config`` says, and read back that it is.

        ``news``: devices that may have changed since the last time, ``None`` for anything. What is not
        among them is believed to be as it was left; only what a change is about is read then.

        ``strict``: all of it or none of it, for a config that somebody has just handed over.
        Otherwise (a device has come or gone) do what can be done: a port whose device makes
        trouble is left out. ``moved``: CPUs that queues go to, by port; ``merging``: whether TCP shall be
        merged, by port. ``may_take``: with ``strict``, addresses may be taken from NICs.
        """
        known, self._known = self._known, None
        choices: dict[str, Any] = {"moved": moved or {}, "merging": merging or {}}
        if news is None or failed or detached:
            known = None
        self._grow_older(config)
        left_out = dict(failed or {})
        whole = False
        may_take = may_take and strict
        made: list[Change] = []
        rounds = 0
        while rounds < _ROUNDS:
            again = (
                self._compare_again(known, config, news or (), choices) if known and not left_out else None
            )
            if again:
                facts, desired, changes, ports = again
            else:
                known, whole, ports = None, True, ()
                facts, desired, changes = self._compare(
                    config, detached, left_out, choices, may_take=may_take
                )
                self._forget_gone(facts)
            if strict and desired.refusals:
                self._undo(made)
                _raise_first(desired.refusals)
            if not changes:
                if not (detached or left_out):
                    self._known = _Known(config, facts, desired)
                return Result(facts, desired, tuple(made), left_out, None if whole else ports)
            try:
                self._carry_out(changes, desired.state)
            except _StepError as step:
                if known:  # what is known may be past: a bridge goes before its devices' news has come
                    known = None
                    continue
                port = _port_of(step.change, config)
                if strict or port is None or port in left_out:
                    self._undo(made)
                    raise step.cause from step.cause.__cause__
                log.warning("port %s is left out: %s", port, step.cause)
                left_out[port] = str(step.cause)
            else:
                made += changes
                rounds += 1
                if not known and (few := _ports_of(changes, desired)) is not None:
                    # What has not been changed was looked at a moment ago.
                    known = _Known(config, facts, desired)
                    news = {device for name in few if (device := config.ports[name].device)}
        now, _, rest = self._compare(config, detached, left_out, choices, may_take=may_take)
        if not rest or _heard_since(desired.state, now):
            return Result(facts, desired, tuple(made), left_out)
        self._undo(made if strict else [])
        differing = [f"{change.resource}: is {change.before}, shall be {change.after}" for change in rest]
        raise VerifyError("\n".join(["the kernel does not keep what was set:", *differing]))

    def take_out(self, config: Config, *, everything: bool) -> tuple[Change, ...]:
        """Take the fast path out, or all that is ours. ``config`` only says which devices to look at."""
        self._known = None
        originals = self._journal.originals()
        facts = self._kernel.facts(config, originals, detached=True)
        self._forget_gone(facts)
        observed = self._kernel.observe(facts, {}, originals)
        wanted: State = {} if everything else without_fast_path(observed)
        changes = difference(observed, wanted, originals)
        try:
            self._carry_out(changes, wanted)
        except _StepError as step:
            raise step.cause from step.cause.__cause__
        return changes

    def _grow_older(self, config: Config) -> None:
        """Number the ports in the order in which they came."""
        if self._ages.keys() == config.ports.keys():
            return
        next_age = max(self._ages.values(), default=0) + 1
        known = self._ages
        self._ages = {name: known.get(name, next_age + place) for place, name in enumerate(config.ports)}

    def _compare(
        self,
        config: Config,
        detached: bool,
        failed: Mapping[str, str],
        choices: Mapping[str, Any],
        *,
        may_take: bool,
    ) -> tuple[Facts, Desired, tuple[Change, ...]]:
        originals = self._journal.originals()
        facts = self._kernel.facts(config, originals, detached=detached, failed=failed, may_take=may_take)
        facts = replace(facts, ages=self._ages, **choices)
        desired = desire(config, facts)
        observed = self._kernel.observe(facts, desired.state, originals)
        return facts, desired, difference(observed, desired.state, originals)

    def _compare_again(
        self, known: _Known, config: Config, news: Collection[str], choices: Mapping[str, Any]
    ) -> tuple[Facts, Desired, tuple[Change, ...], Collection[str]] | None:
        """As ``_compare``, for a few ports: new, changed, in ``choices``, or with a device in ``news``.

        Also says which these are. ``None`` where it may be about more than these.
        """
        before, after = known.config, config
        if (before.nics, before.switches) != (after.nics, after.switches) or not after.nics.keys().isdisjoint(
            news
        ):
            return None
        names = differing(before.ports, after.ports).union(*choices.values())
        if news:
            names |= {
                name for one in (before, after) for name, port in one.ports.items() if port.device in news
            }
        concerned = [one.ports[name] for one in (before, after) for name in names if name in one.ports]
        if len(names) > _FEW or any(port.af_xdp for port in concerned):
            return None
        devices = {port.device for port in concerned if port.device}
        networks = known.facts.networks
        facts = self._kernel.facts_again(
            replace(known.facts, ages=self._ages, **choices),
            devices,
            unless={*news} - devices,
            ids=port_ids_again(names, known.facts, known.desired),
            stations={
                (networks[port.switch], mac, vid)
                for port in concerned
                for mac in port.mac
                for vid in port.vlan.vids
                if port.switch in networks
            },
        )
        switches = {port.switch for port in concerned}
        again = facts and desire_again(config, facts, names, switches, known.desired)
        if not facts or not again:
            return None
        desired, about = again
        numbers = {
            each[name].ifindex for each in (facts.links, known.facts.links) for name in devices & each.keys()
        }
        originals = self._journal.originals_of(numbers)
        observed = self._kernel.observe_again(facts, {*about, *originals})
        wanted = {resource: desired.state[resource] for resource in about if resource in desired.state}
        return facts, desired, difference(observed, wanted, originals), names

    def _forget_gone(self, facts: Facts) -> None:
        """Nothing can be given back to a device that has gone, and its number may be another's one day."""
        live = {link.ifindex for link in facts.links.values()}
        self._journal.forget(
            resource
            for resource in self._journal.originals()
            if isinstance(resource, DeviceResource) and resource.ifindex and resource.ifindex not in live
        )

    def _carry_out(self, changes: tuple[Change, ...], wanted: State) -> None:
        """Make the changes, or none of them. Settings of others are journalled before the first."""
        settings: dict[Resource, Value] = {
            change.resource: change.before
            for change in changes
            if change.resource in wanted
            and isinstance(change.resource, (*SETTINGS, Bridge, Conduit, HostPair, Channel))
            and getattr(change.resource, "ifindex", None) != 0  # still to be made: it has no settings yet
        }
        known = self._journal.originals()
        untouched = {resource for resource in settings if resource not in known}
        self._journal.record_all(settings)
        done: list[Change] = []
        try:
            with self._kernel.hurry(changes):
                for change in changes:
                    log.info("%s", describe(change).text)
                    self._kernel.execute(change)
                    done.append(change)
                    untouched.discard(change.resource)
        except BaseException as error:
            log.error("%s: %s", describe(change).text, error)
            self._undo(done)
            self._journal.forget(untouched)
            if isinstance(error, OffloadError):
                raise _StepError(change, error) from error
            raise
        self._journal.forget(change.resource for change in changes if change.resource not in wanted)

    def _undo(self, done: list[Change]) -> None:
        """Take changes back, last first. What cannot be taken back is logged; the rest still is."""
        originals = self._journal.originals()
        as_they_were: list[Resource] = []
        with self._kernel.hurry(done):
            for change in reversed(done):
                back = change.inverse()
                log.info("undo: %s", describe(back).text)
                try:
                    self._kernel.execute(back)
                except OffloadError as error:
                    log.error("could not undo (%s): %s", describe(back).text, error)
                else:
                    if back.resource in originals and originals[back.resource] == back.after:
                        as_they_were.append(back.resource)
        self._journal.forget(as_they_were)


def _ports_of(changes: Iterable[Change], desired: Desired) -> Collection[str] | None:
    """The ports that changes are of; ``None``: many, or there are others."""
    left = {change.resource for change in changes}
    found = []
    for name, share in desired.shares.items():
        if not share.keys().isdisjoint(left):
            found.append(name)
            left.difference_update(share)
        if not left:
            break
    return found if not left and len(found) <= _FEW else None


def _port_of(change: Change, config: Config) -> str | None:
    """The port whose device a change is about."""
    if not isinstance(change.resource, DeviceResource):
        return None
    device = change.resource.device
    return next((name for name, port in config.ports.items() if port.device == device), None)


def _heard_since(decided: State, now: Facts) -> bool:
    """Whether a program has moved an address since: news, which is looked at next, and no failure."""
    return any(
        isinstance(resource, Station)
        and isinstance(value, tuple)
        and (row := now.stations.get((resource.network, resource.mac, resource.vid)))
        and row.state != value[-1]
        for resource, value in decided.items()
    )


def _raise_first(refusals: tuple[OffloadError, ...]) -> None:
    if refusals:
        raise refusals[0]
