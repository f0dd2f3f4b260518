"""The trainer's end of the descriptor socket, with a service that is none."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.session_sockets import NOBODY, as_root, open_descriptors
from weight_transfer import descriptors


class Impostor:
    """Listens, and answers what a test wants."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tdm")
        self.path = f"{self.folder.name}/s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(answer,))
        self._thread.start()

    def _serve(self, answer: Callable[[socket.socket], None]) -> None:
        connection, _ = self._listener.accept()
        with connection:
            answer(connection)

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join(5)
        self._listener.close()
        self.folder.cleanup()
        assert not self._thread.is_alive()


def send(status: bytes, count: int) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(32)
        with open("/dev/null") as null:
            socket.send_fds(connection, [status], [null.fileno()] * count)

    return answer


ANSWERS = {
    "no": (lambda c: descriptors.refuse(c), "gave no descriptors"),
    "no, with descriptors": (send(descriptors.REFUSED, 2), "gave no descriptors"),
    "too few": (send(descriptors.OK, 1), "answered out of protocol"),
    "too many": (send(descriptors.OK, 3), "answered out of protocol"),
    "far too many": (send(descriptors.OK, 100), "answered out of protocol"),
    "none": (send(descriptors.OK, 0), "answered out of protocol"),
    "another word": (send(b"\x07", 2), "answered out of protocol"),
    "goodbye": (lambda c: c.recv(32) and None, "answered out of protocol"),
}


@pytest.mark.parametrize(("answer", "text"), ANSWERS.values(), ids=ANSWERS)
def test_answers_out_of_protocol(answer: Callable[[socket.socket], None], text: str) -> None:
    gc.collect()  # what earlier tests left to the collector is not ours to count
    before = open_descriptors()
    with Impostor(answer) as impostor, pytest.raises(PermissionError, match=text):
        descriptors.receive(impostor.path, b"x" * 32, 2, 5.0)
    assert open_descriptors() <= before, "descriptors that came along were left open"


def test_a_service_that_says_nothing_is_given_up() -> None:
    over = threading.Event()
    with Impostor(lambda c: over.wait(5) and None) as impostor:
        with pytest.raises(TimeoutError):
            descriptors.receive(impostor.path, b"x" * 32, 2, 0.05)
        over.set()


def test_nobody_there(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError, match=f"containers must share .*folder.*: '{tmp_path}/s'"):
        descriptors.receive(str(tmp_path / "s"), b"x" * 32, 2, 5.0)
    with pytest.raises(OSError, match="too long"):
        descriptors.receive("/" + "x" * 200, b"x" * 32, 2, 5.0)
    assert open_descriptors() <= before


def test_a_full_queue_is_waited_for_and_no_longer_than_asked() -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{folder}/s")
            with pytest.raises(TimeoutError, match="busy"):
                descriptors.receive(f"{folder}/s", b"x" * 32, 2, 0.05)


IMPOSTOR_AS_ANOTHER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
os.setgid({user}); os.setuid({user})
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(32)), flush=True)
"""


@as_root
def test_another_users_service_is_told_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        path = f"{folder}/s"
        command = [sys.executable, "-c", IMPOSTOR_AS_ANOTHER.format(user=NOBODY), path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as impostor:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == "listening\n"
            with pytest.raises(PermissionError, match=f"belongs to uid {NOBODY}"):
                descriptors.receive(path, b"x" * 32, 2, 5.0)
            assert impostor.stdout.readline() == "0\n", "it was told the token"
            impostor.wait(5)
