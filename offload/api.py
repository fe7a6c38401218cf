"""HTTP and JSON on a unix socket: the daemon's one door.

The routes say nothing of their own: each hands its arguments to a ``Service``
and its answer back as a view. An ``OffloadError`` becomes a ``ProblemBody`` with
the HTTP status of its class, so that a client can raise the same error again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, JsonValue, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import offload
from offload.errors import (
    ConfigError,
    ForeignError,
    OffloadError,
    PrivilegeError,
    UnsupportedError,
    UsageError,
)
from offload.kernel import unix
from offload.takeovers import DEFAULT_WITHIN
from offload.views import (
    NicView,
    Outcome,
    PortView,
    ProblemBody,
    ProblemItem,
    QueueEvent,
    QueueView,
    StatusView,
    SwitchView,
    TakeoverView,
    View,
)

SOCKET_MODE = 0o660
MAX_BODY = 8 * 1024 * 1024
"""Bytes of a request's body. A config with 65,536 ports stays below."""

_HTTP_STATUS: tuple[tuple[type[OffloadError], int], ...] = (
    (ConfigError, 422),
    (UsageError, 409),
    (UnsupportedError, 501),
    (PrivilegeError, 403),
    (ForeignError, 409),
    (OffloadError, 500),
)
MIN_WITHIN, MAX_WITHIN = 5, 86_400
"""Seconds that a takeover may be given to be confirmed."""

_SHOWN = 200
"""Characters of a wrong value that an error repeats."""


class Service(Protocol):
    """What the daemon does for its clients.

    All methods run on the event loop's thread. What would hold it up for long
    belongs into a thread of its own. They raise ``OffloadError`` and its kinds.
    """

    async def status(self) -> StatusView: ...

    async def nics(self) -> list[NicView]: ...

    async def switches(self) -> list[SwitchView]: ...

    async def ports(self) -> list[PortView]: ...

    async def queues(self) -> list[QueueView]: ...

    async def events(self) -> list[QueueEvent]:
        """What happened to VM queues, as far as it is kept, the newest last."""
        ...

    async def apply(self, text: str, source: str, dry_run: bool, confirm_within: float) -> Outcome:
        """Put the config ``text`` in force, all of it or none. ``source`` names it in errors.

        A takeover that was never confirmed goes back after ``confirm_within`` seconds.
        """
        ...

    async def port_add(self, name: str, spec: dict[str, JsonValue], keep: bool, dry_run: bool) -> Outcome:
        """Add a port; ``spec`` has the keys of ``ports.NAME`` in the config that were given."""
        ...

    async def port_set(self, name: str, spec: dict[str, JsonValue], dry_run: bool) -> Outcome:
        """Change the given keys of a port; a key with the value ``None`` goes back to its default."""
        ...

    async def port_remove(self, name: str, dry_run: bool) -> Outcome: ...

    async def confirm(self) -> TakeoverView:
        """Keep the takeover that waits, also after a reboot; returns what was kept."""
        ...

    async def rollback(self) -> Outcome:
        """Take the takeover that waits back at once, with the config that brought it."""
        ...

    async def detach(self, everything: bool) -> Outcome:
        """Take the fast path out; with ``everything`` also the bridges and all changed settings."""
        ...


class _Body(View):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, data: object) -> object:
        """Python's parser takes NaN and lone surrogates, which no answer and no file could hold."""
        try:
            json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"not what JSON allows: {ascii(str(error))[1:-1]}") from error
        return data


class ApplyBody(_Body):
    """A config to put in force."""

    text: str = Field(description="The config, as YAML.")
    source: str = Field(default="config", description="What to call it in errors: the file's name.")
    dry_run: bool = Field(default=False, description="Only say what would change.")
    confirm_within: float = Field(
        default=DEFAULT_WITHIN,
        ge=MIN_WITHIN,
        le=MAX_WITHIN,
        strict=False,
        description="Seconds after which a takeover of a NIC with the host's addresses goes back by itself, "
        "unless it was confirmed, now or before.",
    )


class PortAddBody(_Body):
    """A port to add."""

    name: str = Field(description="The port's name.")
    spec: dict[str, JsonValue] = Field(description="The keys of ports.NAME in the config.")
    keep: bool = Field(default=False, description="Keep the port over a reboot.")
    dry_run: bool = Field(default=False, description="Only say what would change.")


class PortSetBody(_Body):
    """What to change about a port."""

    spec: dict[str, JsonValue] = Field(description="The keys to change; null puts a key back to its default.")
    dry_run: bool = Field(default=False, description="Only say what would change.")


class DetachBody(_Body):
    """What to take out."""

    everything: bool = Field(
        default=False, description="Also take out the bridges and give every changed setting back."
    )


