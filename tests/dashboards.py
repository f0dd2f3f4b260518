"""The dashboard as its users have it: over HTTP, before a real job service on a real store."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

from tandem.dashboard.server import Settings, serving
from tandem.rpc import Serving, ServingConfig
from tandem.trainer.v1.trainer_pb2_grpc import add_TrainingJobServiceServicer_to_server
from tests.jobs import spec
from trainer_service.jobs.attempts import Limits
from trainer_service.jobs.states import Move
from trainer_service.jobs.store import Event, EventKind, open_store
from trainer_service.jobs.supervisor import Supervisor
from trainer_service.server import JOBS
from trainer_service.servicer import TrainingJobServicer


class Jobs:
    """The trainer service's own parts, less what gives jobs their turn: a test says what happens to them."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix://{folder}/t.sock"
        self.store = open_store("", folder)
        self.store.lock()
        self._supervisor = Supervisor(self.store, folder / "jobs", Limits())
        self._serving: Serving | None = None
        self.watches = 0

    async def start(self) -> None:
        config = ServingConfig(addresses=(self.address,), handle_signals=False, grace_s=0.0)
        self._serving = Serving(config)
        servicer = _Counting(self._supervisor, self)
        add = add_TrainingJobServiceServicer_to_server
        self._serving.add(add, servicer, JOBS, long_lived=["WatchJob"])
        await self._serving.start()

    async def stop(self) -> None:
        if self._serving is not None:
            self._serving.request_stop(now=True)
            await self._serving.wait()
            self._serving = None

    def add(self, name: str, **fields: Any) -> str:
        return self.store.create(name, spec(**fields)).id

    def run(self, job_id: str) -> None:
        self.store.move(job_id, Move.START, attempt=1)
        self.store.move(job_id, Move.RUN)
        self._supervisor.feed.notify(job_id)

    def happens(self, job_id: str, *events: tuple[EventKind, dict[str, Any]]) -> None:
        made = [Event(kind, time.time(), 1, body) for kind, body in events]
        last = next((body["step"] for kind, body in reversed(events) if kind is EventKind.METRICS), None)
        self.store.append(job_id, made, **({} if last is None else {"step": last}))
        self._supervisor.feed.notify(job_id)

    def ends(self, job_id: str, move: Move = Move.SUCCEED, reason: str = "") -> None:
        self.store.move(job_id, move, reason)
        self._supervisor.feed.notify(job_id)


class _Counting(TrainingJobServicer):
    def __init__(self, supervisor: Supervisor, jobs: Jobs) -> None:
        super().__init__(supervisor)
        self._told = jobs

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._told.watches += 1
        async for response in super().WatchJob(request, context):
            yield response


@asynccontextmanager
async def jobs_service(folder: Path) -> AsyncIterator[Jobs]:
    """The service, serving, with an empty store."""
    jobs = Jobs(folder)
    try:
        await jobs.start()
        yield jobs
    finally:
        await jobs.stop()
        jobs.store.close()


class Browser:
    """What a browser does for a page, less the page."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.origin = url, url.partition("/?")[0]
        self._session = session

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return await self.ask("GET", path, headers)

    async def post(self, path: str, **more: str) -> tuple[int, Any]:
        """As the page does. `more` are headers that differ."""
        csrf = (await self.get("/api/session"))[1]["csrf"]
        headers = {"Origin": self.origin, "X-CSRF-Token": csrf, "Sec-Fetch-Site": "same-origin"} | more
        return await self.ask("POST", path, {name: value for name, value in headers.items() if value})

    async def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self._session.request(method, f"{self.origin}{path}", headers=headers) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    async def open(self, url: str = "") -> aiohttp.ClientResponse:
        """Open an address, by default the one that was written: its cookie stays."""
        async with self._session.get(url or self.url) as response:
            await response.read()
            return response

    @asynccontextmanager
    async def stream(self, job_id: str, after: int = 0) -> AsyncIterator[Stream]:
        headers = {"Last-Event-ID": str(after)} if after else {}
        async with self._session.get(f"{self.origin}/api/jobs/{job_id}/events", headers=headers) as response:
            assert response.status == 200
            yield Stream(response)


class Stream:
    """Server-sent events as they come: kind, data and id."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._lines = response.content

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Any, int | None]:
        fields: dict[str, str] = {}
        while line := (await self._lines.readline()).decode():
            if line != "\n":
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value
            elif "data" in fields:
                number = fields.get("id")
                return fields["event"], json.loads(fields["data"]), int(number) if number else None
        raise StopAsyncIteration

    async def until(self, kind: str) -> tuple[Any, int | None]:
        """The next event of a kind."""
        async for found, data, number in self:
            if found == kind:
                return data, number
        raise AssertionError(f"the stream ended without {kind}")


@asynccontextmanager
async def dashboard(trainer: str, inference: str = "unix:///nowhere", **more: Any) -> AsyncIterator[Browser]:
    """A dashboard on a free port, and a browser that has not opened it yet."""
    settings = Settings(address="127.0.0.1:0", trainer=trainer, inference=inference, **more)
    async with serving(settings) as url:
        # Browsers keep cookies of addresses in numbers too.
        jar = aiohttp.CookieJar(unsafe=True)
        limit = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(cookie_jar=jar, timeout=limit, read_bufsize=8 << 20) as session:
            yield Browser(url, session)
