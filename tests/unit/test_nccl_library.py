"""The binding of NCCL against a library that was built for the test: what is called, with what, and what errors say."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from weight_transfer import _core

SOURCE = r"""
#include <cstddef>
#include <cstring>
struct Id { char bytes[128]; };
struct Config {
    std::size_t size; unsigned magic, version; int blocking, cga, min_ctas, max_ctas; const char* net; int split;
};
extern "C" {
int the_version = 22800, waits = 2, fails = 0, aborted = 0, groups = 0, sent = 0, root = -1;
std::size_t bytes = 0;
void* stream = nullptr;
Config config;
int rank = -1, ranks = 0, state = 0;
char first = 0;
int ncclGetVersion(int* v) { *v = the_version; return 0; }
int ncclGetUniqueId(Id* id) { std::memset(id, 7, sizeof(*id)); return 0; }
int ncclCommInitRankConfig(void** comm, int n, Id id, int r, Config* c) {
    if (fails) return 3;
    config = *c; rank = r; ranks = n; first = id.bytes[0]; *comm = &state; state = 0;
    return 7;
}
int ncclCommGetAsyncError(void*, int* s) { *s = fails ? 6 : state++ < waits ? 7 : 0; return 0; }
int ncclGroupStart() { ++groups; return 0; }
int ncclGroupEnd() { state = 0; return 7; }
int ncclBroadcast(const void* from, void* to, std::size_t n, int dtype, int r, void*, void* s) {
    if (from != to || dtype != 1) return 4;
    ++sent; bytes += n; root = r; stream = s;
    return 0;
}
int ncclCommAbort(void*) { ++aborted; return 0; }
const char* ncclGetErrorString(int result) { return result == 6 ? "remote process exited" : "internal error"; }
const char* ncclGetLastError(void*) { return fails ? "no socket" : ""; }
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nccl")
    (folder / "nccl.cpp").write_text(SOURCE)
    command = ["g++", "-shared", "-fPIC", "-o", str(folder / "libnccl.so.2"), str(folder / "nccl.cpp")]
    subprocess.run(command, check=True, timeout=60)
    return folder / "libnccl.so.2"


@pytest.fixture
def library(built: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built))
    for name in ("fails", "aborted", "groups", "sent"):
        number(library, name).value = 0
    number(library, "waits").value = 2
    ctypes.c_size_t.in_dll(library, "bytes").value = 0
    assert _core.load_nccl(str(built)) == 22800
    return library


def number(library: ctypes.CDLL, name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(library, name)


def test_it_joins_without_blocking(library: ctypes.CDLL) -> None:
    ours = _core.Communicator(bytes([9]) * 128, 1, 2)
    assert [ours.ready() for _ in range(3)] == [False, False, True]
    assert (number(library, "rank").value, number(library, "ranks").value) == (1, 2)
    assert ctypes.c_char.in_dll(library, "first").value == b"\x09"
    size, magic_version, blocking = (ctypes.c_size_t * 6).in_dll(library, "config")[:3]
    assert (size, magic_version & 0xFFFFFFFF, magic_version >> 32) == (48, 0xCAFEBEEF, 21800)
    assert blocking & 0xFFFFFFFF == 0


def test_a_unique_id_is_the_librarys(library: ctypes.CDLL) -> None:
    assert _core.nccl_unique_id() == bytes([7]) * 128


def test_spans_go_as_one_group(library: ctypes.CDLL) -> None:
    ours = _core.Communicator(bytes(128), 0, 2)
    ours.broadcast([(4096, 100), (8192, 28)], 0, 1234)
    assert (number(library, "groups").value, number(library, "sent").value) == (1, 2)
    assert ctypes.c_size_t.in_dll(library, "bytes").value == 128
    assert ctypes.c_void_p.in_dll(library, "stream").value == 1234
    assert number(library, "state").value == 3, "it was asked until it had begun"


def test_what_does_not_begin_at_once_is_left_to_whoever_waits(library: ctypes.CDLL) -> None:
    ours = _core.Communicator(bytes(128), 0, 2)
    number(library, "waits").value = 1 << 30
    ours.broadcast([(4096, 100)], 0, 1234)
    assert not ours.ready()
    number(library, "fails").value = 1
    ours.broadcast([(4096, 100)], 0, 1234)
    with pytest.raises(RuntimeError, match="NCCL: remote process exited"):
        ours.ready()


def test_errors_have_its_words(library: ctypes.CDLL) -> None:
    ours = _core.Communicator(bytes(128), 0, 2)
    number(library, "fails").value = 1
    with pytest.raises(RuntimeError, match=r"NCCL: remote process exited \(no socket\)"):
        ours.ready()
    with pytest.raises(RuntimeError, match="ncclCommInitRankConfig: internal error"):
        _core.Communicator(bytes(128), 0, 2)
    with pytest.raises(ValueError, match="128 bytes"):
        _core.Communicator(b"short", 0, 2)


def test_it_is_aborted_once(library: ctypes.CDLL) -> None:
    ours = _core.Communicator(bytes(128), 0, 2)
    ours.abort()
    ours.abort()
    with pytest.raises(RuntimeError, match="was aborted"):
        ours.ready()
    with pytest.raises(RuntimeError, match="was aborted"):
        ours.broadcast([], 0, 0)
    del ours
    assert number(library, "aborted").value == 1
    _core.Communicator(bytes(128), 0, 2)  # one that nobody holds any more
    assert number(library, "aborted").value == 2


def test_no_library_and_one_that_is_too_old_are_told(built: Path) -> None:
    with pytest.raises(RuntimeError, match="NCCL cannot be loaded"):
        _core.load_nccl("/nowhere/libnccl.so.2")
    with pytest.raises(RuntimeError, match="this NCCL has no ncclGetVersion"):
        _core.load_nccl("libm.so.6")
    number(ctypes.CDLL(str(built)), "the_version").value = 21000
    with pytest.raises(RuntimeError, match=r"version 21000; 2\.18 is needed"):
        _core.load_nccl(str(built))
    number(ctypes.CDLL(str(built)), "the_version").value = 22800
