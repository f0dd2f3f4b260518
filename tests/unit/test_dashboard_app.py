"""What the page asks the dashboard for, before a real job service."""

from __future__ import annotations

import asyncio
import doctest
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tandem.client._aio import job as aio_job
from tandem.dashboard import feed as feeds
from tandem.dashboard import picture
from tandem.dashboard.server import Settings, serving
from tests.dashboards import Browser, Jobs, Stream, dashboard, jobs_service
from trainer_service.jobs.store import EventKind

METRICS, SAMPLES, LOG = EventKind.METRICS, EventKind.SAMPLES, EventKind.LOG
BAD = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_AGAIN_S", 0.05)
    monkeypatch.setattr(aio_job, "_AWAY_S", 0.01)


@pytest.fixture
async def jobs(socket_folder: Path) -> AsyncIterator[Jobs]:
    async with jobs_service(socket_folder) as jobs:
        yield jobs


@pytest.fixture
async def browser(jobs: Jobs) -> AsyncIterator[Browser]:
    async with dashboard(jobs.address) as browser:
        await browser.open()
        yield browser


def step(number: int, **values: float) -> tuple[EventKind, dict[str, Any]]:
    return METRICS, {"step": number, "max_steps": 100, "epoch": 0.5, "values": values}


def line(text: str) -> tuple[EventKind, dict[str, Any]]:
    return LOG, {"text": text}


async def test_jobs_come_the_newest_first_and_page_by_page(browser: Browser, jobs: Jobs) -> None:
    names = [jobs.add(f"job-{n}", labels={"n": str(n)}) for n in range(5)][::-1]
    jobs.run("job-0")
    status, found = await browser.get("/api/jobs?limit=2")
    assert status == 200
    assert [job["id"] for job in found["jobs"]] == names[:2]
    assert found["more"]
    for limit in (5, 6):
        _, found = await browser.get(f"/api/jobs?limit={limit}")
        assert [job["id"] for job in found["jobs"]] == names
        assert not found["more"]
    assert found["jobs"][0]["labels"] == {"n": "4"}
    _, running = await browser.get("/api/jobs?state=RUNNING&state=FAILED")
    (job,) = running["jobs"]
    assert (job["id"], job["state"], job["attempt"], job["algorithm"]) == ("job-0", "RUNNING", 1, "grpo")
    assert (await browser.get("/api/jobs/job-0"))[1] == job


@pytest.mark.parametrize(
    ("path", "status", "reason", "field"),
    [
        ("/api/jobs?limit=0", 400, "FIELD_INVALID", "limit"),
        ("/api/jobs?limit=1001", 400, "FIELD_INVALID", "limit"),
        ("/api/jobs?limit=x", 400, "FIELD_INVALID", "limit"),
        ("/api/jobs?state=NAPPING", 400, "FIELD_INVALID", "states"),
        ("/api/jobs/none", 404, "JOB_NOT_FOUND", None),
        ("/api/jobs/none/engines", 404, "JOB_NOT_FOUND", None),
        ("/api/nothing", 404, "PATH_UNKNOWN", None),
        ("/static/..%2fapp.py", 404, "PATH_UNKNOWN", None),
    ],
)
async def test_errors_have_a_reason_and_the_field(
    browser: Browser, path: str, status: int, reason: str, field: str | None
) -> None:
    got, body = await browser.get(path)
    assert got == status
    assert body["error"]["reason"] == reason
    assert [violation["field"] for violation in body["error"]["violations"]] == ([field] if field else [])


