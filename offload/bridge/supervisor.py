"""The supervisor: holds the socket with its ring, and sees to it that a worker serves it.

A worker that ends while an extension is in a call, or stays in one for longer than ``WATCHDOG`` seconds, is
followed at once by one that does without this extension. Frames wait in the ring meanwhile, and none is
lost until it is full.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from offload.bridge.membership import (
    Configured,
    Membership,
    file_version,
    load,
    membership_file,
    valid_switch,
)
from offload.bridge.note import Note
from offload.bridge.state import Restarts
from offload.bridge.worker import ENDED, RECONFIGURED, Worker
from offload.errors import OffloadError, PrivilegeError
from offload.kernel.packet import Ring
from offload.kernel.service import notify
from offload.paths import Paths

WATCHDOG = 1.0
"""Seconds that an extension may keep one frame."""
STUCK = 15.0
"""Seconds after which a worker that does nothing at all, with no extension to blame, is ended."""
_LOOK = 0.1
_PATIENCE = 2.0
"""Seconds to wait for another bridge of this switch to end."""
_MAX_DEATHS, _DEATHS_WITHIN = 3, 60.0
"""So many ends without a reason in so many seconds, and every extension is off: one may have a thread."""

log = logging.getLogger(__name__)


class Supervisor:
    """Runs workers for one switch until a signal comes. Not to be used in a process that has threads."""

    def __init__(self, run_dir: Path, switch: str, ring: Ring) -> None:
        self._run_dir = run_dir
        self._name = switch
        self._ring = ring
        self._note = Note()
        self._off: dict[str, str] = {}
        self._file = membership_file(run_dir, switch)
        self._file_version: tuple[int, ...] | None = None
        self._last_good: Membership | None = None
        self._restarts = Restarts()
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        self._ending = self._hung = False

    def run(self) -> int:
        """Returns the exit code when a signal, or a worker that cannot begin, has ended it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        gc.freeze()  # what is here now is never garbage, and its pages stay shared with the workers
        ready = False
        while True:
            self._look()
            extensions = self._last_good.extensions if self._last_good else ()
            known = {item.key for item in extensions}
            self._off = {key: why for key, why in self._off.items() if key in known}
            pid = self._start()
            if not ready:
                notify("READY=1")
                ready = True
            code = self._attend(pid)
            if code == ENDED:  # by a signal, which may be for us as well
                time.sleep(_LOOK)
            if self._ending:
                return 0
            if code in (2, 3, 4) and self._note.running is None:  # it has said why
                return code
            self._judge(code, extensions)

    def _end(self, *_: object) -> None:
        self._ending = True

    def _look(self) -> None:
        """Keep the newest valid membership: the next worker begins with it should the file be wrong."""
        version = file_version(self._file)
        if version != self._file_version:
            self._file_version = version
            with suppress(OffloadError, FileNotFoundError):  # the worker says it
                self._last_good = load(self._run_dir, self._name)

    def _start(self) -> int:
        self._note.leave()
        self._hung = False
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            worker = Worker(
                *(self._run_dir, self._name, self._ring, self._note),
                *(self._off, self._restarts, self._last_good),
            )
            code = worker.run()
        except OffloadError as error:
            log.error("%s", error)
            code = error.exit_code
        except BaseException:
            log.exception("the worker failed")
        finally:
            logging.shutdown()
            os._exit(code)

    def _attend(self, pid: int) -> int:
        """Wait for the worker's end, or bring it about when it hangs or we are to end; its exit code."""
        end = os.pidfd_open(pid)
        try:
            progress, since, told = self._note.progress, time.monotonic(), False
            while not select.select([end], [], [], _LOOK)[0]:
                self._look()
                now = time.monotonic()
                if self._note.progress != progress:
                    progress, since = self._note.progress, now
                hanging = now - since > (STUCK if self._note.running is None else WATCHDOG)
                if hanging:
                    self._hung = True
                    os.kill(pid, signal.SIGKILL)
                elif self._ending and not told:
                    os.kill(pid, signal.SIGTERM)
                    told = True
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(end)

    def _judge(self, code: int, extensions: tuple[Configured, ...]) -> None:
        """Say why the worker ended, and whether the next one does without an extension."""
        running = self._note.running
        if code == RECONFIGURED:
            self._restarts = replace(self._restarts, config=self._restarts.config + 1)
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if running is not None and running < len(extensions):
            self._restarts = replace(self._restarts, extension=self._restarts.extension + 1)
            culprit = extensions[running]
            why = "kept a frame for too long" if self._hung else f"ended the process ({how})"
            self._off[culprit.key] = f"{why}; off until its entry changes or the bridge is restarted"
            log.error("extension %s %s: going on without it", culprit.name, why)
            return
        self._restarts = replace(self._restarts, other=self._restarts.other + 1)
        log.error("the worker %s: starting another one", "hung" if self._hung else f"ended ({how})")
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == _MAX_DEATHS and now - self._deaths[0] < _DEATHS_WITHIN:
            for item in extensions:
                why = "the worker ended again and again"
                if self._off.setdefault(item.key, why) == why:
                    log.error("extension %s is off: %s", item.name, why)
            time.sleep(_LOOK)


@contextmanager
def alone(run_dir: Path, switch: str) -> Iterator[None]:
    """Hold the switch against a second bridge, which would send every frame twice.

    A worker left over holds it too. The lock has our process id inside.

    Raises OffloadError when another one has it, PrivilegeError when the run directory cannot be written.
    """
    file = Paths(run_dir).bridge_lock(valid_switch(switch))
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PrivilegeError(f"{file}: {error.strerror}: run as root, or name another --run-dir") from error
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OffloadError(
                        f"another bridge serves {switch}: stop it, or name another --run-dir"
                    ) from error
                time.sleep(_LOOK)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def serve(run_dir: Path, switch: str, mebibytes: int) -> int:
    """The whole bridge, in the foreground. Raises OffloadError on a bad start."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"offload-bridge {switch}: %(levelname)s: %(message)s"
    )
    with alone(run_dir, switch), Ring(mebibytes) as ring:
        return Supervisor(run_dir, switch, ring).run()
