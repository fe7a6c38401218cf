"""The command line against a real unix socket with a fake service behind it. Needs no privilege."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import offload
from offload import tables
from offload.cli import MAX_CONFIG, main
from offload.doctor import Finding, Report
from offload.errors import (
    ConfigError,
    ForeignError,
    OffloadError,
    PrivilegeError,
    Problem,
    UnsupportedError,
    UsageError,
)
from offload.paths import Paths
from offload.takeovers import DEFAULT_WITHIN
from offload.views import HardwareQueues, Outcome
from tests.unit.fake_service import (
    CHANGES,
    DB1,
    EVENTS,
    HARDWARE,
    LAB,
    NIC,
    QUEUES,
    STATUS,
    SWITCH,
    TAKEOVER,
    WEB1,
    FakeService,
    leaked_sockets,
    served,
)

GOOD = """\
version: 1
nics: {eth1: {xdp_mode: native}}
switches: {ext0: {type: external, uplink: eth1}}
"""
READING = ["status", "nics", "switches", "ports", "queues"]

Offload = Callable[..., Result]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeService, Path]]:
    """A served service and its run directory. Scope: this module."""
    service = FakeService()
    run_dir = tmp_path_factory.mktemp("run")
    with served(service, run_dir / "api.sock"):
        yield service, run_dir


@pytest.fixture
def service(daemon: tuple[FakeService, Path]) -> FakeService:
    """The service, as if it were new."""
    daemon[0].reset()
    return daemon[0]


@pytest.fixture
def cli(daemon: tuple[FakeService, Path], monkeypatch: pytest.MonkeyPatch) -> Offload:
    """Run offload with these arguments against the served service: ``cli("ports", "--json")``."""
    monkeypatch.setenv("OFFLOAD_RUN_DIR", str(daemon[1]))
    return lambda *arguments, **options: CliRunner().invoke(main, arguments, **options)


@pytest.fixture
def operate(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of ``offload.operate``: put the functions in that the command shall call."""
    fake = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "offload.operate", fake)
    monkeypatch.setattr(offload, "operate", fake, raising=False)
    return fake


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    """Every command line that asks a command for its help."""
    for name, command in group.commands.items():
        yield (*names, name)
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


# What is so, now


@pytest.mark.parametrize("command", READING)
def test_json_is_one_document_and_nothing_else(command: str, cli: Offload, service: FakeService) -> None:
    expected: dict[str, Any] = {
        "status": STATUS,
        "nics": [NIC],
        "switches": [SWITCH, LAB],
        "ports": [WEB1, DB1],
        "queues": QUEUES,
    }
    result = cli(command, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    views = expected[command]
    shown = [view.model_dump(mode="json") for view in views] if isinstance(views, list) else None
    assert json.loads(result.stdout) == (shown or views.model_dump(mode="json"))


PORT_KEYS = "name switch device mac vlan state path queue af_xdp reason counters"
QUEUE_KEYS = "nic id kind state cpu ports filters packets bytes drops"


def test_ports_have_the_keys_of_the_contract(cli: Offload, service: FakeService) -> None:
    web1, db1 = json.loads(cli("ports", "--json").stdout)
    assert [key for key in PORT_KEYS.split() if key not in web1] == []
    assert web1["queue"] == {"id": 1, "kind": "software", "cpu": 3, "state": "running"}
    assert web1["counters"]["rx"]["queue"] == {"packets": 1000, "bytes": 64000}
    assert web1["counters"]["tx"]["direct"] == {"packets": 400, "bytes": 40000}
    assert web1["counters"]["drops"]["ring_full"] == 4
    assert db1["queue"] is None
    assert db1["vlan"] == "10"


def test_queues_have_the_keys_of_the_contract(cli: Offload, service: FakeService) -> None:
    default, _ = json.loads(cli("queues", "--json").stdout)
    more = "since device rx_queue standing vlan_by drops_by_reason not_taken"
    assert set(default) == {*QUEUE_KEYS.split(), *more.split()}
    assert default["id"] == 0


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (
            "nics",
            [
                [
                    *("eth1", "igb", "native", "0123456789abcdef", "4", "hardware 2/7 (SR-IOV)"),
                    *("1", "1", "0", "miss 12, multicast 3", "-"),
                ]
            ],
        ),
        (
            "switches",
            [
                [
                    *("ext0", "external", "eth1", "kernel", "ext0-host VLAN 10 192.0.2.1/24"),
                    "rx local 5, bridge 6; tx local 7; dropped vlan 1",
                    "untagged: web1; 10: db1, host",
                    "from ports 500, from wire 15, to ports 13",
                    "-",
                ],
                [
                    *("lab0", "private", "-", "python (running, mirror; ring 3)"),
                    *("-", "-", "-", "0", "-"),
                ],
            ],
        ),
        (
            "queues",
            [
                ["eth1", "0", "default", "running", "-", "db1", "0", "15", "1500", "vlan 6"],
                ["eth1", "1", "software", "running", "3", "web1", "1", "1004", "64256", "ring_full 4"],
            ],
        ),
    ],
    ids=["nics", "switches", "queues"],
)
def test_tables_show_everything(
    command: str, rows: list[list[str]], cli: Offload, service: FakeService
) -> None:
    heading, *shown = cli(command).stdout.splitlines()
    assert heading.startswith(("NIC", "SWITCH"))
    assert [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in shown] == rows


