"""The command line.

Each command is thin: it turns arguments into one call and the answer into a
table or JSON. What takes long to import is imported inside the commands, so that
``offload --help`` and tab completion stay quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

import offload
from offload.errors import ConfigError, OffloadError, PrivilegeError, UsageError
from offload.paths import Paths

if TYPE_CHECKING:
    from pydantic import BaseModel

    from offload.client import Client
    from offload.views import ExplainView, Outcome, TakeoverView

MAX_CONFIG = 8 * 1024 * 1024
"""Bytes of a config file; what the daemon accepts."""

_DEBUG = "offload.debug"
_COMPLETION_PATIENCE = 0.5
"""Seconds that tab completion waits for the daemon."""

_EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed
  2  bad usage or bad config
  3  this kernel, driver or version cannot
  4  a privilege is missing
"""

Command = Callable[..., None]
V = TypeVar("V", bound="BaseModel")


class _Command(click.Command):
    """A command whose help ends with the exit codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"epilog": _EXIT_CODES} | kwargs))


class _Commands(click.Group):
    """A group that turns errors into a message on stderr and the exit code of the contract."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader has seen enough; click ends quietly
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if not isinstance(error, OffloadError):
                first, *_ = str(error).splitlines() or [""]
                _say(f"offload: unexpected {type(error).__name__}: {first} (--debug shows where)")
                ctx.exit(1)
            _say(str(error))
            ctx.exit(error.exit_code)


def _say(message: str) -> None:
    """A message for people, on stderr, whatever it has in it."""
    click.echo(message.encode(errors="backslashreplace").decode(), err=True)


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show a traceback when something fails.",
)
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
)
_dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would change.")


def _instance_options(command: Command) -> Command:
    """Options that name an instance of the daemon; they arrive as one ``paths``."""

    @functools.wraps(command)
    def with_paths(*args: Any, run_dir: Path, state_dir: Path, pin_dir: Path, **kwargs: Any) -> None:
        command(*args, paths=Paths(run_dir, state_dir, pin_dir), **kwargs)

    default = Paths()
    for name, directory, about in (
        ("pin-dir", default.pin_dir, "Where its kernel objects are pinned."),
        ("state-dir", default.state_dir, "What it keeps over a reboot."),
        ("run-dir", default.run_dir, "The instance's socket and journal."),
    ):
        with_paths = click.option(
            f"--{name}",
            type=click.Path(file_okay=False, readable=False, path_type=Path),
            default=directory,
            show_default=True,
            envvar=f"OFFLOAD_{name.replace('-', '_').upper()}",
            show_envvar=True,
            help=about,
        )(with_paths)
    return _debug_option(with_paths)


