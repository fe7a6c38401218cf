"""A port's channel as its consumer sees it, and a consumer's process."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.closing import Closing
from tests.lab import DEADLINE, Namespace, seq_of, test_frame, wait_until

START_TIME = 30.0
"""Seconds until a consumer must be at work: 1 on an idle machine."""
_PROBE = 1 << 32  # and above: frames that only ask whether somebody is there
_WINDOW = 64  # frames under way, fewer than any ring on it holds


@dataclass(frozen=True)
class Channel:
    """What a consumer is told of a port: which device to bind, and where its XSKMAP is had.

    ``netns`` is the path of the namespace that the consumer must be in. The socket of ``queue`` goes into
    the slot of that number. ``hand_over`` is the unix socket that answers DPDK's ``use_cni``.
    """

    netns: str
    ifname: str
    queue: int
    map_path: Path
    hand_over: Path


@dataclass(frozen=True)
class Port:
    """A port, and the device in another namespace from which frames come to it and go back."""

    mac: str
    channel: Channel
    far: Namespace
    device: str
    far_mac: str

    def wait_answered(self, consumer: Consumer) -> None:
        """Wait until what is sent to the port comes back from it."""
        probes = 0
        with self.far.capture(self.device) as seen:

            def answered() -> bool:
                nonlocal probes
                self.far.send(self.device, [test_frame(self.mac, self.far_mac, _PROBE + probes)])
                probes += 1
                return bool(seen.matching(lambda frame: (seq_of(frame) or 0) >= _PROBE))

            consumer.wait_for(answered, "a frame comes back")

    def echoed(self, frames: Sequence[bytes]) -> list[bytes]:
        """Send numbered frames to the port, a few at a time; everything with a number that came back."""
        with self.far.capture(self.device) as seen:

            def numbered(frame: bytes) -> bool:
                number = seq_of(frame)
                return number is not None and number < _PROBE

            for start in range(0, len(frames), _WINDOW):
                sent = frames[start : start + _WINDOW]
                self.far.send(self.device, sent)
                seen.wait_for(start + len(sent), wanted=numbered)
            seen.extra(len(seen.frames()))
            return seen.matching(numbered)


class Consumer(Closing):
    """A process in a channel's namespace, as root or with the options of setpriv(1) that ``user`` has.

    A context manager; on leaving, the process is ended, and killed if it does not end by itself.
    """

    def __init__(self, channel: Channel, command: Sequence[str], user: Sequence[str] = ()) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="offload-consumer-")  # noqa: SIM115 (close() does)
        within = ["nsenter", f"--net={channel.netns}", "--"]
        # It must not outlive the test, however that ends.
        bounded = ["setpriv", "--pdeathsig", "KILL", *user, "--"]
        self.process = subprocess.Popen(
            [*within, *bounded, *command], stdin=subprocess.PIPE, stdout=self._log, stderr=self._log
        )

    def said(self) -> str:
        """What it wrote so far."""
        return Path(self._log.name).read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition()``, while the process runs; AssertionError with its words otherwise."""

        def met() -> bool:
            assert self.process.poll() is None, f"exit {self.process.returncode}"
            return condition()

        try:
            wait_until(met, what, START_TIME)
        except AssertionError as error:
            raise AssertionError(f"{error}; the consumer said: {self.said()[-4000:]}") from error

    def end(self) -> int:
        """End it in the way it expects; its exit code."""
        self.process.terminate()
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        try:
            if self.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.end()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if self.process.stdin:
                self.process.stdin.close()
            self._log.close()
