"""What an operator can do without the daemon: plan, detach, and ask the doctor."""

from __future__ import annotations

import logging
from pathlib import Path

from . import portfiles, takeovers
from .client import Client, NoDaemonError
from .config import Config
from .daemon import era, outcome, understand
from .doctor import Report, diagnose
from .errors import OffloadError, UsageError
from .journal import Journal
from .kernel import bypassed, host
from .kernel.bypassed import Place
from .kernel.service import alone
from .kernel.system import System
from .model import Change
from .paths import Paths
from .reconcile import Reconciler
from .views import Outcome

log = logging.getLogger(__name__)

_NOTHING = Config(version=1)


def plan(text: str | None, source: str, paths: Paths) -> Outcome:
    """What ``apply`` would change, changing nothing. Without ``text``: for the daemon's own config."""
    if text is None:
        with Client(paths.socket) as client:
            file = client.status().config.file
        if file is None or not Path(file).is_file():
            raise UsageError("the daemon's config came from no file: name one, `offload plan FILE`")
        text, source = Path(file).read_text(), file
    wanted = understand(text, source, portfiles.load(paths), paths)
    with System(paths, keep=False) as system:
        reconciler = Reconciler(system, Journal(paths.journal, era()))
        planned = reconciler.plan(wanted.config)
        return outcome(planned.changes, wanted.config, bypassed.places(wanted.config), planned.facts.host)


def detach(paths: Paths, everything: bool) -> Outcome:
    """Take the fast path out, or with ``everything`` all that is ours; through the daemon if there is one."""
    try:
        with Client(paths.socket) as client:
            return client.detach(everything)
    except NoDaemonError:
        pass
    with alone(paths.run_dir), System(paths) as system:
        reconciler = Reconciler(system, Journal(paths.journal, era()))
        if everything:
            return outcome(_take_everything_out(system, reconciler, paths), None)
        return outcome(reconciler.take_out(_NOTHING, everything=False), None)


def _take_everything_out(system: System, reconciler: Reconciler, paths: Paths) -> tuple[Change, ...]:
    changes = reconciler.take_out(_NOTHING, everything=True)
    system.dataplane.remove_everything()
    takeovers.clear_pending(paths.pending)
    return changes


def roll_back(paths: Paths) -> Outcome:
    """Take back the takeover that waits; through the daemon if there is one."""
    try:
        with Client(paths.socket) as client:
            return client.rollback()
    except NoDaemonError:
        return roll_back_without_daemon(paths)


def roll_back_without_daemon(paths: Paths) -> Outcome:
    """Take back the takeover that waits. What cannot be had as it was before is taken out altogether.

    Raises ``UsageError`` when none waits.
    """
    with alone(paths.run_dir), System(paths) as system:
        pending = takeovers.load_pending(paths.pending, host.boot_id())
        if pending is None:
            raise UsageError(
                f"no takeover waits in {paths.run_dir}; `offload detach --all` gives confirmed ones back"
            )
        reconciler = Reconciler(system, Journal(paths.journal, era()))
        try:
            if pending.former:
                changes = _return_to(pending.former, reconciler, paths)
                takeovers.clear_pending(paths.pending)
                return outcome(changes, None)
        except OffloadError as error:
            log.error("the config that was in force before cannot be had: %s", error)
        return outcome(_take_everything_out(system, reconciler, paths), None)


def _return_to(former: takeovers.Former, reconciler: Reconciler, paths: Paths) -> tuple[Change, ...]:
    files = former.files()
    wanted = understand(former.text, former.source, files, paths)
    changes = reconciler.apply(wanted.config, strict=False, detached=former.detached).changes
    portfiles.save(paths, portfiles.load(paths), files)
    return changes


def doctor(paths: Paths, probe: bool) -> Report:
    """Examine this host, and the NICs of a living daemon's config beside all hardware.

    ``probe`` tries what cannot be known otherwise: see ``nics.capabilities``.
    """
    try:
        with Client(paths.socket) as client:
            nics = [nic.name for nic in client.nics()]
            switches = {switch.name: switch for switch in client.switches()}
            ports = client.ports()
    except NoDaemonError:
        return diagnose(paths, probe=probe)
    places = {
        port.name: Place(port.device, switch.name if switch.bridge == "kernel" else None, switch.uplink)
        for port in ports
        if port.device and port.queue_asked != "off" and (switch := switches.get(port.switch)) is not None
    }
    return diagnose(paths, nics or None, list(switches), places, probe=probe)