@click.group(
    cls=_Commands,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(offload.__version__, prog_name="offload")
@_debug_option
def main() -> None:
    """A receive queue for every virtual machine, with XDP on the NIC.

    Frames from the wire that match a VM's MAC and VLAN go straight to that VM's queue;
    everything else goes to a bridge.

    \b
    To begin:
      offload check offload.yaml              is the config right?
      offload doctor                          what can this host do?
      sudo offload plan offload.yaml          what would change?
      sudo offload run --config offload.yaml  do it, and keep it so
      sudo offload ports                      who takes which path?
    """


# Configs and the daemon


_file_argument = click.argument("file", type=click.Path(path_type=str), metavar="FILE")


@main.command()
@_file_argument
@_json_option
@_debug_option
def check(file: str, as_json: bool) -> None:
    """Say everything that is wrong with a config.

    FILE is the config, or - for standard input. Needs no privilege and no daemon. Nothing
    on this machine is looked at: whether a NIC or a CPU exists shows in `offload plan`.

    \b
    Examples:
      offload check /etc/offload/offload.yaml
      generate-config | offload check -
    """
    from offload import config

    text, source = _read_config(file)
    warnings: list[str] = []
    problem: OffloadError | None = None
    try:
        parsed = config.parse(text, source)
        warnings = [str(warning) for warning in config.warnings(parsed)]
    except OffloadError as error:
        problem = error
    if as_json:
        _print_json(_verdict(problem, warnings))
    _warn(f"{source}: {warning}" for warning in warnings)
    if problem is not None:
        raise problem
    if not as_json:
        click.echo(f"{source}: good")


def _verdict(problem: OffloadError | None, warnings: list[str]) -> dict[str, Any]:
    listed = problem.problems if isinstance(problem, ConfigError) else ()
    return {
        "valid": problem is None,
        "error": None if problem is None else str(problem),
        "exit_code": 0 if problem is None else problem.exit_code,
        "problems": [{"path": p.path, "value": p.value, "allowed": p.allowed} for p in listed],
        "warnings": warnings,
    }


@main.command()
@click.argument("file", type=click.Path(path_type=str), metavar="[FILE]", required=False)
@_json_option
@_instance_options
def plan(file: str | None, as_json: bool, paths: Paths) -> None:
    """Show what `apply` would change, changing nothing.

    FILE is the config, or - for standard input; without it, the config that was last in
    force. Needs read access to the network and to the pin directory, and no daemon.
    A line begins with + for what comes, - for what goes, ~ for what becomes different.

    \b
    Examples:
      sudo offload plan offload.yaml
      sudo offload plan --json new.yaml | jq '.changes | length'
    """
    from offload import operate

    text, source = (None, "config") if file is None else _read_config(file)
    _report(operate.plan(text, source, paths), as_json, dry_run=True)


@main.command()
@click.option(
    "--config",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="The config.",
)
@_instance_options
def run(file: Path, paths: Paths) -> None:
    """Run the daemon in the foreground.

    Puts the config in force, keeps the kernel that way while devices come and go, and
    serves the API and the metrics. Needs root, or CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW and
    CAP_PERFMON. Tells systemd when it is ready (Type=notify). When it stops, frames keep
    flowing as they did; `offload detach` takes that away.

    \b
    Examples:
      sudo offload run --config /etc/offload/offload.yaml
      sudo offload run --config two.yaml --run-dir /run/offload2 \\
          --state-dir /var/lib/offload2 --pin-dir /sys/fs/bpf/offload2
    """
    from offload import daemon

    click.get_current_context().exit(daemon.run(file, paths))


@main.command()
@_file_argument
@_dry_run_option
@click.option(
    "--confirm-within",
    type=click.FloatRange(5, 86_400),
    metavar="SECONDS",
    help="When a takeover goes back by itself (120 unless given).",
)
@_json_option
@_instance_options
def apply(file: str, dry_run: bool, confirm_within: float | None, as_json: bool, paths: Paths) -> None:
    """Hand the daemon a new config: all of it or none.

    FILE is the config, or - for standard input. Needs the running daemon. Prints what was
    changed. A config that is wrong is refused whole and changes nothing.

    A config that takes over a NIC with the host's addresses has to be confirmed, with `offload
    confirm`, or everything goes back to what it was.

    \b
    Examples:
      sudo offload apply --dry-run offload.yaml
      sudo offload apply offload.yaml
      sudo offload apply --confirm-within 30 offload.yaml && sudo offload confirm
    """
    text, source = _read_config(file)
    # The daemon has another working directory: what it reports later must still name the file.
    source = source if file == "-" else str(Path(file).absolute())
    with _connect(paths) as client:
        within = {} if confirm_within is None else {"confirm_within": confirm_within}
        outcome = client.apply(text, source, dry_run, **within)
    _report(outcome, as_json, dry_run)
    if outcome.takeover:
        _say(
            f"{_taken(outcome.takeover)}: this goes back in {outcome.takeover.seconds_left:.0f} s "
            "unless you run `offload confirm`"
        )


@main.command()
@_json_option
@_instance_options
def confirm(as_json: bool, paths: Paths) -> None:
    """Keep a takeover that would otherwise undo itself.

    The host's addresses stay on its interface of the switch, and the next boot takes them over
    without asking. Needs the running daemon. `offload status` shows what waits.

    \b
    Example:
      sudo offload confirm
    """
    with _connect(paths) as client:
        kept = client.confirm()
    if as_json:
        _print_json(kept.model_dump(mode="json"))
    else:
        click.echo(f"kept: {_taken(kept)}")


@main.command()
@_json_option
@_instance_options
def rollback(as_json: bool, paths: Paths) -> None:
    """Take back a takeover that waits for its confirmation, at once.

    The config that was in force before is in force again, and the host's addresses are where
    they were. Works with the daemon dead as well. A takeover that was confirmed is given back by
    taking its switch out of the config.

    \b
    Example:
      sudo offload rollback
    """
    from offload import operate

    _report(operate.roll_back(paths), as_json, dry_run=False)


@main.command()
@click.option(
    "--all", "everything", is_flag=True, help="Also take out the bridges and give every setting back."
)
@_json_option
@_instance_options
def detach(everything: bool, as_json: bool, paths: Paths) -> None:
    """Take the fast path out and leave the bridges forwarding.

    With --all, everything of ours goes, and only ours: bridges, programs, pins; every
    setting that was changed gets its old value back. Works with the daemon dead as well.
    Needs root, or CAP_BPF and CAP_NET_ADMIN.

    \b
    Examples:
      sudo offload detach
      sudo offload detach --all
    """
    from offload import operate

    _report(operate.detach(paths, everything), as_json, dry_run=False)


@main.command()
@click.option(
    "--probe", is_flag=True, help="Also try what cannot be known otherwise: insert and remove a rule."
)
@_json_option
@_instance_options
def doctor(probe: bool, as_json: bool, paths: Paths) -> None:
    """Say what this host and its NICs can do, and what to mend.

    Needs read access; some findings need root. Changes nothing; --probe may insert a
    rule into a NIC that no frame fits, and remove it again. The exit code says whether the examination took
    place, not how it went: that is `level` in the JSON (ok, warn or fail).

    \b
    Examples:
      sudo offload doctor
      sudo offload doctor --probe --json
    """
    from offload import operate

    report = operate.doctor(paths, probe)
    if as_json:
        _print_json({"level": report.level} | dataclasses.asdict(report))
        return
    for finding in report.findings:
        click.echo(f"{finding.level:4}  {finding.subject}: {finding.message}")
        if finding.remedy:
            click.echo(f"      remedy: {finding.remedy}")


# Completion of names


_Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _complete(what: str) -> _Completer:
    """Completes names from the running daemon; without one, nothing is offered."""

    def names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from offload.client import Client

        run_dir = ctx.params.get("run_dir") or Paths().run_dir
        try:
            with Client(Paths(Path(run_dir)).socket, _COMPLETION_PATIENCE) as client:
                listed = getattr(client, what)()
        except Exception:  # noqa: BLE001 - whatever it is, somebody is in the middle of typing
            return []
        return [CompletionItem(view.name) for view in listed if view.name.startswith(incomplete)]

    return names


def _names_argument(what: str) -> Callable[[Command], Command]:
    return click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete(what))


