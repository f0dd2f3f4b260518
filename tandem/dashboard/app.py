"""The page's files and what they ask for, over HTTP."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from importlib import resources
from pathlib import PurePath
from typing import Any

import structlog
from aiohttp import web

from tandem.client import AsyncTandemClient
from tandem.dashboard import shown
from tandem.dashboard.engines import Engines
from tandem.dashboard.feed import Feeds
from tandem.dashboard.guard import Guard, Handler, RefusedError
from tandem.errors import Internal, NotFound, Reason, TandemError, Unauthenticated, invalid

_log = structlog.get_logger("tandem.dashboard")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAUTHENTICATED": 502,  # it is the dashboard that the service does not know
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_MOST_JOBS = 1000
#: A page that takes nothing for so long is gone.
_WRITE_S = 30.0
_ACTIONS = ("cancel", "resume", "delete")


class Dashboard:
    """Answers the page."""

    def __init__(self, client: AsyncTandemClient, engines: Engines, guard: Guard) -> None:
        """Nothing is asked yet.

        Args:
            client: of the trainer service.
            engines: asks inference services.
            guard: decides who is answered.
        """
        self._client, self._engines, self._guard = client, engines, guard
        self._feeds = Feeds(client)
        self._files = dict(_files())

    def application(self) -> web.Application:
        """What aiohttp serves. It closes the client at its end."""
        application = web.Application(middlewares=[self._checked, _errors], client_max_size=1 << 16)
        application.on_response_prepare.append(self._guard.add_headers)
        application.on_shutdown.append(self._close)
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/static/{name}", self._file),
                web.get("/api/session", self._session),
                web.get("/api/jobs", self._jobs),
                web.get("/api/jobs/{id}", self._job),
                web.get("/api/jobs/{id}/events", self._events),
                web.get("/api/jobs/{id}/engines", self._job_engines),
                web.post("/api/jobs/{id}/{action}", self._act),
                web.get("/api/engines", self._service_engines),
            ]
        )
        return application

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            brings = self._guard.check(request)
        except RefusedError as refused:
            if request.path.startswith("/api/"):
                error = Unauthenticated(Reason.TOKEN_INVALID, str(refused))
                return _json({"error": shown.error(error)}, 403)
            return web.Response(status=403, text=f"{refused}\n")
        response = await handler(request)
        if brings:
            self._guard.set_cookie(response)
        return response

    async def _close(self, application: web.Application) -> None:
        await self._feeds.close()
        await self._client.close()

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return self._static("index.html")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        return self._static(request.match_info["name"])

    def _static(self, name: str) -> web.Response:
        if name not in self._files:
            raise web.HTTPNotFound
        kind, body = self._files[name]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _session(self, request: web.Request) -> web.StreamResponse:
        return _json({"csrf": self._guard.csrf})

    async def _jobs(self, request: web.Request) -> web.StreamResponse:
        """The newest jobs, and whether there are more."""
        given = request.query.get("limit", "50")
        limit = int(given) if given.isascii() and given.isdecimal() and len(given) < 5 else 0
        if not 1 <= limit <= _MOST_JOBS:
            raise invalid("limit", f"must be a whole number from 1 to {_MOST_JOBS}, is {given!r}")
        states = request.query.getall("state", [])
        rows: list[dict[str, Any]] = []
        more = False
        async with aclosing(self._client.jobs(states=states, page_size=min(limit + 1, 1000))) as jobs:
            async for job in jobs:
                if more := len(rows) == limit:
                    break
                rows.append(shown.job(job))
        return _json({"jobs": rows, "more": more})

    async def _job(self, request: web.Request) -> web.StreamResponse:
        return _json(shown.job(await self._client.job(request.match_info["id"])))

    async def _act(self, request: web.Request) -> web.StreamResponse:
        action = request.match_info["action"]
        if action not in _ACTIONS:
            raise web.HTTPNotFound
        job = await self._client.job(request.match_info["id"])
        if action == "delete":
            await job.delete()
            return _json({})
        return _json(shown.job(await (job.cancel() if action == "cancel" else job.resume())))

    async def _job_engines(self, request: web.Request) -> web.StreamResponse:
        job = await self._client.job(request.match_info["id"])
        return _json({"engines": await self._engines.of_job(job)})

    async def _service_engines(self, request: web.Request) -> web.StreamResponse:
        return _json({"engines": await self._engines.of_service()})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """A job's events as they happen, after the one that the page had last."""
        given = request.headers.get("Last-Event-ID", "0")
        if not given.isascii() or not given.isdecimal() or len(given) > 18:
            raise invalid("Last-Event-ID", f"must be a sequence number, is {given[:40]!r}")
        async with self._feeds.reading(request.match_info["id"]) as feed:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async with aclosing(feed.messages(int(given))) as messages:
                try:
                    async for text in messages:
                        async with asyncio.timeout(_WRITE_S):
                            await response.write(text.encode())
                except (ConnectionError, TimeoutError):
                    pass  # the page is gone
        return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TandemError as error:
        return _failed(error)
    except web.HTTPException as error:
        if error.status == 404:
            return _failed(NotFound("PATH_UNKNOWN", "there is nothing at this address"))
        raise
    except Exception as error:  # noqa: BLE001  # nothing of it reaches the page
        incident = uuid.uuid4().hex[:12]
        _log.error("failed", incident=incident, path=request.path, exc_info=error)
        return _failed(Internal(Reason.BUG, f"a bug; the dashboard's log has it as {incident}"))


def _failed(error: TandemError) -> web.Response:
    return _json({"error": shown.error(error)}, _STATUS.get(error.code_name, 500))


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(text=shown.encode(value), status=status, content_type="application/json")


def _files() -> Iterator[tuple[str, tuple[str, bytes]]]:
    """The page's files: name, content type and content."""
    for file in resources.files("tandem.dashboard").joinpath("static").iterdir():
        if kind := _TYPES.get(PurePath(file.name).suffix):
            yield file.name, (kind, file.read_bytes())
