"""What an operator can do without the daemon: plan, detach, and ask the doctor."""

from __future__ import annotations

from pathlib import Path

from . import portfiles
from .client import Client, NoDaemonError
from .config import Config
from .daemon import era, outcome, understand
from .doctor import Report, diagnose
from .errors import UsageError
from .journal import Journal
from .kernel.service import alone
from .kernel.system import System
from .paths import Paths
from .reconcile import Reconciler
from .views import Outcome

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
        return outcome(reconciler.plan(wanted.config).changes, wanted.config)


def detach(paths: Paths, everything: bool) -> Outcome:
    """Take the fast path out, or with ``everything`` all that is ours; through the daemon if there is one."""
    try:
        with Client(paths.socket) as client:
            return client.detach(everything)
    except NoDaemonError:
        pass
    with alone(paths.run_dir), System(paths) as system:
        changes = Reconciler(system, Journal(paths.journal, era())).take_out(_NOTHING, everything=everything)
        if everything:
            system.dataplane.remove_everything()
        return outcome(changes, None)


def doctor(paths: Paths, probe: bool) -> Report:
    """Examine this host, and the NICs of a living daemon's config beside all hardware.

    ``probe`` is accepted for rules that have to be tried; nothing in this version has to be.
    """
    try:
        with Client(paths.socket) as client:
            nics = [nic.name for nic in client.nics()]
            bridges = [switch.name for switch in client.switches()]
    except NoDaemonError:
        return diagnose(paths)
    return diagnose(paths, nics or None, bridges)