# What is so, now


@main.command()
@_json_option
@_instance_options
def status(as_json: bool, paths: Paths) -> None:
    """Show the daemon at a glance.

    The config in force and how the last one was taken, reconciliation, counts, warnings.
    Needs the running daemon.

    \b
    Examples:
      sudo offload status
      sudo offload status --json | jq .config.load_error
    """
    from offload import tables

    with _connect(paths) as client:
        view = client.status()
    if as_json:
        _print_json(view.model_dump(mode="json"))
    else:
        tables.status(view)


@main.command()
@_names_argument("nics")
@_json_option
@_instance_options
def nics(names: tuple[str, ...], as_json: bool, paths: Paths) -> None:
    """Show the NICs: XDP mode in force, program, filters.

    Also the NIC's own RX queues, whether it has hardware queues for VMs, and what went to the default
    queue, and why. What else it can do is in the JSON, and `offload doctor` says it in words. Needs the
    running daemon. With NAMEs, only these.

    \b
    Examples:
      sudo offload nics
      sudo offload nics eth1 --json | jq '.[0].hardware_queues, .[0].capabilities.zero_copy'
    """
    from offload import tables

    with _connect(paths) as client:
        views = _only(names, client.nics(), "nic")
    if as_json:
        _print_views(views)
    else:
        tables.nics(views)


