"""Nobody reads the dashboard, or acts through it, without its token and from another site's page."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.cli import main
from tandem.dashboard.server import Settings, serving
from tandem.errors import FailedPrecondition, InvalidArgument
from tests.dashboards import Browser, Jobs, dashboard, jobs_service


@pytest.fixture
async def jobs(socket_folder: Path) -> AsyncIterator[Jobs]:
    async with jobs_service(socket_folder) as jobs:
        yield jobs


@pytest.fixture
async def browser(jobs: Jobs) -> AsyncIterator[Browser]:
    async with dashboard(jobs.address) as browser:
        yield browser


PATHS = ("/", "/static/app.js", "/api/session", "/api/jobs", "/api/jobs/j1/events", "/nowhere")


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_is_told_without_the_token(browser: Browser, path: str) -> None:
    for asked in (path, f"{path}?token=wrong", f"{path}?token="):
        status, told = await browser.get(asked)
        assert status == 403
        if path.startswith("/api/"):
            assert told["error"]["reason"] == "TOKEN_INVALID"
            told = f"{told['error']['message']}\n"
        assert told == "open the address that the dashboard wrote when it started: it has the token\n"


async def test_the_address_with_the_token_gives_a_cookie_that_scripts_cannot_read(browser: Browser) -> None:
    response = await browser.open()
    assert response.status == 200
    assert response.content_type == "text/html"
    (cookie,) = response.cookies.values()
    assert browser.url.endswith(cookie.value)
    assert len(cookie.value) >= 43
    assert (cookie["httponly"], cookie["samesite"]) == (True, "Strict")
    assert (await browser.get("/api/jobs"))[0] == 200


async def test_the_token_opens_the_first_page_alone(browser: Browser) -> None:
    query = browser.url.partition("?")[2]
    assert (await browser.get(f"/api/jobs?{query}"))[0] == 403


@pytest.mark.parametrize("path", PATHS)
async def test_each_answer_forbids_what_the_page_does_not_need(browser: Browser, path: str) -> None:
    refused = await browser.open(f"{browser.origin}{path}")
    assert refused.status == 403
    await browser.open()
    async with asyncio.timeout(10):
        given = await browser.open(f"{browser.origin}{path}")
    assert given.status == (404 if path == "/nowhere" else 200)
    for response in (refused, given):
        for name, value in {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            assert response.headers[name] == value
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


async def test_no_other_name_leads_to_it(browser: Browser) -> None:
    await browser.open()
    port = browser.origin.rpartition(":")[2]
    for host in (
        f"evil.example:{port}",
        "evil.example",
        f"127.0.0.1.evil.example:{port}",
        "8.8.8.8",
        "",
        "[",
        "a b",
    ):
        assert (await browser.get("/api/jobs", Host=host))[0] in (400, 403), host
    for host in (
        f"localhost:{port}",
        f"LOCALHOST:{port}",
        f"127.0.0.1:{port}",
        f"[::1]:{port}",
        "127.0.0.1:9000",
    ):
        assert (await browser.get("/api/jobs", Host=host))[0] == 200, host


async def test_other_sites_pages_can_do_nothing(browser: Browser, jobs: Jobs) -> None:
    await browser.open()
    jobs.add("job-1")
    wrong = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},  # another server of this host, to which the cookie goes too
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "wrong"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for headers in wrong:
        status, _ = await browser.post("/api/jobs/job-1/cancel", **headers)
        assert status == 403, headers
        assert jobs.store.get("job-1").state == "QUEUED"
    for site in ("cross-site", "same-site"):
        assert (await browser.get("/api/session", **{"Sec-Fetch-Site": site}))[0] == 403
    assert (await browser.post("/api/jobs/job-1/cancel"))[0] == 200
    assert jobs.store.get("job-1").state == "CANCELLED"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0.0.0.0:0", "open to other hosts"),
        ("example.org:0", "open to other hosts"),
        ("unix:///run/page.sock", "no browser opens"),
        ("127.0.0.1", "port"),
        ("192.0.2.1:0", "open to other hosts"),
    ],
)
async def test_addresses_that_are_refused(address: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        async with serving(Settings(address=address)):
            pass
    assert caught.value.violations[0].field == "address"


@pytest.mark.parametrize("flags", [["--address=0.0.0.0:0"], ["--address=nowhere"], ["--token-file=/none"]])
def test_the_command_says_what_is_wrong_with_its_flags(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", *flags]) == 2
    assert capsys.readouterr().err.startswith("tandem: FIELD_INVALID: ")


async def test_other_hosts_reach_it_only_if_that_was_said() -> None:
    async with serving(Settings(address="0.0.0.0:0", insecure=True)) as url:
        assert url.startswith("http://0.0.0.0:")


async def test_an_address_in_use_is_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(FailedPrecondition, match="choose another with --address"):
            async with serving(Settings(address=f"127.0.0.1:{other.getsockname()[1]}")):
                pass
