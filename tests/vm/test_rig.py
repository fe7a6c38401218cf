"""The rig itself: what a machine answers, how it fails, and which skips are excused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.vm import archive, emulator, suites, worker
from tests.vm.image import closure
from tests.vm.kernels import KERNELS, Kernel
from tests.vm.machine import Machine, MachineError, NoAnswerError, Result
from tests.vm.nics import Nic
from tests.vm.suites import Failed, Job, Suites
from tests.vm.test_kernels import Outcome

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="short">the whole text</failure></testcase>
<testcase classname="tests.a" name="three"><error message="no text"/></testcase>
<testcase classname="tests.a" name="four"><skipped message="Linux before 6.3 does not tell"/></testcase>
<testcase classname="tests.a" name="five"><skipped message="somebody felt like it"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def machine(privilege: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the first kernel, on a tree of one file. Scope: one module."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "here").write_text("as it is now")
    with Machine(next(iter(KERNELS.values())), tree) as machine:
        yield machine


@pytest.mark.vm
def test_a_command_s_output_and_exit_code(machine: Machine) -> None:
    result = machine.run(
        "bash", "-c", "cat here; echo complaint >&2; echo $WORD; exit 3", env={"WORD": "said"}
    )
    assert (result.stdout, result.stderr, result.exit_code) == ("as it is nowsaid\n", "complaint\n", 3)
    assert machine.run("no-such-command").exit_code == 127
    assert machine.run("uname", "-r").stdout.startswith(f"{machine.kernel.name}.")


@pytest.mark.vm
def test_a_long_output_is_whole(machine: Machine) -> None:
    assert machine.run("seq", "100000").stdout == "".join(f"{number}\n" for number in range(1, 100001))


@pytest.mark.vm
def test_what_the_tests_need_is_inside(machine: Machine) -> None:
    """The venv, bcc, and a bridge that filters VLANs: what these machines are for."""
    assert machine.run("python", "-c", "import bcc, pyroute2, pytest").exit_code == 0
    made = machine.run("ip", "link", "add", "bridge0", "type", "bridge", "vlan_filtering", "1")
    assert (made.exit_code, made.stderr) == (0, "")


@pytest.mark.vm
def test_a_process_that_stays_behind_is_not_waited_for(machine: Machine) -> None:
    assert machine.run("bash", "-c", "sleep 1000 & echo away", timeout=30).stdout == "away\n"


@pytest.mark.vm
def test_a_panic_is_told_with_the_console(machine: Machine) -> None:
    """The last test on this machine."""
    with pytest.raises(MachineError, match=r"has stopped[\s\S]*sysrq: Trigger a crash"):
        machine.run("bash", "-c", "echo c >/proc/sysrq-trigger; sleep 10", timeout=60)


@pytest.mark.vm
def test_an_emulator_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (archive, emulator):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(emulator, "SUITE", "no-such-suite")
    with pytest.raises(RuntimeError, match="no emulator from Debian no-such-suite: apt-get"):
        emulator.emulator()
    assert not [left for left in tmp_path.iterdir() if left.suffix != ".lock"]


def test_outcomes_are_read_from_the_report() -> None:
    outcome = Outcome.read(REPORT)
    assert outcome.passed == 1
    assert outcome.failures == {"tests.a::two": "the whole text", "tests.a::three": "no text"}
    assert list(outcome.skips) == ["tests.a::four", "tests.a::five"]


@pytest.mark.parametrize(("kernel", "wrong"), [("6.1", ["five"]), ("6.12", ["four", "five"])])
def test_a_skip_needs_an_excuse(kernel: str, wrong: list[str]) -> None:
    assert list(Outcome.read(REPORT).wrong_skips(kernel)) == [f"tests.a::{name}" for name in wrong]


@pytest.mark.parametrize(
    ("does", "error", "started"),
    [
        ("kill -ABRT $$", MachineError, 3),
        ("kill -SEGV $$", MachineError, 1),
        ("exec sleep 1000", NoAnswerError, 3),
    ],
)
def test_an_emulator_that_aborts_or_hangs_is_started_again(
    monkeypatch: pytest.MonkeyPatch, does: str, error: type[MachineError], started: int
) -> None:
    boots: list[subprocess.Popen[bytes]] = []

    def boot(machine: Machine) -> None:
        machine._process = subprocess.Popen(["sh", "-c", does])
        boots.append(machine._process)
        raise error("what it says")

    monkeypatch.setattr(Machine, "_boot", boot)
    with pytest.raises(error), Machine(KERNELS["6.1"]):
        pass
    assert len(boots) == started
    assert all(process.poll() is not None for process in boots), "none is left running"


class Frail:
    """A machine that fails on the words "panic", and to which everything else is well."""

    def __init__(self, kernel: Kernel, log: Path, nics: Iterable[Nic]) -> None:
        STARTED.append(kernel.name)

    def run(self, *argv: str, **options: object) -> Result:
        if "panic" in argv:
            raise MachineError("has stopped")
        return Result(0, REPORT if "cat" in argv else "{}", "")

    def keep_compiled(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass


STARTED: list[str] = []


def test_a_machine_that_fails_costs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Machine", Frail)
    monkeypatch.setattr(suites, "LOGS", tmp_path)
    worker.Worker(tmp_path).run([Job("6.1", ("one.py", "-k panic two.py", "three.py -k some"))])
    left = {file.name: file.read_text() for file in (tmp_path / "6.1").iterdir()}
    assert left == {
        "found.json": "{}",
        "6.1-one.xml": REPORT,
        "6.1-panic-two.error": "has stopped",
        "6.1-three-some.xml": REPORT,
    }
    assert STARTED == ["6.1", "6.1"]


def test_machines_whose_process_ended_are_not_waited_for(privilege: None) -> None:
    job = Job("0.1", ("one.py",))
    beside = Suites([job])
    with pytest.raises(Failed, match=r"has ended: [\s\S]*KeyError: '0.1'"):
        beside.report(job, "one.py")
    beside.close()


def test_an_image_has_what_its_packages_depend_on() -> None:
    if not Path("/var/lib/dpkg/status").exists():
        pytest.skip("not a Debian")
    found = {package.partition(":")[0] for package in closure(["coreutils"])}
    assert {"coreutils", "libc6"} <= found
    assert "python3" not in found