@main.command()
@_names_argument("switches")
@_json_option
@_instance_options
def switches(names: tuple[str, ...], as_json: bool, paths: Paths) -> None:
    """Show the switches: host, VLANs and their members, bridge.

    Also what went over the bridge, and how a Python bridge does. Needs the running daemon.
    With NAMEs, only these.

    \b
    Examples:
      sudo offload switches
      sudo offload switches ext0 --json
    """
    from offload import tables

    with _connect(paths) as client:
        views = _only(names, client.switches(), "switch")
    if as_json:
        _print_views(views)
    else:
        tables.switches(views)


@main.command()
@_names_argument("ports")
@_json_option
@_instance_options
def ports(names: tuple[str, ...], as_json: bool, paths: Paths) -> None:
    """Show the ports: path, queue, traffic.

    Also what was dropped and why, and why a port has not got what was asked for. Needs the
    running daemon. With NAMEs, only these. rx is towards the VM.

    \b
    Examples:
      sudo offload ports
      sudo offload ports web1 --json | jq '.[0].counters'
    """
    from offload import tables

    with _connect(paths) as client:
        views = _only(names, client.ports(), "port")
    if as_json:
        _print_views(views)
    else:
        tables.ports(views)


@main.command()
@click.option(
    "--nic", "nic", metavar="NAME", shell_complete=_complete("nics"), help="Only the queues of this NIC."
)
@click.option("--events", "as_events", is_flag=True, help="Show what happened to them, the newest last.")
@_json_option
@_instance_options
def queues(nic: str | None, as_events: bool, as_json: bool, paths: Paths) -> None:
    """Show the queues: kind, state, CPU, ports, traffic.

    Needs the running daemon. Queue 0 is the default queue, which takes whatever matches
    no filter. A software queue is one that XDP fills, a hardware queue one that the NIC fills.

    \b
    allocated  it has its number and its CPU; its device is away, or was not heard yet
    set        its filters stand, and nothing goes through it: its CPU is offline, or
               the NIC does not sort frames there yet
    running    frames go through it
    paused     its port's device is down

    --events shows the last thousand changes of states and CPUs since the daemon started.

    \b
    Examples:
      sudo offload queues
      sudo offload queues --nic eth1 --json
      sudo offload queues --events
    """
    from offload import tables

    with _connect(paths) as client:
        views = [view for view in client.queues() if nic in (None, view.nic)]
        events = [event for event in client.events() if nic in (None, event.nic)] if as_events else []
    if nic is not None and not views and not events:
        raise UsageError(f"{nic}: there is no such nic; `offload nics` lists them")
    if as_json:
        _print_views(events if as_events else views)
    elif as_events:
        tables.events(events)
    else:
        tables.queues(views)


@main.command()
@_names_argument("ports")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    metavar="SECONDS",
    help="How long to look each time (1 unless given).",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many looks.")