def build(service: Service) -> FastAPI:
    """The API over ``service``. Building it calls nothing of the service."""
    app = FastAPI(
        title="offload",
        version=offload.__version__,
        description="VMQ for Linux. Every answer that is not a success has a ProblemBody.",
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ProblemBody, "description": "What went wrong."}},
    )
    app.add_middleware(_LimitBody)
    app.add_exception_handler(OffloadError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    _add_reading_routes(app, service)
    _add_changing_routes(app, service)
    return app


def _add_reading_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/status")
    async def status() -> StatusView:
        """The daemon at a glance."""
        return await service.status()

    @app.get("/v1/nics")
    async def nics() -> list[NicView]:
        """The NICs, with what is in force on each."""
        return await service.nics()

    @app.get("/v1/switches")
    async def switches() -> list[SwitchView]:
        """The virtual switches."""
        return await service.switches()

    @app.get("/v1/ports")
    async def ports() -> list[PortView]:
        """The ports, with their paths, queues and counters."""
        return await service.ports()

    @app.get("/v1/queues")
    async def queues() -> list[QueueView]:
        """The queues of all NICs, the default queues included."""
        return await service.queues()

    @app.get("/v1/events")
    async def events() -> list[QueueEvent]:
        """What happened to VM queues, the newest last. The last thousand since the daemon started."""
        return await service.events()


def _add_changing_routes(app: FastAPI, service: Service) -> None:
    @app.put("/v1/config")
    async def apply(body: ApplyBody) -> Outcome:
        """Put a config in force: all of it or none of it."""
        return await service.apply(body.text, body.source, body.dry_run, body.confirm_within)

    @app.post("/v1/ports")
    async def port_add(body: PortAddBody) -> Outcome:
        """Add a port that is not in the config file."""
        return await service.port_add(body.name, body.spec, body.keep, body.dry_run)

    @app.patch("/v1/ports/{name}")
    async def port_set(name: str, body: PortSetBody) -> Outcome:
        """Change a port that is not in the config file."""
        return await service.port_set(name, body.spec, body.dry_run)

    @app.delete("/v1/ports/{name}")
    async def port_remove(name: str, dry_run: bool = False) -> Outcome:
        """Remove a port that is not in the config file."""
        return await service.port_remove(name, dry_run)

    @app.post("/v1/takeover/confirm")
    async def confirm() -> TakeoverView:
        """Keep the takeover that waits."""
        return await service.confirm()

    @app.post("/v1/takeover/rollback")
    async def rollback() -> Outcome:
        """Take the takeover that waits back at once, with the config that brought it."""
        return await service.rollback()

    @app.post("/v1/detach")
    async def detach(body: DetachBody) -> Outcome:
        """Take the fast path out and leave the bridges forwarding."""
        return await service.detach(body.everything)


def _answer(status: int, body: ProblemBody) -> JSONResponse:
    return JSONResponse(body.model_dump(mode="json"), status)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OffloadError)
    status = next(status for kind, status in _HTTP_STATUS if isinstance(error, kind))
    problems = error.problems if isinstance(error, ConfigError) else ()
    # Clients know the classes of errors.py; a narrower one is of no use to them.
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == OffloadError.__module__)
    body = ProblemBody(
        error=known.__name__,
        message=str(error),
        exit_code=error.exit_code,
        source=error.source if isinstance(error, ConfigError) else None,
        problems=[ProblemItem(path=p.path, value=p.value, allowed=p.allowed) for p in problems],
    )
    return _answer(status, body)


async def _malformed(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    problems = [
        ProblemItem(
            path=".".join(str(part) for part in item["loc"]),
            # Whatever was sent, ascii() of it can be encoded.
            value=ascii(item.get("input"))[:_SHOWN],
            allowed=item["msg"],
        )
        for item in found
    ]
    not_json = any(item["type"] == "json_invalid" for item in found)
    body = ProblemBody(
        error=UsageError.__name__,
        message="bad request: " + "; ".join(f"{p.path}: {p.allowed}" for p in problems),
        exit_code=UsageError.exit_code,
        problems=problems,
    )
    return _answer(400 if not_json else 422, body)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    body = ProblemBody(
        error=UsageError.__name__,
        message=f"{request.method} {request.url.path}: {error.detail}",
        exit_code=UsageError.exit_code,
    )
    return _answer(error.status_code, body)


async def _bug(_request: Request, error: Exception) -> JSONResponse:
    # Starlette raises the error again after this answer, so that the daemon's log has the traceback.
    body = ProblemBody(
        error=OffloadError.__name__,
        message=f"a bug in offload, see the daemon's log: {type(error).__name__}: {ascii(str(error))[1:-1]}",
        exit_code=OffloadError.exit_code,
    )
    return _answer(500, body)


class _LimitBody:
    """Refuses a request whose body is longer than MAX_BODY, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = MAX_BODY

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request is longer than {MAX_BODY} bytes")
            return message

        await self.app(scope, counted, send)


class ApiServer(uvicorn.Server):
    """A uvicorn server on a unix socket, inside somebody else's event loop.

    The socket accepts connections from construction on and is served by
    ``await server.serve()``, which returns after ``stop()`` and removes the socket.
    Signals are left to the caller, and logging stays as it is configured.
    """

    def __init__(self, app: ASGIApp, socket_path: Path) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                date_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=5,
            )
        )
        self.socket_path = socket_path
        self._listener = unix.listen(socket_path, SOCKET_MODE)
        self._named = True
        self._stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def serve(self, sockets: list[Any] | None = None) -> None:
        """Answer requests until ``stop()`` is called."""
        try:
            await super().serve(sockets=[self._listener])
        finally:
            self.close()

    async def main_loop(self) -> None:
        """Wait for ``stop()``: uvicorn's own looks for something to do ten times a second."""
        self._loop = asyncio.get_running_loop()
        if not await self.on_tick(0):  # it makes the headers of all answers
            await self._stopped.wait()
        self._loop = None

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Take the name away first: once we stop answering, the next daemon may take it."""
        self._unlink()
        await super().shutdown(sockets)

    def stop(self) -> None:
        """Finish the requests under way and return from ``serve()``. Idempotent, from any thread."""
        self.should_exit = True
        if loop := self._loop:
            loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """Remove and close the socket, whether it was ever served or not. Idempotent."""
        self._unlink()
        self._listener.close()

    def _unlink(self) -> None:
        if self._named:
            self._named = False
            self.socket_path.unlink(missing_ok=True)


def serve(app: ASGIApp, socket_path: Path) -> ApiServer:
    """A server for ``app`` at ``socket_path``, listening but not yet answering.

    A socket left by a dead daemon is replaced. Errors: see ``offload.kernel.unix.listen``.
    """
    return ApiServer(app, socket_path)
