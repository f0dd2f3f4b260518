"""A reward service that is killed, stopped, or comes back, while rewards are asked for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tandem.errors import DeadlineExceeded, TandemError, Unavailable
from tests import rewards
from trainer_service.rewards import RemoteReward

COMPLETIONS = ["x" * i for i in range(6)]
PROMPTS = ["p"] * 6


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, function: RemoteReward) -> None:
        super().__init__()
        self.function = function
        self.found: list[float | None] | None = None
        self.error: TandemError | None = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        begin = time.monotonic()
        try:
            self.found = self.function(PROMPTS, COMPLETIONS)
        except TandemError as error:
            self.error = error
        self.seconds = time.monotonic() - begin
        self.function.close()

    def end(self, seconds: float = 30) -> Call:
        self.join(seconds)
        assert not self.is_alive(), "it hangs"
        return self


def until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_one_that_is_killed_within_a_batch_and_comes_back_answers_the_call(socket_folder: Path) -> None:
    with rewards.served("held", socket_folder) as service:
        call = Call(RemoteReward(service.address, timeout_s=60, batch_size=2))
        until((socket_folder / "called").exists, "it is called")
        service.signal(signal.SIGKILL)
    (socket_folder / "go").touch()
    with rewards.served("held", socket_folder):
        assert call.end(70).found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_one_that_is_killed_and_stays_away_is_told_by_the_deadline(
    socket_folder: Path,
) -> None:
    with rewards.served("held", socket_folder) as service:
        call = Call(RemoteReward(service.address, timeout_s=4.0, batch_size=2))
        until((socket_folder / "called").exists, "it is called")
        service.signal(signal.SIGKILL)
        call.end()
    assert isinstance(call.error, Unavailable)
    assert "the reward service held at unix:///" in call.error.message
    assert "is down" in call.error.message
    assert call.seconds < 7


def test_one_that_is_stopped_meets_the_deadline_and_answers_when_it_goes_on(socket_folder: Path) -> None:
    with rewards.served("length", socket_folder) as service:
        function = RemoteReward(service.address, timeout_s=2.0)
        function.check()
        service.signal(signal.SIGSTOP)
        call = Call(function).end()
        assert isinstance(call.error, DeadlineExceeded)
        assert "the reward service length at unix:///" in call.error.message
        assert 1.9 < call.seconds < 5
        fresh = Call(RemoteReward(service.address, timeout_s=2.0)).end()  # which connects to nobody
        assert isinstance(fresh.error, DeadlineExceeded | Unavailable)
        assert fresh.seconds < 5
        service.signal(signal.SIGCONT)
        again = Call(RemoteReward(service.address, timeout_s=20)).end()
        assert again.found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_one_that_is_told_to_end_is_asked_again_where_it_is_next(socket_folder: Path) -> None:
    """While it drains it refuses new calls, which then wait for it to come back."""
    with rewards.served("held", socket_folder, "--grace-s=0.1") as service:
        call = Call(RemoteReward(service.address, timeout_s=60, batch_size=2))
        until((socket_folder / "called").exists, "it is called")
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0, "a function that does not return keeps nobody from ending"
    (socket_folder / "go").touch()
    with rewards.served("held", socket_folder):
        call.end(70)
        assert call.found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], call.error