@click.option(
    "--sort",
    type=click.Choice(("rate", "bytes", "drops", "name")),
    default="rate",
    help="What comes first: the most frames (rate), bytes or drops; or by name.",
)
@_json_option
@_instance_options
def top(
    names: tuple[str, ...],
    interval: float,
    count: int | None,
    sort: Literal["rate", "bytes", "drops", "name"],
    as_json: bool,
    paths: Paths,
) -> None:
    """Watch ports, queues and CPUs: frames, bits and drops per second.

    On a terminal the screen is drawn anew at each look, and q or Ctrl-C ends it; a daemon that is
    started anew is waited for. Elsewhere each look is printed below the one before. With --json there is
    one look, and one document. Needs the running daemon. With NAMEs, only these ports and their
    queues. rx is towards the VM; RX BY says which path the frames took.

    The CPUs are all that are online here, busy with whatever it may be: queues without a CPU of
    their own are served by those that the NIC's interrupts go to.

    \b
    Examples:
      sudo offload top
      sudo offload top --sort drops --interval 5
      sudo offload top web1 --json | jq '.ports[0].rx'
    """
    from offload import tables
    from offload import top as rates

    if as_json and count is not None:
        raise UsageError("--json is one document of one look: leave out --count, or call it again")
    live = not as_json and sys.stdout.isatty()
    number = 1 if as_json else count
    with _connect(paths) as client, contextlib.suppress(KeyboardInterrupt):
        _only(names, client.ports(), "port")
        with rates.keys() as wait, tables.Screen(live) as screen:
            found = rates.follow(client, names, lambda: wait(interval), patient=live)
            for view in itertools.islice(found, number):
                if isinstance(view, Exception):
                    screen.show(view)
                elif as_json:
                    _print_json(view.model_dump(mode="json"))
                else:
                    screen.show(rates.ordered(view, sort))


# One frame


