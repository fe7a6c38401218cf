"""The command line's end of the API.

Every method asks the daemon once and returns its answer, or raises the error
that the daemon raised, of the same class and with the same message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx
from pydantic import JsonValue, TypeAdapter, ValidationError

from offload.closing import Closing
from offload.errors import (
    ConfigError,
    ForeignError,
    KernelError,
    OffloadError,
    PrivilegeError,
    Problem,
    UnsupportedError,
    UsageError,
    VerifyError,
)
from offload.takeovers import DEFAULT_WITHIN
from offload.views import (
    NicView,
    Outcome,
    PortView,
    ProblemBody,
    QueueEvent,
    QueueView,
    StatusView,
    SwitchView,
    TakeoverView,
)

PATIENCE = 300.0
"""Seconds to wait for an answer. A first apply may compile and bring up a thousand ports."""

_CLASSES: Mapping[str, type[OffloadError]] = {
    kind.__name__: kind
    for kind in (
        OffloadError,
        UsageError,
        UnsupportedError,
        PrivilegeError,
        KernelError,
        ForeignError,
        VerifyError,
    )
}

T = TypeVar("T")


class NoDaemonError(OffloadError):
    """Nobody answers on the daemon's socket."""


class Client(Closing):
    """A connection to the daemon at ``socket``; a context manager.

    ``patience`` is in seconds. Raises NoDaemonError when nobody answers there and
    PrivilegeError when the socket may not be opened.
    """

    def __init__(self, socket: Path, patience: float = PATIENCE) -> None:
        self._socket = socket
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)),
            base_url="http://offload",
            timeout=patience,
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._http.close()

    def status(self) -> StatusView:
        """The daemon at a glance."""
        return self._ask("GET", "/v1/status", StatusView)

    def nics(self) -> list[NicView]:
        """The NICs, with what is in force on each."""
        return self._ask("GET", "/v1/nics", list[NicView])

    def switches(self) -> list[SwitchView]:
        """The virtual switches."""
        return self._ask("GET", "/v1/switches", list[SwitchView])

    def ports(self) -> list[PortView]:
        """The ports, with their paths, queues and counters."""
        return self._ask("GET", "/v1/ports", list[PortView])

    def queues(self) -> list[QueueView]:
        """The queues of all NICs, the default queues included."""
        return self._ask("GET", "/v1/queues", list[QueueView])

    def events(self) -> list[QueueEvent]:
        """What happened to VM queues, as far as it is kept, the newest last."""
        return self._ask("GET", "/v1/events", list[QueueEvent])

    def apply(
        self, text: str, source: str, dry_run: bool = False, confirm_within: float = DEFAULT_WITHIN
    ) -> Outcome:
        """Put the config ``text`` in force, all of it or none; ``source`` names it in errors.

        A takeover that was never confirmed goes back after ``confirm_within`` seconds.
        """
        body: JsonValue = {
            "text": text,
            "source": source,
            "dry_run": dry_run,
            "confirm_within": confirm_within,
        }
        return self._ask("PUT", "/v1/config", Outcome, body)

    def port_add(
        self, name: str, spec: dict[str, JsonValue], keep: bool = False, dry_run: bool = False
    ) -> Outcome:
        """Add a port; ``spec`` has the keys of ``ports.NAME`` in the config."""
        body: JsonValue = {"name": name, "spec": spec, "keep": keep, "dry_run": dry_run}
        return self._ask("POST", "/v1/ports", Outcome, body)

    def port_set(self, name: str, spec: dict[str, JsonValue], dry_run: bool = False) -> Outcome:
        """Change the given keys of a port; ``None`` puts a key back to its default."""
        body: JsonValue = {"spec": spec, "dry_run": dry_run}
        return self._ask("PATCH", f"/v1/ports/{quote(name, safe='')}", Outcome, body)

    def port_remove(self, name: str, dry_run: bool = False) -> Outcome:
        """Remove a port."""
        query = f"?dry_run={str(dry_run).lower()}"
        return self._ask("DELETE", f"/v1/ports/{quote(name, safe='')}{query}", Outcome)

    def confirm(self) -> TakeoverView:
        """Keep the takeover that waits; returns what was kept."""
        return self._ask("POST", "/v1/takeover/confirm", TakeoverView)

    def rollback(self) -> Outcome:
        """Take the takeover that waits back at once."""
        return self._ask("POST", "/v1/takeover/rollback", Outcome)

    def detach(self, everything: bool = False) -> Outcome:
        """Take the fast path out; with ``everything`` all of ours."""
        return self._ask("POST", "/v1/detach", Outcome, {"everything": everything})

    def _ask(self, method: str, path: str, shape: type[T], body: JsonValue = None) -> T:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._explain(error) from error
        if answer.is_success:
            return _read(answer, shape)
        raise _problem(_read(answer, ProblemBody))

    def _explain(self, error: httpx.TransportError) -> OffloadError:
        if any(isinstance(cause, PermissionError) for cause in _causes(error)):
            return PrivilegeError(
                f"{self._socket}: may not be opened; run this as root, or as a member of the socket's group"
            )
        if isinstance(error, httpx.ConnectError):
            return NoDaemonError(
                f"no daemon answers on {self._socket}: start it with `systemctl start offload` or "
                "`offload run --config FILE`, or name its --run-dir"
            )
        if isinstance(error, httpx.TimeoutException):
            return OffloadError(f"the daemon on {self._socket} did not answer in time; see its log")
        return OffloadError(f"the daemon on {self._socket} broke off ({error}); see its log")


def _read(answer: httpx.Response, shape: type[T]) -> T:
    try:
        return TypeAdapter(shape).validate_json(answer.content)
    except ValidationError as error:
        raise OffloadError(
            f"the daemon's answer is not understood (HTTP {answer.status_code}); is it of another version?"
        ) from error


def _problem(body: ProblemBody) -> OffloadError:
    if body.error == ConfigError.__name__:
        problems = [Problem(p.path, p.value, p.allowed) for p in body.problems]
        return ConfigError(problems, body.source or "config")
    return _CLASSES.get(body.error, OffloadError)(body.message)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
