"""The files of a Python bridge: its membership, its state, its systemd unit."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.bridge import state
from offload.bridge.__main__ import main
from offload.bridge.membership import (
    Configured,
    FloodLimit,
    Member,
    Membership,
    load,
    membership_file,
    parse,
    render,
    write,
)
from offload.bridge.state import BridgeState, ExtensionState, MemberState, Restarts, StationState
from offload.bridge.supervisor import alone
from offload.errors import ConfigError, OffloadError

ROOT = Path(__file__).resolve().parents[2]
WEB1 = Member(3, "web1", "port", frozenset({0, 10}), False, True, ("02:15:5d:00:00:01",), True)
FULL = Membership(
    "ext0",
    "ext0-py",
    (WEB1, Member(4, "uplink:eth1", "uplink", frozenset({0}), learn=True, flood=True)),
    (Configured("mirror", {"file": "/x.pcapng", "members": ["web1"]}),),
    FloodLimit(10, 20),
    60,
    128,
)


def document(**changes: Any) -> str:
    return json.dumps(json.loads(render(FULL)) | changes)


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "name": "a",
        "role": "port",
        "vids": [0],
        "learn": True,
        "flood": True,
        "macs": [],
    } | changes


def test_a_membership_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, FULL)
    assert load(tmp_path, "ext0") == FULL
    assert [file.name for file in (tmp_path / "bridges").iterdir()] == ["ext0.json"]


def test_what_may_be_left_out_has_defaults() -> None:
    text = json.dumps({"version": 1, "switch": "s", "inner": "s-py", "members": []})
    assert parse(text) == Membership("s", "s-py")


WRONG = [
    pytest.param({"version": 2}, ["version: 2: must be 1"], id="version"),
    pytest.param({"inner": ""}, ['inner: "": must be a text'], id="inner"),
    pytest.param({"memebrs": []}, ["file.memebrs: unknown key"], id="unknown key"),
    pytest.param({"members": {}}, ["members: {}: must be a list"], id="no list"),
    pytest.param(
        {"members": [7]},
        ["members[0]: 7: must be an object", "members[0].id: null", "members[0].name: null"],
        id="no object",
    ),
    pytest.param({"members": [entry(id=65536)]}, ["members[0].id: 65536: must be a number from 0"], id="id"),
    pytest.param(
        {"members": [entry(id=True)]}, ["members[0].id: true: must be a number from 0"], id="id no number"
    ),
    pytest.param({"members": [entry(vids=[4095])]}, ["members[0].vids[0]: 4095: must be"], id="VID"),
    pytest.param(
        {"members": [entry(macs=["01:00:5e:00:00:01"])]}, ["members[0].macs[0]"], id="group address"
    ),
    pytest.param({"members": [entry(macs=["02:AA:00:00:00:01"])]}, ["members[0].macs[0]"], id="capitals"),
    pytest.param({"members": [entry(learn="yes")]}, ['members[0].learn: "yes": must be true'], id="flag"),
    pytest.param({"members": [entry(role="vm")]}, ['members[0].role: "vm": must be port | host'], id="role"),
    pytest.param({"ageing": 0}, ["ageing: 0: must be a number, 1 or more"], id="ageing"),
    pytest.param({"flood_limit": {"rate": -1}}, ["flood_limit.rate: -1: must be"], id="rate"),
    pytest.param({"extensions": [{"file": "x"}]}, ["extensions[0].name: null: must be"], id="extension"),
    pytest.param(
        {"members": [entry(), entry(id=1, name="b"), entry(id=2)]},
        ["members[1].id: 1: belongs to members[0]", "members[2].name: a: belongs to members[0]"],
        id="twice",
    ),
    pytest.param(
        {"members": [entry(macs=["02:00:00:00:00:0a"]), entry(id=2, name="b", macs=["02:00:00:00:00:0a"])]},
        ["members[1].macs: 02:00:00:00:00:0a in VLAN 0: belongs to members[0]"],
        id="address twice",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_is_wrong_is_named_with_path_value_and_what_is_allowed(
    changes: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(document(**changes), "FILE")
    assert len(caught.value.problems) == len(said)
    for line, expected in zip(str(caught.value).splitlines(), said, strict=True):
        assert line.startswith(f"FILE: {expected}")


def test_an_address_may_be_in_two_vlans() -> None:
    mac = "02:00:00:00:00:0a"
    members = [entry(vids=[10], macs=[mac]), entry(id=2, name="b", vids=[20], macs=[mac])]
    assert len(parse(document(members=members)).members) == 2


def test_the_file_must_be_of_the_switch(tmp_path: Path) -> None:
    write(tmp_path, FULL)
    membership_file(tmp_path, "ext0").rename(membership_file(tmp_path, "int0"))
    with pytest.raises(ConfigError, match="must be int0"):
        load(tmp_path, "int0")
    with pytest.raises(FileNotFoundError):
        load(tmp_path, "ext0")


@pytest.mark.parametrize("name", ["", "../x", "-x", "a/b", "x" * 64])
def test_a_switch_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        membership_file(tmp_path, name)
    with pytest.raises(ConfigError), alone(tmp_path, name):
        pass
    assert list(tmp_path.iterdir()) == []


STATE = BridgeState(
    switch="ext0",
    pid=7,
    written=1000.5,
    inner="ext0-py",
    bound=True,
    config_error="",
    restarts=Restarts(1, 2, 3),
    drops={"ring": 5},
    members=tuple(MemberState(number, f"m{number}", 1, 2, 3, 4, {"vlan": number}) for number in range(300)),
    extensions=(ExtensionState("mirror", "off", "why", 1, 2, 3, 4, {"copies": 5}),),
    stations=(
        StationState("02:00:00:00:ff:ff", 0, "m2", None),
        *(StationState(f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}", 10, "m1", 1.5) for n in range(700)),
    ),
)


def test_a_state_is_read_as_it_was_written_and_appears_at_once(tmp_path: Path) -> None:
    (tmp_path / "bridges").mkdir()
    with pytest.raises(FileNotFoundError):
        state.read(tmp_path, "ext0")
    steps = 0
    for _ in state.write(tmp_path, STATE, STATE.stations):
        assert not state.state_file(tmp_path, "ext0").exists()
        steps += 1
    assert steps > 10, "it is written in many small steps, between which frames are switched"
    assert state.read(tmp_path, "ext0") == STATE


def test_a_state_that_makes_no_sense_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bridges").mkdir()
    file = state.state_file(tmp_path, "ext0")
    for text in ("{", "{}", '{"version": 9}', '{"version": 1, "restarts": {}}'):
        file.write_text(text)
        with pytest.raises(OffloadError, match=r"ext0\.stats\.json"):
            state.read(tmp_path, "ext0")


def test_an_old_state_is_of_a_bridge_that_does_not_run() -> None:
    assert not STATE.running
    assert replace(STATE, written=time.time() - 1).running


def test_help_and_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "4  a privilege is missing" in capsys.readouterr().out
    for arguments in ([], ["--ring", "0", "ext0"], ["--ring", "x", "ext0"], ["../ext0"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_what_is_installed_fits_the_unit_and_the_extensions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["offload-bridge"] == "offload.bridge.__main__:main"
    for target in project["entry-points"]["offload.extensions"].values():
        module, _, name = target.partition(":")
        assert f"class {name}(Extension)" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = (ROOT / "deploy/systemd/offload-bridge@.service").read_text()
    assert "CapabilityBoundingSet=CAP_NET_RAW\n" in text
    unit = tmp_path / "offload-bridge@.service"
    unit.write_text(text.replace("/usr/local/bin/offload-bridge", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert "offload-bridge" not in verified.stderr
