"""What a Python bridge is told, and whether its process runs. Files and locks only: no privileges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offload.bridge.membership import Configured, Member, Membership, load
from offload.errors import ConfigError
from offload.kernel import pybridge
from offload.paths import Paths

DEVICES = (
    (1, "eth1", "uplink", (0, 10), True, (), False),
    (0, "web1", "port", (10,), False, ("02:15:5d:00:00:01",), False),
)
ROSTER = (DEVICES, json.dumps([{"name": "mirror", "file": "/tmp/web1.pcapng"}]))

HOLD = """
import sys
from pathlib import Path
from offload.bridge.supervisor import alone
with alone(Path(sys.argv[1]), "ext0"):
    print("held", flush=True)
    sys.stdin.read()
"""

LINGER = """
import signal, sys, time
from pathlib import Path
from offload.bridge.supervisor import alone
def end(*_):
    time.sleep(0.3)
    Path(sys.argv[1], "ended").touch()
    sys.exit(1)
with alone(Path(sys.argv[1]), "ext0"):
    signal.signal(signal.SIGTERM, end)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(run_dir=tmp_path / "run")


def test_a_roster_is_read_as_it_was_written(paths: Paths) -> None:
    assert pybridge.rosters(paths) == {}
    pybridge.write_roster(paths, "ext0", ROSTER)
    (paths.bridges / "ext0.stats.json").write_text("{}")  # what the process tells is no roster
    assert pybridge.rosters(paths) == {"ext0": ROSTER}
    document = json.loads((paths.bridges / "ext0.json").read_text())
    assert (document["version"], document["switch"], document["inner"]) == (1, "ext0", "ext0-py")
    assert all(member["learn"] for member in document["members"])
    assert document["extensions"] == [{"name": "mirror", "file": "/tmp/web1.pcapng"}]


def test_a_roster_that_no_bridge_could_read_leaves_the_old_one(paths: Paths) -> None:
    pybridge.write_roster(paths, "ext0", ROSTER)
    with pytest.raises(ConfigError, match="belongs to members"):
        pybridge.write_roster(paths, "ext0", (DEVICES * 2, ROSTER[1]))
    assert pybridge.rosters(paths) == {"ext0": ROSTER}


def test_the_process_is_told_what_the_controller_means(paths: Paths) -> None:
    pybridge.write_roster(paths, "ext0", ROSTER)
    assert load(paths.run_dir, "ext0") == Membership(
        "ext0",
        "ext0-py",
        (
            Member(1, "eth1", "uplink", frozenset({0, 10}), learn=True, flood=True),
            Member(0, "web1", "port", frozenset({10}), learn=True, macs=("02:15:5d:00:00:01",)),
        ),
        (Configured("mirror", {"file": "/tmp/web1.pcapng"}),),
    )


def test_who_reads_while_a_roster_is_replaced_reads_the_old_one(paths: Paths) -> None:
    pybridge.write_roster(paths, "ext0", ROSTER)
    with (paths.bridges / "ext0.json").open() as reading:
        pybridge.write_roster(paths, "ext0", ((), "[]"))
        assert len(json.load(reading)["members"]) == len(DEVICES)
    assert pybridge.rosters(paths) == {"ext0": ((), "[]")}


def test_a_removed_roster_leaves_nothing(paths: Paths) -> None:
    pybridge.write_roster(paths, "ext0", ROSTER)
    (paths.bridges / "ext0.stats.json").write_text("{}")
    for _ in range(2):
        pybridge.write_roster(paths, "ext0", None)
        assert list(paths.bridges.iterdir()) == []


def test_a_process_runs_while_it_holds_its_lock(paths: Paths) -> None:
    assert not pybridge.running(paths, "ext0")
    command = [sys.executable, "-c", HOLD, str(paths.run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert pybridge.running(paths, "ext0")
        assert paths.bridge_lock("ext0").read_text() == str(process.pid)
        pybridge.stop(paths, "ext0")
        assert process.wait(5) != 0
    assert not pybridge.running(paths, "ext0")
    assert not paths.bridge_lock("ext0").exists()


def test_stopping_what_does_not_run_is_done(paths: Paths) -> None:
    pybridge.stop(paths, "ext0")


def test_stopping_waits_for_the_end(paths: Paths) -> None:
    command = [sys.executable, "-c", LINGER, str(paths.run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        pybridge.stop(paths, "ext0")
        assert (paths.run_dir / "ended").exists()
