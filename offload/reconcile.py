"""Making the kernel what the config says: read, decide, compare, journal, change, read back.

``Reconciler.apply`` is that sentence as code. What fails is undone in reverse, and the
undoing never hides what failed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .config import Config
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
from .plan import SETTINGS, Desired, Facts, desire, difference, without_fast_path

log = logging.getLogger(__name__)

_ROUNDS = 4
"""How often to look again: taking a device can bring news of it, such as a missing carrier."""


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

    def execute(self, change: Change) -> None: ...


@dataclass(frozen=True)
class Result:
    """What was decided, and what was changed for it in order. ``failed``: ports left out, and why."""

    facts: Facts
    desired: Desired
    changes: tuple[Change, ...]
    failed: Mapping[str, str]


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

    def plan(self, config: Config, *, detached: bool = False) -> Result:
        """What ``apply`` would do, changing nothing. Raises what ``apply`` would refuse."""
        facts, desired, changes = self._compare(config, detached, {}, may_take=True)
        _raise_first(desired.refusals)
        return Result(facts, desired, changes, {})

    def apply(
        self,
        config: Config,
        *,
        strict: bool,
        detached: bool = False,
        failed: Mapping[str, str] | None = None,
    ) -> Result:
        """Make the kernel what ``config`` says, and read back that it is.

        ``strict``: all of it or none of it, for a config that somebody has just handed over.
        Otherwise (a device has come or gone) do what can be done: a port whose device makes
        trouble is left out.
        """
        left_out = dict(failed or {})
        made: list[Change] = []
        rounds = 0
        while rounds < _ROUNDS:
            facts, desired, changes = self._compare(config, detached, left_out, may_take=strict)
            self._forget_gone(facts)
            if strict and desired.refusals:
                self._undo(made)
                _raise_first(desired.refusals)
            if not changes:
                return Result(facts, desired, tuple(made), left_out)
            try:
                self._carry_out(changes, desired.state)
            except _StepError as step:
                port = _port_of(step.change, config)
                if strict or port is None or port in left_out:
                    self._undo(made)
                    raise step.cause from step.cause.__cause__
                log.warning("port %s is left out: %s", port, step.cause)
                left_out[port] = str(step.cause)
            else:
                made += changes
                rounds += 1
        now, _, rest = self._compare(config, detached, left_out, may_take=strict)
        if not rest or _heard_since(desired.state, now):
            return Result(facts, desired, tuple(made), left_out)
        self._undo(made if strict else [])
        differing = [f"{change.resource}: is {change.before}, shall be {change.after}" for change in rest]
        raise VerifyError("\n".join(["the kernel does not keep what was set:", *differing]))

    def take_out(self, config: Config, *, everything: bool) -> tuple[Change, ...]:
        """Take the fast path out, or all that is ours. ``config`` only says which devices to look at."""
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

    def _compare(
        self, config: Config, detached: bool, failed: Mapping[str, str], *, may_take: bool
    ) -> tuple[Facts, Desired, tuple[Change, ...]]:
        originals = self._journal.originals()
        facts = self._kernel.facts(config, originals, detached=detached, failed=failed, may_take=may_take)
        desired = desire(config, facts)
        observed = self._kernel.observe(facts, desired.state, originals)
        return facts, desired, difference(observed, desired.state, originals)

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
        untouched = settings.keys() - self._journal.originals().keys()
        self._journal.record_all(settings)
        done: list[Change] = []
        try:
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