async def test_actions_are_the_services(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    status, body = await browser.post("/api/jobs/job-1/resume")
    assert (status, body["error"]["reason"]) == (409, "JOB_STATE")
    status, body = await browser.post("/api/jobs/job-1/cancel")
    assert (status, body["state"]) == (200, "CANCELLED")
    status, body = await browser.post("/api/jobs/job-1/resume")
    assert (status, body["state"]) == (200, "QUEUED")
    assert await browser.post("/api/jobs/job-1/delete") == (200, {})
    assert (await browser.get("/api/jobs"))[1]["jobs"] == []
    assert (await browser.post("/api/jobs/job-1/explode"))[0] == 404
    assert (await browser.post("/api/jobs/job-1/cancel"))[1]["error"]["reason"] == "JOB_NOT_FOUND"


async def test_a_page_gets_what_was_and_then_what_comes(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    jobs.run("job-1")
    sample = {"prompt": BAD, "completion": "4", "rewards": {"r": 0.5}, "advantage": -1.0, "weight_version": 7}
    jobs.happens("job-1", step(1, reward=0.25), (SAMPLES, {"step": 1, "samples": [sample]}), line("hello"))
    async with browser.stream("job-1") as stream:
        assert await stream.until("service") == ({"up": True}, None)
        events, number = await stream.until("picture")
        assert number == 6
        assert [kind for kind, _ in events] == ["state", "state", "state", "metrics", "samples", "log"]
        assert [event["sequence"] for _, event in events] == [1, 2, 3, 4, 5, 6]
        assert events[3][1]["values"] == {"reward": 0.25}
        assert events[4][1]["samples"] == [sample]
        jobs.happens("job-1", step(2, reward=0.5, loss=math.inf))
        told, number = await stream.until("metrics")
        assert (told["step"], told["values"], number) == (2, {"reward": 0.5, "loss": "Infinity"}, 7)
        jobs.ends("job-1")
        told, number = await stream.until("state")
        assert (told["old_state"], told["state"], number) == ("RUNNING", "SUCCEEDED", 8)


async def test_a_page_that_comes_back_gets_what_it_missed(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    jobs.happens("job-1", *(line(f"line {n}") for n in range(2, 6)))
    async with browser.stream("job-1") as stream:
        assert (await stream.until("picture"))[1] == 5
    jobs.happens("job-1", line("line 6"), line("line 7"))
    async with browser.stream("job-1", after=4) as stream:
        told = [await stream.until("log") for _ in range(3)]
    assert [(event["text"], number) for event, number in told] == [(f"line {n}", n) for n in (5, 6, 7)]
    async with browser.stream("job-1", after=99) as stream:  # of another job that had this name
        assert (await stream.until("picture"))[1] == 7


async def test_one_watch_of_the_service_is_for_all_pages(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    async with browser.stream("job-1") as one, browser.stream("job-1") as two:
        for stream in (one, two):
            await stream.until("picture")
        jobs.happens("job-1", line("for all"))
        for stream in (one, two):
            assert (await stream.until("log"))[0]["text"] == "for all"
        async with browser.stream("job-1") as three:
            assert (await three.until("picture"))[1] == 2
    assert jobs.watches == 1


async def test_a_job_that_is_resumed_goes_on_in_an_open_page(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    async with browser.stream("job-1") as stream:
        await stream.until("picture")
        for action, state in (("cancel", "CANCELLED"), ("resume", "QUEUED")):
            await browser.post(f"/api/jobs/job-1/{action}")
            assert (await stream.until("state"))[0]["state"] == state
        await browser.post("/api/jobs/job-1/delete")
        while not (told := (await stream.until("service"))[0]).get("gone"):
            pass
        assert told["error"]["reason"] == "JOB_NOT_FOUND"
        async for kind, _, _ in stream:
            raise AssertionError(f"{kind} came of a job that is gone")


async def test_a_service_that_is_away_is_told_of_until_it_is_back(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    jobs.run("job-1")
    async with browser.stream("job-1") as stream:
        await stream.until("picture")
        await jobs.stop()
        told, _ = await stream.until("service")
        assert (told["up"], told["error"]["reason"]) == (False, "UNREACHABLE")
        status, body = await browser.get("/api/jobs")
        assert (status, body["error"]["reason"]) == (503, "UNREACHABLE")
        jobs.happens("job-1", line("meanwhile"))
        await jobs.start()
        assert (await stream.until("service"))[0] == {"up": True}
        assert (await stream.until("log"))[0]["text"] == "meanwhile"


async def test_a_page_may_be_opened_before_the_service_is_there(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    await jobs.stop()
    async with browser.stream("job-1") as stream:
        assert (await stream.until("service"))[0]["up"] is False
        await jobs.start()
        assert (await stream.until("picture"))[1] == 1


async def test_long_histories_are_thinned_and_long_texts_cut(browser: Browser, jobs: Jobs) -> None:
    jobs.add("job-1")
    jobs.run("job-1")
    many = {f"figure {n}": 1.0 for n in range(300)}
    long = {"prompt": "p" * 9000, "completion": "c", "rewards": {}, "weight_version": 1}
    jobs.happens(
        "job-1",
        *(line(f"{n} {'x' * 5000}") for n in range(600)),
        *(step(n, **(many if n == 1 else {"loss": 1.0})) for n in range(1, 2502)),
        *((SAMPLES, {"step": n, "samples": [long] * 20}) for n in range(30)),
    )
    async with browser.stream("job-1") as stream:
        events, number = await stream.until("picture")
    assert number == 3 + 600 + 2501 + 30
    kept = {
        kind: [event for other, event in events if other == kind] for kind in ("log", "metrics", "samples")
    }
    assert [event["text"][:4] for event in kept["log"]] == [f"{n} "[:4] for n in range(100, 600)]
    assert max(len(event["text"]) for event in kept["log"]) == 2000
    steps = [event["step"] for event in kept["metrics"]]
    assert steps == [*range(1, 2501, 2), 2501]
    assert len(kept["metrics"][0]["values"]) == 100
    assert [len(event["samples"]) for event in kept["samples"]] == [8] * 12
    assert len(kept["samples"][0]["samples"][0]["prompt"]) == 4000


async def test_too_many_pages_are_refused(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(feeds.Feeds):
        def __init__(self, client: Any) -> None:
            super().__init__(client, most=2, linger_s=0.0)

    monkeypatch.setattr("tandem.dashboard.app.Feeds", Few)
    jobs.add("job-1")
    async with dashboard(jobs.address) as browser:
        await browser.open()
        async with browser.stream("job-1"), browser.stream("job-1"):
            status, body = await browser.get("/api/jobs/job-1/events")
            assert (status, body["error"]["reason"]) == (429, "QUEUE_FULL")


async def test_a_wrong_last_event_id_is_refused(browser: Browser) -> None:
    status, body = await browser.get("/api/jobs/j/events", **{"Last-Event-ID": "x"})
    assert (status, body["error"]["violations"][0]["field"]) == (400, "Last-Event-ID")


async def test_streams_end_with_the_dashboard(jobs: Jobs) -> None:
    jobs.add("job-1")
    jar = aiohttp.CookieJar(unsafe=True)
    async with asyncio.timeout(10), aiohttp.ClientSession(cookie_jar=jar) as session:
        async with serving(Settings(address="127.0.0.1:0", trainer=jobs.address)) as url:
            async with session.get(url) as page:
                assert page.status == 200
            events = url.partition("?")[0] + "api/jobs/job-1/events"
            stream = Stream(await session.get(events))
            await stream.until("picture")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_engines_that_do_not_answer_are_told_of(browser: Browser, jobs: Jobs) -> None:
    _, body = await browser.get("/api/engines")
    (engine,) = body["engines"]
    assert (engine["address"], engine["error"]["reason"]) == ("unix:///nowhere", "UNREACHABLE")
    jobs.add("managed")
    assert (await browser.get("/api/jobs/managed/engines"))[1] == {"engines": []}
    jobs.run("managed")
    (engine,) = (await browser.get("/api/jobs/managed/engines"))[1]["engines"]
    assert engine["address"].endswith("/jobs/managed/i.sock")
    for name, address in {"near": "unix:///a", "far": "other.example:7000"}.items():
        jobs.add(name, inference={"service": {"addresses": [address]}})
    (near,) = (await browser.get("/api/jobs/near/engines"))[1]["engines"]
    assert (near["address"], near["error"]["reason"]) == ("unix:///a", "UNREACHABLE")
    (far,) = (await browser.get("/api/jobs/far/engines"))[1]["engines"]
    assert far["error"]["violations"][0]["field"] == "address"  # it takes TLS


async def test_the_token_goes_to_no_address_that_a_job_names(jobs: Jobs, socket_folder: Path) -> None:
    given, named = f"unix://{socket_folder}/given", f"unix://{socket_folder}/named"
    sent: dict[str, list[str | None]] = {given: [], named: []}

    class Recorder(grpc.GenericRpcHandler):
        def __init__(self, address: str) -> None:
            self._address = address

        def service(self, details: Any) -> None:
            sent[self._address].append(dict(details.invocation_metadata).get("authorization"))

    jobs.add("job-1", inference={"service": {"addresses": [given]}})
    jobs.add("job-2", inference={"service": {"addresses": [named]}})
    async with AsyncExitStack() as stack:
        for address in sent:
            server = grpc.aio.server(handlers=[Recorder(address)])
            server.add_insecure_port(address.replace("///", "/"))
            await server.start()
            stack.push_async_callback(server.stop, None)
        browser = await stack.enter_async_context(dashboard(jobs.address, given, token="t" * 32))
        await browser.open()
        for name in ("job-1", "job-2"):
            (engine,) = (await browser.get(f"/api/jobs/{name}/engines"))[1]["engines"]
            assert engine["error"]["code"] == "UNIMPLEMENTED"
    assert set(sent[given]) == {f"Bearer {'t' * 32}"}
    assert set(sent[named]) == {None}


def test_examples_in_docstrings_are_true() -> None:
    assert doctest.testmod(feeds) == (0, 1)


def test_steps_that_are_done_again_replace_what_they_were() -> None:
    curve = picture.Thinned(100)
    for number in [*range(10), *range(5, 8)]:
        curve.add(picture.Told(number, "metrics", "", number))
    assert [told.step for told in curve.points] == [0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_a_curve_stays_even_however_long_it_gets() -> None:
    curve = picture.Thinned(100)
    for number in range(10_000):
        curve.add(picture.Told(number, "metrics", "", number))
        assert len(curve.points) <= 100
        assert curve.points[-1].step == number
    steps = [told.step for told in curve.points]
    gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
    assert gaps == {128}
    assert steps[0] == 0
