"""``deploy/demo.sh`` as its user meets it: what it shows, how it ends, that nothing is left. Needs root."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.kernel.host import online_cpus

ROOT = Path(__file__).resolve().parents[2]
VMS = ("web1", "web2", "db1", "app1")
PLACES = (
    *("/run/demo", "/run/offload", "/var/lib/offload", "/sys/fs/bpf/offload", "/sys/fs/bpf/v1"),
    *(f"/run/netns/{name}" for name in ("peer", "host", *VMS)),
)
ROW = re.compile(r"^ +(\w+) +(queue|bridge) +(\S+) +([\d,]+) +([\d,]+) +\d+ +[\d.]+ Gbit/s", re.MULTILINE)
FIRST_VM_DONE = "    web1  queue"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("privilege")]


@contextmanager
def demo() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A demo that runs, and the mark that its processes carry; nothing of it may be there at the end."""
    mark = f"OFFLOAD_TEST_MARK={uuid.uuid4()}"
    before = _there()
    with subprocess.Popen(
        [ROOT / "deploy/demo.sh"],
        env=os.environ | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process, mark
        finally:
            process.kill()
    assert _processes(mark) == {}
    assert _there() == before


def _there() -> set[str]:
    """Files that a demo could leave on this machine, and its network devices."""
    return {*(place for place in PLACES if os.path.exists(place)), *os.listdir("/sys/class/net")}


def _processes(mark: str) -> dict[int, str]:
    """Command lines of the processes with ``mark`` in their environment, by process id."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or even root may not look: none that we started
    return found


def _stop_after_first_vm(stop: Callable[[subprocess.Popen[str], str], None]) -> tuple[int, str]:
    """Run a demo, call ``stop`` once the first VM has its traffic; exit code, and what was printed since."""
    with demo() as (process, mark):
        assert process.stdout is not None
        printed = ""
        while not (line := process.stdout.readline()).startswith(FIRST_VM_DONE):
            if not line:
                pytest.fail(f"the demo never got to its traffic: {printed}")
            printed += line
        stop(process, mark)
        rest = process.stdout.read()
        return process.wait(), rest


def test_every_vm_is_shown_in_a_queue_and_then_on_the_bridge() -> None:
    with demo() as (process, _):
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    rows = ROW.findall(printed)
    assert [row[:2] for row in rows] == [(vm, path) for vm in VMS for path in ("queue", "bridge")], printed
    cpus = set()
    for _, path, cpu, by_queue, by_bridge in rows:
        queued, bridged = (int(figure.replace(",", "")) for figure in (by_queue, by_bridge))
        if path == "queue":
            assert queued > 1000 > bridged
            cpus.add(int(cpu))
        else:
            assert bridged > 1000
            assert (queued, cpu) == (0, "-")
    assert cpus == set(online_cpus()[: len(VMS)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_in_the_middle_takes_everything_down(number: signal.Signals) -> None:
    code, printed = _stop_after_first_vm(lambda process, _: process.send_signal(number))
    assert code == 128 + number
    assert "interrupted" in printed


def test_a_failure_in_the_middle_takes_everything_down() -> None:
    def kill_servers(_: subprocess.Popen[str], mark: str) -> None:
        for pid, command in _processes(mark).items():
            if command.startswith("iperf3 --server"):
                os.kill(pid, signal.SIGKILL)

    code, printed = _stop_after_first_vm(kill_servers)
    assert code == 1
    assert "iperf3 to web2" in printed