def _mac(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """A MAC as the config takes it, lower-case with colons."""
    if value is None:
        return None
    mac = value.lower().replace("-", ":")
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise click.BadParameter(f"{value}: a MAC as 02:15:5d:00:00:01.")
    return mac


@main.command()
@click.option(
    "--nic", metavar="NAME", shell_complete=_complete("nics"), help="A frame from the wire to this NIC."
)
@click.option(
    "--port",
    metavar="NAME",
    shell_complete=_complete("ports"),
    help="A frame that this port's VM sends; host:SWITCH for the host.",
)
@click.option("--dst", metavar="MAC", required=True, callback=_mac, help="Its destination.")
@click.option(
    "--src",
    metavar="MAC",
    callback=_mac,
    help="Its source; else the port's own address, or one of the wire that nobody has.",
)
@click.option(
    "--vlan",
    "vids",
    type=click.IntRange(0, 4094),
    metavar="VID",
    multiple=True,
    help="The VID of its tag; for stacked tags give it again, the outermost first.",
)
@click.option("--service-tag", "service", is_flag=True, help="The outermost tag is of 802.1ad.")
@click.option(
    "--size",
    type=click.IntRange(14, 9216),
    default=60,
    show_default=True,
    metavar="BYTES",
    help="Its length without tags and FCS.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["plain", "tcp", "dhcp-server", "router-advertisement"]),
    default="plain",
    show_default=True,
    help="What it carries, for the guards and for GRO.",
)
@click.option(
    "--rx-queue",
    type=click.IntRange(0),
    metavar="N",
    help="The NIC's RX queue on which it arrives: an AF_XDP port may have a socket there.  [default: that of "
    "a rule in the NIC, or 0]",
)
@_json_option
@_instance_options
def explain(
    nic: str | None,
    port: str | None,
    vids: tuple[int, ...],
    service: bool,
    as_json: bool,
    paths: Paths,
    **asked: Any,
) -> None:
    """Say where a frame goes, and why.

    Runs such a frame through the programs that are loaded, with the tables as they are now. It is
    not sent, no counter moves, and no address changes its place. Needs root with CAP_BPF,
    CAP_NET_ADMIN and CAP_PERFMON, and no daemon.

    \b
    Verdicts:
      queue   to a port's device: from the wire by its queue, from a local port directly
      af_xdp  to a port's AF_XDP socket
      bridge  to the switch's bridge, which forwards or floods it
      host    to the host's own stack
      uplink  to the wire, past the bridge
      drop    nowhere; the port's counters have it

    A NIC that sorts frames itself is read, and told of first: a rule of its, or a virtual function,
    whose program the frame then meets.

    Not tried is what comes after the hand-over: a full ring, a device that is down, the bridge's
    own table, other people's programs. A frame from the wire is taken to arrive on another CPU
    than its queue's, and in one buffer if it fits into a page. Programs of another version of
    offload are not asked, and tc programs not about frames longer than a page: exit code 3.

    \b
    Examples:
      sudo offload explain --nic eth1 --dst 02:15:5d:00:00:01 --vlan 10
      sudo offload explain --nic eth1 --dst 02:15:5d:00:00:01 --rx-queue 1
      sudo offload explain --port web1 --dst ff:ff:ff:ff:ff:ff --type dhcp-server
      sudo offload explain --port web1 --dst 02:15:5d:00:00:02 --json | jq -r .verdict
    """
    if (nic is None) == (port is None):
        raise click.UsageError("Give either --nic or --port.")
    if service and not vids:
        raise click.UsageError("--service-tag needs --vlan.")
    from offload.kernel.explain import Question
    from offload.kernel.explain import explain as ask

    view = ask(Question(nic=nic, port=port, vids=vids, service=service, **asked), paths)
    if as_json:
        _print_json(view.model_dump(mode="json"))
    else:
        _print_explained(view)


# One port, live


@main.group(cls=_Commands, epilog=_EXIT_CODES)
def port() -> None:
    """Add, change or remove one port while the daemon runs.

    Ports of the config file are changed in the config file, with `offload apply`.
    """


_port_argument = click.argument("name", shell_complete=_complete("ports"))


_GUARDS = ("mac_spoofing", "dhcp_server", "router_advertisement", "link_local_protocols")
"""The fields of ``config.AllowConfig``; importing it takes longer than --help should."""


def _port_options(command: Command) -> Command:
    """Options for the keys of a port; only those that were given arrive, as ``spec``."""

    @functools.wraps(command)
    def with_spec(
        *args: Any,
        switch: str | None,
        device: str | None,
        af_xdp: str | None,
        zero_copy: str | None,
        trusted: bool | None,
        owner: str | None,
        mac: tuple[str, ...],
        vlan: str | None,
        queue: str | None,
        cpu: str | None,
        delivery: str | None,
        weight: int | None,
        allow: tuple[str, ...],
        deny: tuple[str, ...],
        **kwargs: Any,
    ) -> None:
        if both := set(allow) & set(deny):
            raise click.UsageError(f"{min(both)}: either --allow or --deny.")
        sockets = {
            "mode": af_xdp,
            "zero_copy": zero_copy,
            "trusted": trusted,
            "owner": {"user": owner} if owner else None,
        }
        given: dict[str, Any] = {
            "switch": switch,
            "device": device,
            "af_xdp": {key: value for key, value in sockets.items() if value is not None} or None,
            "mac": mac[0] if len(mac) == 1 else list(mac) or None,
            "queue": queue,
            "cpu": int(cpu) if cpu is not None and cpu.isdecimal() else cpu,
            "delivery": delivery,
            "weight": weight,
            "allow": {**dict.fromkeys(allow, True), **dict.fromkeys(deny, False)} or None,
        }
        spec = {key: value for key, value in given.items() if value is not None}
        if vlan is not None:
            from offload.config import VlanMode

            spec["vlan"] = VlanMode.parse(vlan).plain()
        command(*args, spec=spec, **kwargs)

    for option in (
        click.option(
            "--deny", type=click.Choice(_GUARDS), multiple=True, help="Switch a guard on; may be given again."
        ),
        click.option(
            "--allow",
            type=click.Choice(_GUARDS),
            multiple=True,
            help="Switch a guard off: what the VM may send besides; may be given again.",
        ),
        click.option("--weight", type=click.IntRange(0, 100), help="Who gets a queue first; 0: no queue."),
        click.option(
            "--delivery",
            type=click.Choice(["auto", "frames", "gro"]),
            help="Each frame as it comes, or merged first (GRO).",
        ),
        click.option("--cpu", metavar="auto|nic|CPU", help="The CPU that serves the queue."),
        click.option(
            "--queue", type=click.Choice(["auto", "hardware", "software", "off"]), help="What queue it gets."
        ),
        click.option(
            "--vlan",
            metavar="none|VID|trunk:10,20/native:1",
            help="none: untagged. VID: an access port. trunk:…: tagged VIDs, of which one may go untagged.",
        ),
        click.option(
            "--mac", metavar="MAC|auto", multiple=True, help="The VM's address; may be given again."
        ),
        click.option("--owner", metavar="USER", help="AF_XDP: whose processes may take its sockets."),
        click.option(
            "--trusted/--untrusted",
            default=None,
            help="AF_XDP: whether its consumer may bind sockets of its own to the NIC, past the guards.",
        ),
        click.option(
            "--zero-copy",
            type=click.Choice(["auto", "require", "off"]),
            help="AF_XDP: on the NIC's queues, where its driver can.",
        ),
        click.option(
            "--af-xdp",
            type=click.Choice(["auto", "software", "hardware"]),
            help="Deliver to AF_XDP sockets instead of a device: through a veth pair of the port's own "
            "(software), or on the NIC's queues besides (hardware).",
        ),
        click.option("--device", metavar="DEVICE", help="The tap, or the host's end of the veth."),
        click.option(
            "--switch", metavar="SWITCH", shell_complete=_complete("switches"), help="The switch it is on."
        ),
    ):
        with_spec = option(with_spec)
    return with_spec


@port.command("add")
@click.argument("name")
@_port_options
@click.option("--keep", is_flag=True, help="Keep it over a reboot (STATE_DIR/ports.d).")
@_dry_run_option
@_json_option
@_instance_options
def port_add(name: str, spec: dict[str, Any], keep: bool, dry_run: bool, as_json: bool, paths: Paths) -> None:
    """Add the port NAME.

    Needs the running daemon, --switch, and --device or --af-xdp. The device may appear later.
    Without --keep the port is gone with the next boot.

    \b
    Examples:
      sudo offload port add web1 --switch ext0 --device web1 --mac 02:15:5d:00:00:01
      sudo offload port add db1 --switch ext0 --device db1 --mac auto --vlan 10 --keep
      sudo offload port add fw1 --switch ext0 --device fw1 --vlan trunk:10,20/native:1
      sudo offload port add ids1 --switch ext0 --af-xdp software --owner suricata --mac auto
    """
    missing = ["--switch"] if "switch" not in spec else []
    missing += ["--device or --af-xdp"] if not spec.keys() & {"device", "af_xdp"} else []
    if missing:
        raise click.UsageError(f"Missing option {' and '.join(missing)}.")
    with _connect(paths) as client:
        _report(client.port_add(name, spec, keep, dry_run), as_json, dry_run)


@port.command("set")
@_port_argument
@_port_options
@_dry_run_option
@_json_option
@_instance_options
def port_set(name: str, spec: dict[str, Any], dry_run: bool, as_json: bool, paths: Paths) -> None:
    """Change what is given about the port NAME; the rest stays.

    Needs the running daemon. A port of the config file is refused.

    \b
    Examples:
      sudo offload port set web1 --cpu 3
      sudo offload port set web1 --queue off --dry-run
      sudo offload port set db1 --vlan none
      sudo offload port set fw1 --allow dhcp_server --deny mac_spoofing
    """
    if not spec:
        raise click.UsageError("Nothing to set: give at least one option.")
    with _connect(paths) as client:
        _report(client.port_set(name, spec, dry_run), as_json, dry_run)


@port.command("remove")
@_port_argument
@_dry_run_option
@_json_option
@_instance_options
def port_remove(name: str, dry_run: bool, as_json: bool, paths: Paths) -> None:
    """Remove the port NAME and free its queue.

    Needs the running daemon. The device stays. A port of the config file is refused.

    \b
    Example:
      sudo offload port remove web1
    """
    with _connect(paths) as client:
        _report(client.port_remove(name, dry_run), as_json, dry_run)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_debug_option
def completion(shell: str) -> None:
    """Print the script for tab completion in a shell.

    Commands and options are completed, and the names of ports, NICs and switches, which
    come from the running daemon.

    \b
    Examples:
      eval "$(offload completion bash)"
      offload completion zsh > "${fpath[1]}/_offload"
      offload completion fish > ~/.config/fish/completions/offload.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells of the choice above"
    click.echo(kind(main, {}, "offload", "_OFFLOAD_COMPLETE").source())


# Reading and printing


def _connect(paths: Paths) -> Client:
    from offload.client import Client

    return Client(paths.socket)


def _read_config(file: str) -> tuple[str, str]:
    """The text of a config and what to call it in messages."""
    source = "stdin" if file == "-" else file
    try:
        if file == "-":
            octets = sys.stdin.buffer.read(MAX_CONFIG + 1)
        else:
            with open(file, "rb") as stream:
                octets = stream.read(MAX_CONFIG + 1)
    except PermissionError as error:
        raise PrivilegeError(f"{source}: may not be read; run as its owner or as root") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{source}: cannot be read: {reason}") from error
    if len(octets) > MAX_CONFIG:
        raise UsageError(f"{source}: longer than the {MAX_CONFIG} bytes that a config may have")
    try:
        return octets.decode("utf-8-sig"), source
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from error


def _only(names: tuple[str, ...], views: list[V], kind: str) -> list[V]:
    """The views with these names, in this order; all of them when there are no names."""
    if not names:
        return views
    by_name = {str(getattr(view, "name")): view for view in views}  # noqa: B009 - V has no name of its own
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = ", ".join(by_name) or "none"
        raise UsageError(f"{', '.join(unknown)}: there is no such {kind}; there is: {known}")
    return [by_name[name] for name in names]


def _report(outcome: Outcome, as_json: bool, dry_run: bool) -> None:
    """Print what was changed, or would be, one change a line."""
    if as_json:
        _print_json(outcome.model_dump(mode="json"))
    elif not outcome.changes:
        click.echo("nothing to change")
    else:
        for change in outcome.changes:
            sign = "+" if change.before is None else "-" if change.after is None else "~"
            click.echo(f"{sign} {change.text}")
        number = len(outcome.changes)
        would = "would be " if dry_run else ""
        click.echo(f"{number} {'change' if number == 1 else 'changes'} {would}made")
    _warn(outcome.warnings)


def _taken(takeover: TakeoverView) -> str:
    """``192.0.2.1/24 of eth1 taken over``."""
    taken = (f"{', '.join(addresses)} of {nic}" for nic, addresses in takeover.nics.items())
    return f"{'; '.join(taken)} taken over"


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}")


def _print_explained(view: ExplainView) -> None:
    """The verdict and why, then the programs that it comes from."""
    shown = {"verdict": view.verdict, "port": view.port, "queue": view.queue, "cpu": view.cpu}
    shown |= {"tag": None if view.vlan_action == "none" else view.vlan_action, "reason": view.reason}
    shown |= {
        f"program {number}": f"{step.program} on {step.device}: {step.counter or 'not counted'}"
        for number, step in enumerate(view.steps, 1)
    }
    width = max(map(len, shown))
    for key, value in shown.items():
        if value is not None:
            click.echo(f"{key:{width}}  {value}")


def _print_views(views: Sequence[BaseModel]) -> None:
    _print_json([view.model_dump(mode="json") for view in views])


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))
