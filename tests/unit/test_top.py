"""``offload top``: rates between two looks, and what a terminal and a pipe get of them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from offload.cli import main
from offload.client import NoDaemonError
from offload.kernel.cpus import Ticks
from offload.tables import _fitted
from offload.top import Look, between, follow, ordered
from offload.views import Counters, PortView, QueueView, Rate, TopView, Traffic
from tests.unit.fake_service import DB1, QUEUES, WEB1, FakeService, served

BEFORE = Look(
    10.0,
    {view.name: view for view in (WEB1, DB1)},
    {(view.nic, view.id): view for view in QUEUES},
    {0: Ticks(1000, 500, 100), 3: Ticks(1000, 500, 100), 7: Ticks(1, 1, 1)},
)


def grown(view: PortView, packets: int, octets: int = 0, ring_full: int = 4) -> PortView:
    """WEB1 with so many frames by its queue, and drops."""
    rx = {**view.counters.rx, "queue": Traffic(packets=packets, bytes=octets)}
    drops = {**view.counters.drops, "ring_full": ring_full}
    return view.model_copy(update={"counters": Counters(rx=rx, tx=view.counters.tx, drops=drops)})


def later(port: PortView, seconds: float = 2.0, **changed: object) -> Look:
    """The look after ``BEFORE``, with WEB1 as ``port``."""
    after = replace(BEFORE, at=BEFORE.at + seconds, ports={**BEFORE.ports, "web1": port})
    return replace(after, **changed)  # type: ignore[arg-type]


def test_rates_are_of_what_came_between() -> None:
    queue = QUEUES[1].model_copy(
        update={"packets": 2004, "bytes": 128256, "drops_by_reason": {"ring_full": 10, "vlan": 0}}
    )
    cpus = {0: Ticks(1200, 550, 120), 3: Ticks(1200, 690, 260)}
    view = between(
        BEFORE,
        later(grown(WEB1, 3000, 192000, 10), queues={("eth1", 0): QUEUES[0], ("eth1", 1): queue}, cpus=cpus),
    )
    assert view.seconds == 2
    web1, db1 = view.ports
    assert (web1.name, web1.queue, web1.cpu) == ("web1", 1, 3)
    assert web1.rx["queue"] == Rate(packets=1000, bytes=64000)
    assert web1.rx["bridge"] == Rate(packets=0, bytes=0)
    assert web1.drops == {"ring_full": 3}
    assert (db1.queue, db1.cpu, db1.rx, db1.drops) == (None, None, {}, {})
    default, mine = view.queues
    assert (default.rate.packets, default.drops) == (0, {})
    assert (mine.rate, mine.drops) == (Rate(packets=500, bytes=32000), {"ring_full": 3})
    assert [(one.cpu, one.busy, one.softirq, one.queues) for one in view.cpus] == [
        (0, 0.25, 0.1, []),
        (3, 0.95, 0.8, ["eth1/1"]),
    ]


def test_what_counts_anew_has_begun_at_nought() -> None:
    assert between(BEFORE, later(grown(WEB1, 600))).ports[0].rx["queue"].packets == 300
    new = replace(BEFORE, ports={"db1": DB1}, queues={})
    view = between(new, later(WEB1))
    assert view.ports[0].rx["queue"].packets == 500
    assert view.queues[1].rate.packets == 502


def test_names_leave_others_out() -> None:
    view = between(BEFORE, later(WEB1), ["web1"])
    assert [port.name for port in view.ports] == ["web1"]
    assert [queue.id for queue in view.queues] == [1]


@pytest.mark.parametrize(
    ("by", "first"), [("rate", "web1"), ("bytes", "db1"), ("drops", "db1"), ("name", "db1")]
)
def test_order(by: str, first: str) -> None:
    db1 = DB1.model_copy(
        update={
            "counters": Counters(
                rx={"queue": Traffic(packets=2, bytes=10**9)}, tx={}, drops={"ring_full": 50}
            )
        }
    )
    after = later(grown(WEB1, 3000), ports={"web1": grown(WEB1, 3000), "db1": db1})
    view = ordered(between(BEFORE, after), by)  # type: ignore[arg-type]
    assert view.ports[0].name == first
    assert {port.name for port in view.ports} == {"web1", "db1"}


def test_a_daemon_that_is_started_anew_is_waited_for() -> None:
    class Restarted:
        asked = 0

        def ports(self) -> list[PortView]:
            self.asked += 1
            if self.asked == 2:
                raise NoDaemonError("nobody answers")
            return [grown(WEB1, 1000 * self.asked)]

        def queues(self) -> list[QueueView]:
            return []

    waits = iter([True, True, True, False])
    lost, found = follow(Restarted(), (), lambda: next(waits), patient=True)
    assert isinstance(lost, NoDaemonError)
    assert isinstance(found, TopView)
    assert found.ports[0].rx["queue"].packets * found.seconds == pytest.approx(1000)
    with pytest.raises(NoDaemonError):
        list(follow(Restarted(), (), lambda: True))


# As a command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a served service. Scope: this module."""
    directory = tmp_path_factory.mktemp("run")
    with served(FakeService(), directory / "api.sock"):
        yield directory


