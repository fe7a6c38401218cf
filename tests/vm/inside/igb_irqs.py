"""Which CPU serves which queue of the Intel 82576, by its real driver: interrupts, NAPI threads and XPS."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from offload.errors import KernelError, UnsupportedError, VerifyError
from offload.kernel import irq
from offload.kernel.netdev import napis
from offload.kernel.sysfs import own_sysfs
from offload.model import Change, IrqAffinity, NapiAffinity, Xps
from tests.lab import NIC_MAC, WIRE_MAC, test_frame, udp4, wait_until
from tests.vm.inside.cards import Cards

QUEUES = (0, 1)
CPUS = (0, 1)
COUNT = 40
FEW = 4
"""Frames, or interrupts for other reasons: a driver has its timers."""
TOLD_SINCE = (6, 16)
"""From this version on Linux's igb tells which NAPI instance and interrupt serve a queue."""
VERSION = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])

needs_told = pytest.mark.skipif(VERSION < TOLD_SINCE, reason="igb tells nothing of NAPI before Linux 6.16")

Counts = dict[int, tuple[int, ...]]


class Site(Cards):
    """Two cards on a wire, and questions to the one that is the NIC, in its namespace."""

    def __init__(self) -> None:
        super().__init__("igb")
        self.at = (self.nic, self.host.call(lambda: socket.if_nametoindex(self.nic)))

    def irqs(self, ask: Callable[[str, int], Counts] = irq.queue_irqs) -> dict[int, tuple[int, ...]]:
        return self.host.call(lambda: ask(*self.at))

    def observe(self, setting: IrqAffinity | NapiAffinity | Xps) -> str | None:
        return self.host.call(lambda: irq.observe(setting))

    def change(self, setting: IrqAffinity | NapiAffinity | Xps, cpus: str) -> None:
        self.host.call(lambda: irq.execute(Change(setting, self.observe(setting), cpus)))

    def receive(self, count: int = COUNT) -> None:
        """Let the NIC receive frames of several IP flows, one by one."""
        before = self.packets("rx")
        for number in range(count):
            self.wire.send(
                self.wire_end, [udp4(NIC_MAC, WIRE_MAC, "192.0.2.1", f"192.0.2.{2 + number}", bytes(64))]
            )
        wait_until(lambda: sum(self.packets("rx")) >= sum(before) + count, "the frames have come", 20)

    def packets(self, direction: str) -> list[int]:
        """What each queue has carried."""
        return [self.counter(f"{direction}_queue_{queue}_packets") for queue in QUEUES]

    def send_from(self, cpu: int) -> list[int]:
        """How many frames left by each TX queue when a process on this CPU sent some."""
        before = self.packets("tx")
        frame = test_frame(WIRE_MAC, NIC_MAC, 1).hex()
        script = (
            "import socket\nout = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n"
            f"out.bind(({self.nic!r}, 0))\nfor _ in range({COUNT}): out.send(bytes.fromhex({frame!r}))"
        )
        self.host.run("taskset", "-c", str(cpu), sys.executable, "-c", script)
        wait_until(lambda: sum(self.packets("tx")) >= sum(before) + COUNT, "the frames have left", 20)
        return [now - then for now, then in zip(self.packets("tx"), before, strict=True)]

    def switch_threads(self, on: bool) -> None:
        def write() -> None:
            with own_sysfs() as root:
                (root / "class/net" / self.nic / "threaded").write_text(str(int(on)))

        self.host.call(write)

    def refusals(self, questions: Sequence[str], *drop: str) -> list[str]:
        """What ``irq`` tells a process that has dropped privileges; nothing where it could be done."""
        script = [
            "from offload.errors import PrivilegeError",
            "from offload.kernel import irq",
            *(
                f"try: print(irq.{ask} or '')\nexcept PrivilegeError as error: print(error)"
                for ask in questions
            ),
        ]
        command = [*("setpriv", "--inh-caps=-all", *drop), sys.executable, "-c", "\n".join(script)]
        return self.host.run(*command).stdout.splitlines()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two cards on a wire. Scope: one module."""
    with Site() as site:
        yield site


def since(before: Counts, number: int) -> list[int]:
    """How often an interrupt has come, by CPU."""
    return [now - then for now, then in zip(irq.interrupts()[number], before[number], strict=True)]


def test_what_arrives_in_a_queue_wakes_its_interrupt(site: Site) -> None:
    """And not the other queue's. Both ways of asking agree."""
    found = site.irqs()
    assert sorted(found) == list(QUEUES)
    assert site.irqs(lambda name, _: irq.irqs_by_name(name)) == found
    assert site.irqs(irq.irqs_by_napi) == (found if VERSION >= TOLD_SINCE else {})
    for queue, other in ((0, 1), (1, 0)):
        site.receive_on(queue)
        before = irq.interrupts()
        site.receive()
        assert sum(since(before, found[queue][0])) >= COUNT / 4
        assert sum(since(before, found[other][0])) <= FEW


