"""Runs the jobs of ``suites.py``, several machines side by side: ``python -m tests.vm.worker DIRECTORY``."""

from __future__ import annotations

import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from offload.kernel.channels import QUEUES
from offload.kernel.compile import compiled
from offload.kernel.dataplane import Dataplane
from tests.vm.__main__ import end
from tests.vm.image import COMPILED
from tests.vm.kernels import KERNELS
from tests.vm.machine import MEMORY, Machine, MachineError
from tests.vm.nics import NICS
from tests.vm.suites import JOBS, Job, jobs_of

REPORT = "/run/report.xml"


class Worker:
    """The machines: one per job, side by side where memory and CPUs allow."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._stopping = False
        self._machines: list[Machine] = []

    def run(self, jobs: list[Job]) -> None:
        """Return when all jobs are done. What goes wrong is left in their directories."""
        with ThreadPoolExecutor(max_workers=side_by_side()) as pool:
            try:
                for done in [pool.submit(self._job, job) for job in jobs]:
                    done.result()
            finally:
                self._stopping = True
                for machine in self._machines:
                    machine.kill()

    def _job(self, job: Job) -> None:
        """All parts of a job. A machine that fails costs a part; then there is a new one."""
        left = list(job.parts)
        while left and not self._stopping:
            machine = Machine(KERNELS[job.kernel], log=job.console, nics=[NICS[name] for name in job.nics])
            self._machines.append(machine)
            try:
                with machine:
                    self._leave(job, "found.json", machine.run("python", "-m", "tests.vm.options").stdout)
                    while left and not self._stopping:
                        report = run_part(machine, left[0], job)
                        self._leave(job, f"{job.title(left.pop(0))}.xml", report)
            except Exception as error:  # noqa: BLE001  # it is the test's to raise
                if left:
                    self._leave(job, f"{job.title(left.pop(0))}.error", str(error))

    def _leave(self, job: Job, name: str, text: str) -> None:
        """A file that is there whole or not at all."""
        unfinished = self._place / job.name / f".{name}"
        unfinished.parent.mkdir(exist_ok=True)
        unfinished.write_text(text)
        unfinished.rename(unfinished.with_name(name))


def side_by_side() -> int:
    """How many machines at once: an emulator keeps about one CPU busy, whatever it emulates."""
    info = Path("/proc/meminfo").read_text()
    available = int(re.search(r"^MemAvailable:\s+(\d+) kB", info, re.MULTILINE)[1]) >> 10  # type: ignore[index]
    return max(1, min(len(os.sched_getaffinity(0)), available // (MEMORY + 512)))


def run_part(machine: Machine, part: str, job: Job) -> str:
    """Run tests inside; JUnit's XML. MachineError when pytest did not come to an end."""
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={REPORT}", *part.split()]
    with job.log(part).open("wb") as log:

        def show(stream: str, data: bytes) -> None:
            log.write(data)
            log.flush()

        done = machine.run(*command, timeout=job.seconds, env={"PYTHONUNBUFFERED": "1"}, show=show)
    read = machine.run("cat", REPORT)
    machine.run("rm", "-f", REPORT)
    machine.keep_compiled()
    if read.exit_code != 0:
        raise MachineError(f"{machine}: pytest has not come to a report\n{done.stdout}{done.stderr}")
    return read.stdout


def compile_ahead(place: Path) -> None:
    """Let the compiler run out here for what every machine needs: emulated, it takes a minute."""
    Dataplane(place, COMPILED, keep=False)
    compiled("channel.c", {"MAX_CHANNEL_QUEUES": QUEUES}, COMPILED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    directory = Path(sys.argv[1])
    compile_ahead(directory)
    Worker(directory).run(jobs_of((directory / JOBS).read_text()))