@pytest.fixture
def top(run_dir: Path) -> Callable[..., tuple[int, str, str]]:
    """Run ``offload top`` with these arguments: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        words = ["top", *arguments, "--interval", "0.1", "--run-dir", str(run_dir)]
        result = CliRunner().invoke(main, words)
        return result.exit_code, result.stdout, result.stderr

    return run


def test_json_is_one_look(top: Callable[..., tuple[int, str, str]]) -> None:
    status, said, complaint = top("--json", "web1")
    assert (status, complaint) == (0, "")
    view = TopView.model_validate(json.loads(said))
    assert view.seconds >= 0.1
    assert [port.name for port in view.ports] == ["web1"]
    assert view.cpus


def test_elsewhere_than_on_a_terminal_each_look_is_printed(top: Callable[..., tuple[int, str, str]]) -> None:
    status, said, complaint = top("--count", "2")
    assert (status, complaint) == (0, "")
    assert said.count("RX FRAMES/S") == said.count("SOFTIRQ") == 2
    assert said.count("\nweb1 ") == 2
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("web9",), "web9: there is no such port"),
        (("--json", "--count", "2"), "one document"),
        (("--sort", "size"), "size"),
        (("--count", "0"), "0"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], words: str, top: Callable[..., tuple[int, str, str]]) -> None:
    status, said, complaint = top(*arguments)
    assert (status, said) == (2, "")
    assert words in complaint


class Terminal:
    """``offload top`` on a terminal of so many lines."""

    def __init__(self, run_dir: Path, lines: int) -> None:
        self._end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 160, 0, 0))
        self._settings = termios.tcgetattr(self._end)
        words = (sys.executable, "-m", "offload", "top", "--interval", "0.2", "--run-dir", run_dir)
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            words, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        self.said = ""

    def read_until(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in self.said:
            assert select.select([self._end], [], [], end - time.monotonic())[0], self.said
            self.said += os.read(self._end, 1 << 16).decode()

    def press(self, key: str) -> None:
        os.write(self._end, key.encode())

    def is_as_it_was(self) -> bool:
        return termios.tcgetattr(self._end) == self._settings

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(run_dir: Path) -> Iterator[Terminal]:
    """See ``Terminal``; of 24 lines. Scope: one test."""
    opened = Terminal(run_dir, 24)
    yield opened
    opened.close()


LEFT = "\x1b[?1049l"
"""What makes a terminal show again what was there before."""


@pytest.mark.parametrize("key", ["q", None])
def test_a_terminal_is_drawn_on_and_left_as_it_was(terminal: Terminal, key: str | None) -> None:
    terminal.read_until("web1")
    assert "q to quit" in terminal.said
    if key:
        terminal.press(key)
    else:
        os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.read_until(LEFT)
    assert terminal.process.wait(10) == 0
    assert terminal.is_as_it_was()
    assert "Aborted" not in terminal.said


@pytest.mark.parametrize("height", [24, 50])
def test_what_has_no_room_is_counted(height: int) -> None:
    ports = {name: WEB1.model_copy(update={"name": name}) for name in map("vm{}".format, range(100))}
    cpus = {number: Ticks(0, 0, 0) for number in range(64)}
    before = replace(BEFORE, ports={}, cpus=cpus)
    after = later(WEB1, ports=ports, cpus={number: Ticks(100, number, 0) for number in cpus})
    console = Console(width=200, height=height)
    with console.capture() as captured:
        console.print(_fitted(between(before, after), height))
    lines = captured.get().splitlines()
    assert len(lines) <= height
    assert any(line.split()[:2] == ["63", "63%"] for line in lines)  # the busiest of all
    shown = sum(line.startswith("vm") for line in lines)
    assert shown >= height // 4
    assert f"and {100 - shown} more ports" in lines