def test_an_interrupt_comes_to_the_cpu_that_it_was_given_to(site: Site) -> None:
    site.receive_on(1)
    [number] = site.irqs()[1]
    setting = IrqAffinity(*site.at, number)
    original = site.observe(setting)
    assert original == "0-1"
    for cpu, other in ((0, 1), (1, 0)):
        site.change(setting, str(cpu))
        assert site.observe(setting) == str(cpu)
        site.receive(FEW)  # it moves when it comes
        before = irq.interrupts()
        site.receive()
        assert since(before, number)[cpu] >= COUNT / 4
        assert since(before, number)[other] == 0
    site.change(setting, original)
    assert site.observe(setting) == original


def test_what_cannot_be_is_refused(site: Site) -> None:
    [number] = site.irqs()[1]
    with pytest.raises(KernelError, match="the machine has no such CPU"):
        irq.set_affinity(number, "7", site.nic)
    with pytest.raises(KernelError, match="not there any more"):
        irq.affinity(9999)
    [timer, *_] = irq.interrupts()
    assert site.observe(IrqAffinity(*site.at, timer)) is None, "it is not this device's"
    disk = min(int(path.parent.name) for path in Path("/proc/irq").glob("*/virtio*-req.*"))
    with pytest.raises(UnsupportedError, match=f"cannot move interrupt {disk}: .* place it"):
        irq.set_affinity(disk, "0-1", "disk")
    with pytest.raises((VerifyError, KernelError), match=r"afterwards it reads '0'|Value too large"):
        site.host.call(lambda: irq.set_xps(site.nic, 0, "0,7"))
    site.change(Xps(*site.at, 0), "")


def test_frames_leave_by_the_queue_of_their_cpu(site: Site) -> None:
    settings = [Xps(*site.at, queue) for queue in site.host.call(lambda: irq.xps_queues(site.nic))]
    assert [site.observe(setting) for setting in settings] == ["", ""]
    for queues in (QUEUES, QUEUES[::-1]):
        for cpu, queue in zip(CPUS, queues, strict=True):
            site.change(settings[queue], str(cpu))
        for cpu, queue in zip(CPUS, queues, strict=True):
            assert site.observe(settings[queue]) == str(cpu)
            used = site.send_from(cpu)
            assert used[queue] >= COUNT
            assert sum(used) - used[queue] <= FEW
    for setting in settings:
        site.change(setting, "")
        assert site.observe(setting) == ""
    assert site.observe(Xps("lo", 1, 0)) is None, "with one TX queue there is nothing to choose"


@needs_told
def test_a_napi_thread_runs_on_the_cpu_that_it_was_given(site: Site) -> None:
    assert site.host.call(lambda: irq.queue_threads(*site.at)) == {}
    site.switch_threads(True)
    threads = site.host.call(lambda: irq.queue_threads(*site.at))
    assert sorted(threads) == list(QUEUES)
    setting = NapiAffinity(*site.at, threads[1])
    original = site.observe(setting)
    assert original == "0-1"
    pid = site.host.call(lambda: napis(*site.at))[threads[1]].pid
    site.receive_on(1)
    for cpu in CPUS:
        site.change(setting, str(cpu))
        assert site.observe(setting) == str(cpu)
        before = times_run(pid)
        site.receive()
        assert times_run(pid) > before
        assert last_cpu(pid) == cpu
    site.change(setting, original)
    site.switch_threads(False)
    assert site.observe(setting) is None
    assert site.host.call(lambda: irq.queue_threads(*site.at)) == {}


def last_cpu(pid: int | None) -> int:
    """Where a process ran last: field 39 of proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[36])


def times_run(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[2])


def test_what_each_setting_needs(site: Site) -> None:
    """An interrupt: to be root, whose its file is. XPS and NAPI threads: a capability each."""
    [number] = site.irqs()[1]
    asked = [f"set_affinity({number}, '0-1', {site.nic!r})", f"set_xps({site.nic!r}, 0, '')"]
    needed = ["", "needs CAP_NET_ADMIN"]
    if VERSION >= TOLD_SINCE:
        site.switch_threads(True)
        napi = site.host.call(lambda: irq.queue_threads(*site.at))[1]
        asked.append(f"set_napi_affinity(*{site.at}, {napi}, '0-1')")
        needed.append("needs CAP_SYS_NICE")
    few = "--bounding-set=-all,+sys_admin"
    for text, privilege in zip(site.refusals(asked, few), needed, strict=True):
        assert privilege in text
        assert bool(privilege) == bool(text)
    assert site.refusals(asked, few + ",+net_admin,+sys_nice") == [""] * len(asked)
    [text] = site.refusals(asked[:1], "--reuid=65534", "--clear-groups")
    assert "needs root, or CAP_DAC_OVERRIDE" in text
    site.switch_threads(False)
