"""The dashboard in a browser, with real services: a job learns, is looked at, and is ended through the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.v1 import engine_pb2
from tandem.weights.v1 import weights_pb2
from tests.job_service import JobService, Place, end_jobs, job_service
from tests.services import Service

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException  # noqa: E402
from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1500",
)
EVIL = "<script>owned=1</script><img src=x onerror=owned=1>&lt;"

pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason="needs Debian's packages chromium and chromium-driver"
)


class Page:
    """The page as somebody sees it who has a keyboard alone."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def until(self, seen: Callable[[], Any], what: str, seconds: float = 60) -> None:
        try:
            WebDriverWait(self.driver, seconds, 0.1).until(lambda _: seen())
        except TimeoutException:
            raise AssertionError(f"{what}; the page says:\n{self.text('body')}") from None

    def text(self, selector: str) -> str:
        return str(self._ask(selector, "innerText") or "")

    def until_text(self, selector: str, text: str, seconds: float = 60) -> None:
        self.until(lambda: text in self.text(selector), f"{selector} never has {text!r}", seconds)

    def press(self, selector: str, *keys: str) -> None:
        def pressed() -> bool:
            self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)
            return True

        # The page may draw itself anew between the two.
        waiting = WebDriverWait(self.driver, 20, 0.1, ignored_exceptions=[StaleElementReferenceException])
        waiting.until(lambda _: pressed())

    def confirm(self) -> None:
        """Say yes in the dialog, which asks with No under the keyboard."""
        assert self.driver.switch_to.active_element.text == "No"
        self.driver.switch_to.active_element.send_keys(Keys.TAB)
        self.driver.switch_to.active_element.send_keys(Keys.ENTER)

    def curve(self, name: str) -> str:
        """What a curve says of itself."""
        return str(self._ask(f'[aria-label="curve of {name}"] svg', "ariaLabel") or "")

    def _ask(self, selector: str, name: str) -> Any:
        """In one call: between two, the page may draw itself anew."""
        return self.driver.execute_script(
            "return document.querySelector(arguments[0])?.[arguments[1]]", selector, name
        )

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()


@pytest.fixture
def place(tmp_path: Path, checkpoints: dict[str, Path], llama: Service) -> Iterator[Place]:
    place = Place(tmp_path / "place", checkpoints["llama"])
    rows = [json.dumps({"prompt": EVIL}) for _ in range(16)]
    (place.folder / "prompts.jsonl").write_text("\n".join(rows))
    yield place
    llama.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)


@pytest.fixture
def jobs(socket_folder: Path, place: Place) -> Iterator[JobService]:
    with job_service(socket_folder, place) as service:
        yield service
    end_jobs(socket_folder)


@pytest.fixture
def url(jobs: JobService, llama: Service) -> Iterator[str]:
    """The address that the command writes."""
    flags = ["--address=127.0.0.1:0", f"--trainer={jobs.address}", f"--inference={llama.address}"]
    command = [sys.executable, "-m", "tandem.cli", "dashboard", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            assert process.wait(20) == 0


def version_of(service: Service) -> int:
    """The weight version that the engine has: other tests' trainers raised it too."""
    return service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=10).weight_version


def test_a_job_is_followed_and_ended_in_the_browser(
    page: Page, url: str, jobs: JobService, place: Place, llama: Service, socket_folder: Path
) -> None:
    first = version_of(llama)
    place.hold(3)
    place.hold(5)
    job = jobs.submit(place.spec(llama.address, steps=50, labels={"<b>team": EVIL})).id
    page.driver.get(url)
    page.until(lambda: page.driver.current_url == url.partition("?")[0], "the token stays in the address")
    page.until_text("tbody", job)
    page.until_text(".engine", "SERVING")
    page.press("tbody a", Keys.ENTER)

    page.until_text("#job-state", "RUNNING")
    page.until(lambda: "2 points" in page.curve("reward"), "two steps are no two points")
    before = page.run("document.querySelector('.curve').getAttribute('d')")
    assert EVIL in page.text("#samples .prompt")
    assert f"weight version {first + 1}" in page.text("#samples")
    assert "score" in page.text("#samples .reward-chip")
    assert page.run("document.querySelectorAll('#samples script, #samples img, dl b').length") == 0
    assert EVIL in page.text(".facts")
    place.let_go(3)
    page.until(lambda: "4 points" in page.curve("reward"), "the curve does not grow")
    assert page.run("document.querySelector('.curve').getAttribute('d')") != before
    page.until_text(".wide", "4/50")
    page.until_text("#log", "Loading weights")
    version = version_of(llama)
    assert version >= first + 3
    page.until_text(".engine", f"Weight version\n{version}")
    page.press('[aria-label="curve of loss"] select', "learning_rate")
    page.until(lambda: "4 points" in page.curve("learning_rate"), "another figure cannot be picked")
    page.press('[aria-label="curve of learning_rate"] svg', Keys.HOME)
    assert "at step 1" in page.text('[aria-label="curve of learning_rate"] output')
    assert page.run("typeof owned") == "undefined"
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []

    page.press("#cancel", Keys.ENTER)
    page.confirm()
    page.until_text("#job-state", "CANCELLING")
    place.let_go(5)
    page.until_text("#job-state", "CANCELLED")
    page.until_text(".changes", "checkpoint")
    assert not page.run("document.getElementById('resume').disabled")

    jobs.kill()
    page.until_text("#notice", "The trainer service does not answer")
    with job_service(socket_folder, place):
        page.until(lambda: page.text("#notice") == "", "the page does not come back")
        page.press("#delete", Keys.ENTER)
        page.confirm()
        page.until_text("main", "There are no jobs")


def test_without_the_token_the_browser_is_shown_nothing(page: Page, url: str) -> None:
    page.driver.delete_all_cookies()
    page.driver.get(url.partition("?")[0])
    assert page.text("body").strip().startswith("open the address that the dashboard wrote")
