"""CPU time of everything that works on a path: this process, processes started for it, kernel threads."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

_ALWAYS = re.compile(r"ksoftirqd/\d+")
_ON_DEMAND = re.compile(r"(cpumap|napi)/.+")


class Meter:
    """Made before a path is set up: kernel threads that were made since then work for that path alone.

    ``watch`` ends the set-up and adds processes. What others leave to ksoftirqd is counted as well.
    """

    def __init__(self) -> None:
        self._before = _threads(_ON_DEMAND)
        self._used: dict[Path, int] = {}  # nanoseconds by thread; of one that has ended, what was seen last

    def watch(self, *pids: int) -> None:
        made = _threads(_ON_DEMAND) - self._before
        kernel = [Path("/proc", thread, "schedstat") for thread in made | _threads(_ALWAYS)]
        tasks = [task / "schedstat" for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
        self._used = dict.fromkeys(kernel + tasks, 0)

    def seconds(self) -> float:
        """On a CPU so far; what threads do in softirqs included."""
        for path in self._used:
            with suppress(FileNotFoundError, ProcessLookupError):
                self._used[path] = int(path.read_text().split()[0])
        return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) + sum(self._used.values()) / 1e9


def of_process(pid: int) -> float:
    """Seconds on a CPU of a process's threads so far."""
    schedstat = (task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int(path.read_text().split()[0]) for path in schedstat) / 1e9


def _threads(wanted: re.Pattern[str]) -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit() and wanted.fullmatch(_comm(name))}


def _comm(process: str) -> str:
    try:
        return Path("/proc", process, "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""  # processes come and go
