"""Running extensions so that none of them takes the default path down."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from offload.bridge.extension import DROP, FORWARD, GROUP, Extension, Frame, Verdict
from offload.bridge.membership import Configured
from offload.bridge.note import Note
from offload.bridge.state import ExtensionState
from offload.errors import UsageError

MAX_FAILURES = 10
"""So many failures within ``FAILURE_WINDOW`` seconds switch an extension off."""
FAILURE_WINDOW = 60.0

log = logging.getLogger(__name__)


class _Running:
    """One extension of the config, at work or off."""

    def __init__(self, number: int, name: str, why_off: str = "") -> None:
        self.number = number
        self.name = name
        self.why_off = why_off
        self.extension: Extension | None = None
        self.calls = self.failures = self.drops = self.redirects = 0
        self.failed_at: deque[float] = deque(maxlen=MAX_FAILURES)
        self.last_failure = ""


class Chain:
    """The extensions of a switch, in their order. ``off`` says which are not to run, by number, and why.

    An extension that cannot be made is off. ``load`` gives the class behind a name.
    """

    def __init__(
        self,
        configured: Sequence[Configured],
        switch: str,
        note: Note,
        off: Mapping[int, str],
        load: Callable[[str], type[Extension]] | None = None,
    ) -> None:
        self._note = note
        self._all = [
            _Running(number, item.name, off.get(number, "")) for number, item in enumerate(configured)
        ]
        for running, item in zip(self._all, configured, strict=True):
            if not running.why_off:
                self._make(running, item, switch, load or load_extension)
        self._choose()

    def _make(
        self, running: _Running, item: Configured, switch: str, load: Callable[[str], type[Extension]]
    ) -> None:
        self._note.enter(running.number)
        try:
            running.extension = load(item.name)(item.options, switch)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: it is somebody else's code
            self._switch_off(running, f"could not be made: {str(error) or type(error).__name__}")
        finally:
            self._note.leave()

    def _choose(self) -> None:
        made = [(running, running.extension) for running in self._all if running.extension is not None]
        self._deciding = [(running, it.frame) for running, it in made if _defines(it, "frame")]
        self._watching = [(running, it.watch) for running, it in made if _defines(it, "watch")]
        self.active = bool(self._deciding or self._watching)
        """Whether frames need be shown to anybody."""
        self.watched = bool(self._watching)

    def verdict(self, frame: Frame) -> Verdict:
        """Of the first extension that has something else to say than FORWARD."""
        for running, decide in self._deciding:
            self._note.enter(running.number)
            try:
                verdict = decide(frame)
                if verdict is not FORWARD:
                    if not isinstance(verdict, Verdict):
                        raise TypeError(f"frame() returned {verdict!r}, which is no Verdict")
                    running.calls += 1
                    if verdict.kind == "redirect":
                        running.redirects += 1
                        return verdict
                    if verdict.kind == "drop":
                        running.drops += 1
                        return DROP
                    continue
                running.calls += 1
            except BaseException as error:  # noqa: BLE001 - also SystemExit: it is somebody else's code
                self._failed(running, error)
            finally:
                self._note.leave()
        return FORWARD

    def watch(self, frame: Frame, to: Sequence[str]) -> None:
        """Show the frame to all who watch."""
        for running, watch in self._watching:
            running.calls += 1
            self._guarded(running, watch, frame, to)

    def second(self) -> None:
        for running in self._all:
            if running.extension is not None and _defines(running.extension, "second"):
                self._guarded(running, running.extension.second)

    def close(self) -> None:
        """Say goodbye to all of them."""
        for running in self._all:
            extension, running.extension = running.extension, None
            if extension is not None and _defines(extension, "close"):
                self._guarded(running, extension.close)

    def states(self) -> list[ExtensionState]:
        """All of them, in order, for the operator."""
        return [
            ExtensionState(
                name=running.name,
                state="off" if running.extension is None else "on",
                reason=running.why_off or running.last_failure,
                calls=running.calls,
                failures=running.failures,
                drops=running.drops,
                redirects=running.redirects,
                counters=self._counters(running),
            )
            for running in self._all
        ]

    def _counters(self, running: _Running) -> dict[str, int]:
        if running.extension is None or not _defines(running.extension, "counters"):
            return {}
        found = self._guarded(running, lambda ask=running.extension.counters: dict(ask()))
        return {str(key): int(value) for key, value in (found or {}).items() if isinstance(value, int)}

    def _guarded(self, running: _Running, function: Callable[..., Any], *arguments: object) -> Any:
        """What the function returns, or ``None`` when it fails."""
        self._note.enter(running.number)
        try:
            return function(*arguments)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: it is somebody else's code
            self._failed(running, error)
            return None
        finally:
            self._note.leave()

    def _failed(self, running: _Running, error: BaseException) -> None:
        now = time.monotonic()
        running.failures += 1
        running.last_failure = f"{type(error).__name__}: {error}"
        running.failed_at.append(now)
        log.warning("extension %s failed", running.name, exc_info=error)
        if len(running.failed_at) == MAX_FAILURES and now - running.failed_at[0] < FAILURE_WINDOW:
            window = f"{MAX_FAILURES} times within {FAILURE_WINDOW:.0f} s"
            self._switch_off(running, f"failed {window}, last with {running.last_failure}")
            self._choose()

    def _switch_off(self, running: _Running, why: str) -> None:
        running.extension = None
        running.why_off = why
        log.error("extension %s is off: %s", running.name, why)


def installed() -> list[str]:
    """The names of all extensions, in order."""
    return sorted(entry_points(group=GROUP).names)


def load_extension(name: str) -> type[Extension]:
    """The class that the entry point ``name`` names. Raises UsageError, or what importing it raises."""
    found = {entry.value: entry for entry in entry_points(group=GROUP) if entry.name == name}
    if not found:
        known = ", ".join(installed()) or "none"
        raise UsageError(
            f"there is no extension {name}: install the package that brings it; there is: {known}"
        )
    if len(found) > 1:
        raise UsageError(f"several packages bring an extension {name}: {', '.join(found)}")
    loaded: type[Extension] = next(iter(found.values())).load()
    return loaded


def _defines(extension: Extension, method: str) -> bool:
    """Whether the extension has a method of its own, and not the one that does nothing."""
    own = getattr(type(extension), method, None)
    return own is not None and own is not getattr(Extension, method)