@pytest.mark.parametrize(
    ("queues", "told"),
    [
        (HardwareQueues(how="rules", total=3, in_use=0, why=None), "hardware 0/3 (rules)"),
        (HardwareQueues(how=None, total=0, in_use=0, why="it has none"), "software"),
        (None, "-"),
    ],
    ids=["rules", "none", "no-uplink"],
)
def test_what_queues_a_nic_has_for_vms(
    queues: HardwareQueues | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.nics([NIC.model_copy(update={"hardware_queues": queues})])
    heading, row = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (heading, row)]
    assert (cells[0][5], cells[1][5]) == ("VM QUEUES", told)


def test_a_column_says_where_hardware_queues_are(cli: Offload, service: FakeService) -> None:
    service.queue_views = HARDWARE
    heading, *shown = (line.split("  ") for line in cli("queues").stdout.splitlines())
    cells = [[cell.strip() for cell in row if cell.strip()] for row in (heading, *shown)]
    assert [row[2:5] for row in cells] == [
        ["KIND", "WHERE", "STATE"],
        ["default", "-", "running"],
        ["hardware", "eth1v0 (VLAN 10 by the NIC)", "paused"],
        ["hardware", "RX 3 (not sorted there)", "set"],
    ]


def test_what_happened_to_queues_is_shown(cli: Offload, service: FakeService) -> None:
    shown = json.loads(cli("queues", "--events", "--json").stdout)
    assert shown == [event.model_dump(mode="json") for event in EVENTS]
    assert json.loads(cli("queues", "--events", "--nic", "eth1", "--json").stdout) == shown
    *_, last = cli("queues", "--events").stdout.splitlines()
    cells = ["2024-05-17 12:30:00 UTC", "eth1", "1", "web1", "moved web1 from CPU 2 to 3: 81 % -> 44 %"]
    assert re.split("  +", last.strip()) == cells
    assert cli("queues", "--events", "--nic", "eth9").exit_code == 2


