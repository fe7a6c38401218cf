"""Tests in machines, run beside the tests outside by a process of its own: ``worker.py``.

It has a low priority, so that it takes what CPU time the tests outside leave. What is open or running in it
is not seen in the tests' own process. Per job it leaves files in a directory: what the kernel can do
(``found.json``), and per part JUnit's XML (``TITLE.xml``) or why there is none (``TITLE.error``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.vm.archive import CACHE, ROOT

LOGS = CACHE / "logs"
"""What the machines of the last run said."""
PART_SECONDS = 3600
"""The longest that a part may take in a machine, outside's time."""
NICENESS = 10
JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """Work for a machine of its own: ``parts`` are arguments of pytest, one run after the other.

    ``nics`` are the emulated cards that it has; ``seconds`` is the longest that a part may take.
    """

    kernel: str
    parts: tuple[str, ...]
    nics: tuple[str, ...] = ()
    seconds: float = PART_SECONDS

    @property
    def name(self) -> str:
        return f"{self.kernel}-nics" if self.nics else self.kernel

    def title(self, part: str) -> str:
        """A name for a part: of its files, and of what is chosen in them."""
        words = [file or word for file, word in re.findall(r"(\w+)\.(?:py|txt)|-[km] (\w+)", part)]
        return "-".join((self.name, *words))

    def log(self, part: str) -> Path:
        """What pytest said of a part."""
        return LOGS / f"{self.title(part)}.txt"

    @property
    def console(self) -> Path:
        """What the kernel said last."""
        return LOGS / f"{self.name}.console"


class Failed(Exception):
    """A part of a job has no outcome: its machine failed, or the process that runs all machines."""


class Suites:
    """Jobs that run from now on, till ``close``."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="offload-suites-"))
        (self._place / JOBS).write_text(json.dumps([asdict(job) for job in jobs]))
        command = [
            *("setpriv", "--pdeathsig", "TERM", "--", "nice", "-n", str(NICENESS)),
            *(sys.executable, "-m", "tests.vm.worker", str(self._place)),
        ]
        with (self._place / "said").open("wb") as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=ROOT
            )

    def report(self, job: Job, part: str) -> str:
        """JUnit's XML of a part, as soon as it is there. Raises ``Failed``."""
        title = self._place / job.name / job.title(part)
        report, error = (title.with_name(f"{title.name}.{kind}") for kind in ("xml", "error"))
        while True:
            ended = self._process.poll() is not None
            if report.exists():
                return report.read_text()
            if error.exists():
                raise Failed(error.read_text())
            if ended:
                raise Failed(f"the machines' process has ended: {(self._place / 'said').read_text()}")
            time.sleep(0.5)

    def found(self, job: Job) -> dict[str, str]:
        """What ``options.abilities`` found in the job's machine, which has brought a report."""
        found: dict[str, str] = json.loads((self._place / job.name / "found.json").read_text())
        return found

    def close(self) -> None:
        """End what still runs; outcomes that nobody has asked for are lost."""
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._place)


def jobs_of(document: str) -> list[Job]:
    """The jobs that ``Suites`` wrote."""
    found: list[dict[str, Any]] = json.loads(document)
    return [Job(**{**job, "parts": tuple(job["parts"]), "nics": tuple(job["nics"])}) for job in found]