def test_a_piped_table_is_neither_cut_nor_coloured(
    cli: Offload, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = cli("ports").stdout
    assert len(table.splitlines()) == 3
    assert "02:15:5d:00:00:02, 02:15:5d:00:00:03" in table
    assert "there is no device db1" in table
    assert "…" not in table
    assert "\x1b" not in table


def test_status_for_people(cli: Offload, service: FakeService) -> None:
    shown = cli("status").stdout
    for fact in ("4711", "/etc/offload/offload.yaml", "2, 1 active", "12.5 ms", STATUS.warnings[0]):
        assert fact in shown


def test_names_choose_what_is_shown(cli: Offload, service: FakeService) -> None:
    shown = json.loads(cli("ports", "db1", "web1", "--json").stdout)
    assert [port["name"] for port in shown] == ["db1", "web1"]
    assert len(json.loads(cli("queues", "--nic", "eth1", "--json").stdout)) == 2


@pytest.mark.parametrize(
    "arguments", [["ports", "web2"], ["nics", "eth9"], ["switches", "x"], ["queues", "--nic", "eth9"]]
)
def test_a_name_that_is_not_there_is_told(arguments: list[str], cli: Offload, service: FakeService) -> None:
    result = cli(*arguments, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"{arguments[-1]}: there is no such" in result.stderr


# Errors


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (OffloadError("failed"), 1),
        (ForeignError("eth1: has a program of xdp-filter"), 1),
        (UsageError("web1: is in the config file"), 2),
        (ConfigError([Problem("a.b", "1", "must be 2"), Problem("c", "", "is missing")], "x.yaml"), 2),
        (UnsupportedError("this kernel has no VLAN filtering"), 3),
        (PrivilegeError("CAP_BPF is missing"), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_daemon_s_errors_keep_message_and_exit_code(
    error: OffloadError, exit_code: int, cli: Offload, service: FakeService
) -> None:
    service.refusal = error
    result = cli("ports", "--json")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr == f"{error}\n"


def test_without_a_daemon_the_remedy_is_told(tmp_path: Path) -> None:
    with leaked_sockets():
        result = CliRunner().invoke(main, ["ports", "--run-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert str(tmp_path / "api.sock") in result.stderr
    assert "offload run --config FILE" in result.stderr


def test_an_unexpected_error_is_one_line(cli: Offload, operate: SimpleNamespace) -> None:
    def plan(*_: object) -> Outcome:
        raise ZeroDivisionError("first\nsecond")

    operate.plan = plan
    result = cli("plan")
    assert result.exit_code == 1
    assert result.stderr == "offload: unexpected ZeroDivisionError: first (--debug shows where)\n"
    assert "Traceback" in cli("plan", "--debug").stderr
    assert "Traceback" in cli("--debug", "plan").stderr


# Configs


def test_a_good_config_is_called_good(cli: Offload, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    result = cli("check", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: good\n")
    assert cli("check", "-", input=GOOD).stdout == "stdin: good\n"


def test_every_problem_has_a_line_with_file_path_and_what_is_allowed(cli: Offload, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD + "ports: {p: {switch: ext0, device: a/b, mac: auto, wieght: 1}}\nfoo: 1\n")
    result = cli("check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith(f"{file}: ") for line in lines)
    assert any("ports.p.wieght" in line for line in lines)
    as_json = cli("check", str(file), "--json")
    verdict = json.loads(as_json.stdout)
    assert (verdict["valid"], verdict["exit_code"], as_json.exit_code) == (False, 2, 2)
    assert "ports.p.wieght" in [problem["path"] for problem in verdict["problems"]]


def test_warnings_of_a_config_go_to_stderr(cli: Offload) -> None:
    text = GOOD.replace("xdp_mode: native", "queues: {cpus: [0], rebalance: true}")
    result = cli("check", "-", "--json", input=text)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["warnings"]
    assert result.stderr.startswith("warning: stdin: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "not UTF-8"),
        (b"#" * (MAX_CONFIG + 1), "longer than"),
        (None, "cannot be read: No such file"),
        ("directory", "cannot be read: Is a directory"),
    ],
    ids=["not-utf8", "too-long", "absent", "directory"],
)
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | str | None, said: str, cli: Offload, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    result = cli("check", str(file))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{file}: {said}")


def test_a_file_that_may_not_be_read_is_a_missing_privilege(cli: Offload, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(GOOD)
    file.chmod(0)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        result = cli("check", str(file))
    finally:
        os.seteuid(mine)
    assert result.exit_code == 4
    assert f"{file}: may not be read" in result.stderr


# Changes


def test_apply_says_what_was_changed(cli: Offload, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(GOOD)
    service.warnings = ["db1: there is no such device yet"]
    result = cli("apply", os.path.relpath(file))
    assert result.exit_code == 0
    assert result.stdout == (
        "+ put web1 into the bridge off-ext0\n~ set web1 up\n- remove the filter of db1\n3 changes made\n"
    )
    assert result.stderr == "warning: db1: there is no such device yet\n"
    assert service.calls == [
        ("apply", GOOD, str(Path(os.path.relpath(file)).absolute()), False, DEFAULT_WITHIN)
    ]


def test_a_dry_run_says_would(cli: Offload, service: FakeService) -> None:
    result = cli("apply", "--dry-run", "-", input=GOOD)
    assert result.stdout.endswith("3 changes would be made\n")
    assert service.calls == [("apply", GOOD, "stdin", True, DEFAULT_WITHIN)]


def test_nothing_to_change(cli: Offload, service: FakeService) -> None:
    service.changes = []
    assert cli("apply", "-", input=GOOD).stdout == "nothing to change\n"


def test_apply_tells_of_a_takeover_that_waits(cli: Offload, service: FakeService) -> None:
    service.takeover = TAKEOVER
    result = cli("apply", "--confirm-within", "90", "-", input=GOOD)
    assert result.stderr == (
        "192.0.2.1/24 of eth1 taken over: this goes back in 60 s unless you run `offload confirm`\n"
    )
    assert service.calls == [("apply", GOOD, "stdin", False, 90.0)]


@pytest.mark.parametrize("seconds", ["4.9", "86401", "soon"])
def test_there_are_limits_to_the_time_for_confirmation(cli: Offload, seconds: str) -> None:
    assert cli("apply", "--confirm-within", seconds, "-", input=GOOD).exit_code == 2


def test_confirm_says_what_was_kept(cli: Offload, service: FakeService) -> None:
    assert cli("confirm").stdout == "kept: 192.0.2.1/24 of eth1 taken over\n"
    assert json.loads(cli("confirm", "--json").stdout) == TAKEOVER.model_dump(mode="json")


def test_confirm_without_one_that_waits(cli: Offload, service: FakeService) -> None:
    service.refusal = UsageError("no takeover waits")
    result = cli("confirm")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "no takeover waits\n")


def test_rollback_says_what_was_changed(cli: Offload, operate: SimpleNamespace) -> None:
    operate.roll_back = lambda _paths: Outcome(changes=CHANGES[:1], warnings=[])
    assert cli("rollback").stdout.endswith("1 change made\n")


def test_plan_is_shown_like_a_difference(cli: Offload, operate: SimpleNamespace, tmp_path: Path) -> None:
    asked: list[object] = []

    def plan(*arguments: object) -> Outcome:
        asked.append(arguments)
        return Outcome(changes=CHANGES[:1], warnings=[])

    operate.plan = plan
    directories = ["--run-dir", "/a", "--state-dir", "/b", "--pin-dir", "/c"]
    assert cli("plan", "-", *directories, input=GOOD).stdout == (
        "+ put web1 into the bridge off-ext0\n1 change would be made\n"
    )
    document = json.loads(cli("plan", "--json", *directories).stdout)
    assert document["changes"][0]["text"] == CHANGES[0].text
    paths = Paths(Path("/a"), Path("/b"), Path("/c"))
    assert asked == [(GOOD, "stdin", paths), (None, "config", paths)]


@pytest.mark.parametrize("everything", [False, True])
def test_detach_hands_its_argument_on(everything: bool, cli: Offload, operate: SimpleNamespace) -> None:
    asked: list[object] = []

    def detach(_paths: Paths, asked_everything: bool) -> Outcome:
        asked.append(asked_everything)
        return Outcome(changes=[], warnings=[])

    operate.detach = detach
    assert cli("detach", *["--all"] * everything).exit_code == 0
    assert asked == [everything]


def test_doctor_shows_findings_and_remedies(cli: Offload, operate: SimpleNamespace) -> None:
    finding = Finding("cap_bpf", "fail", "host", "CAP_BPF is missing", "run as root")
    operate.doctor = lambda _paths, _probe: Report((finding,))
    result = cli("doctor")
    assert result.stdout == "fail  host: CAP_BPF is missing\n      remedy: run as root\n"
    document = json.loads(cli("doctor", "--json").stdout)
    assert document["level"] == "fail"
    assert document["findings"][0]["check"] == "cap_bpf"


def test_run_hands_config_and_paths_on(cli: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def run(*arguments: object) -> int:
        asked.append(arguments)
        return 3

    fake = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "offload.daemon", fake)
    monkeypatch.setattr(offload, "daemon", fake, raising=False)
    assert cli("run", "--config", "x.yaml", "--run-dir", "/a").exit_code == 3
    assert asked == [(Path("x.yaml"), Paths(run_dir=Path("/a")))]


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ([], {}),
        (["--mac", "auto"], {"mac": "auto"}),
        (
            ["--mac", "02:15:5d:00:00:01", "--mac", "02:15:5d:00:00:02"],
            {"mac": ["02:15:5d:00:00:01", "02:15:5d:00:00:02"]},
        ),
        (["--vlan", "10"], {"vlan": 10}),
        (["--vlan", "none"], {"vlan": None}),
        (["--vlan", "trunk:10,20-22/native:1"], {"vlan": {"trunk": [10, "20-22"], "native": 1}}),
        (["--cpu", "2"], {"cpu": 2}),
        (["--cpu", "auto"], {"cpu": "auto"}),
        (["--queue", "off", "--weight", "0"], {"queue": "off", "weight": 0}),
        (["--delivery", "gro"], {"delivery": "gro"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_port_add_sends_only_what_was_given(
    options: list[str], spec: dict[str, object], cli: Offload, service: FakeService
) -> None:
    result = cli("port", "add", "web1", "--switch", "ext0", "--device", "web1", *options, "--keep")
    assert result.exit_code == 0, result.stderr
    (call,) = service.calls
    assert call[:2] == ("port_add", "web1")
    sent = dict(call[2])  # type: ignore[call-overload] # the fake keeps arguments as objects
    assert sent.pop("switch") == "ext0"
    assert sent.pop("device") == "web1"
    assert sent == spec
    assert call[3:] == (True, False)


def test_guards_are_switched_by_name(cli: Offload, service: FakeService) -> None:
    cli("port", "set", "web1", "--allow", "dhcp_server", "--deny", "mac_spoofing")
    spec = {"allow": {"dhcp_server": True, "mac_spoofing": False}}
    assert service.calls == [("port_set", "web1", spec, False)]
    assert cli("port", "set", "web1", "--allow", "dhcp_server", "--deny", "dhcp_server").exit_code == 2


def test_port_set_and_remove(cli: Offload, service: FakeService) -> None:
    assert cli("port", "set", "web1", "--cpu", "3", "--dry-run").exit_code == 0
    assert cli("port", "remove", "web1").exit_code == 0
    assert service.calls == [("port_set", "web1", {"cpu": 3}, True), ("port_remove", "web1", False)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["port", "add", "web1", "--switch", "ext0"], "--device"),
        (["port", "add", "web1"], "--switch and --device"),
        (["port", "set", "web1"], "at least one option"),
        (["port", "set", "web1", "--weight", "101"], "0<=x<=100"),
        (["port", "set", "web1", "--vlan", "4095"], "4095"),
        (["port", "set", "web1", "--vlan", "trunk:x"], "trunk:x"),
        (["port", "set", "web1", "--queue", "best"], "best"),
        (["run"], "--config"),
        (["frobnicate"], "frobnicate"),
        (["completion", "csh"], "csh"),
    ],
    ids=" ".join,
)
def test_bad_usage_reaches_no_daemon(
    arguments: list[str], said: str, cli: Offload, service: FakeService
) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert service.calls == []


# Help and completion


@pytest.mark.parametrize("command", [*commands(main)], ids=" ".join)
def test_help_says_what_it_does_and_how_it_ends(command: tuple[str, ...], cli: Offload) -> None:
    shown = cli(*command, "--help").stdout
    assert "Exit codes:" in shown
    if command != ("port",):
        assert "Example" in shown
        assert f"offload {' '.join(command)}" in shown


def test_the_list_of_commands_is_not_cut(cli: Offload) -> None:
    assert "..." not in cli("--help").stdout.replace("[ARGS]...", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_offload(shell: str, cli: Offload) -> None:
    assert f"_OFFLOAD_COMPLETE={shell}_complete" in cli("completion", shell).stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("offload po", ["port", "ports"]),
        ("offload ports ", ["web1", "db1"]),
        ("offload port remove w", ["web1"]),
        ("offload port add x --switch ", ["ext0", "lab0"]),
        ("offload queues --nic ", ["eth1"]),
        ("offload port set web1 --queue s", ["software"]),
    ],
)
def test_completion_offers(
    words: str, offered: list[str], cli: Offload, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete(monkeypatch, cli, words) == offered


def test_completion_is_silent_without_a_daemon(
    cli: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaked_sockets():
        assert complete(monkeypatch, cli, f"offload ports --run-dir {tmp_path} ") == []


def complete(monkeypatch: pytest.MonkeyPatch, cli: Offload, words: str) -> list[str]:
    """What a bash would be offered behind ``words``."""
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    monkeypatch.setenv("_OFFLOAD_COMPLETE", "bash_complete")
    result = cli(prog_name="offload")
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.removeprefix("plain,") for line in result.stdout.splitlines() if line]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, offload.cli\n"
        "offload.cli.main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('httpx', 'pydantic', 'rich', 'fastapi', 'asyncio', 'ruamel', 'pyroute2')"
        " if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
