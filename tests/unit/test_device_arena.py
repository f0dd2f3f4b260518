"""Arenas on a device, against a driver that was built for the test: which calls are made, and what is given back.

Its "device memory" is the host's, in files that two processes can map.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = r"""
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
typedef unsigned long long Address;
struct Ipc { unsigned char bytes[64]; };
static std::map<Address, std::pair<std::string, std::size_t>> memory;  // what is there, and in which file
static std::map<Address, std::size_t> opened;
static bool flag(const char* name) { const char* value = std::getenv(name); return value && *value == '1'; }
static void say(const char* what) { std::printf("%s\n", what); std::fflush(stdout); }
static std::string in_folder(const std::string& name) { return std::string(std::getenv("MEMORY")) + "/" + name; }
static Address mapped(const std::string& name, std::size_t size) {
    const std::string path = in_folder(name);
    int fd = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
    if (ftruncate(fd, size) != 0) return 0;
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return reinterpret_cast<Address>(at);
}
extern "C" {
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR_OF_THE_TEST"; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return index > 0 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** c, int) { *c = nullptr; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuCtxSynchronize() { say("synchronize"); return 0; }
int cuMemGetAllocationGranularity(std::size_t* unit, const void*, int) { *unit = 1 << 21; return 0; }
int cuMemCreate(unsigned long long* h, std::size_t, const void*, unsigned long long) {
    *h = 1; say("create"); return 0;
}
int cuMemRelease(unsigned long long) { say("release"); return 0; }
int cuMemAddressReserve(Address* a, std::size_t n, std::size_t, Address, unsigned long long) {
    *a = reinterpret_cast<Address>(std::malloc(n)); say("reserve"); return 0;
}
int cuMemAddressFree(Address a, std::size_t) { std::free(reinterpret_cast<void*>(a)); say("free"); return 0; }
int cuMemMap(Address, std::size_t, std::size_t, unsigned long long, unsigned long long) {
    say("map"); return flag("MAP_FAILS") ? 2 : 0;
}
int cuMemUnmap(Address, std::size_t) { say("unmap"); return 0; }
int cuMemSetAccess(Address, std::size_t, const void*, std::size_t) { return 0; }
int cuMemExportToShareableHandle(void* fd, unsigned long long, int, unsigned long long) {
    *static_cast<int*>(fd) = ::open("/dev/null", O_RDWR); return 0;
}
int cuMemImportFromShareableHandle(unsigned long long* h, void*, int) { *h = 1; say("import"); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 103 && !flag("NO_DESCRIPTORS"); return 0;
}
int cuPointerGetAttribute(void* value, int attribute, Address) {
    *static_cast<int*>(value) = attribute == 10 && !flag("EXPANDABLE"); return 0;
}
int cuMemAlloc_v2(Address* a, std::size_t n) {
    const std::string name = std::to_string(memory.size());
    *a = mapped(name, n); memory[*a] = {name, n}; say("allocate"); return 0;
}
int cuMemFree_v2(Address a) { munmap(reinterpret_cast<void*>(a), memory[a].second); say("deallocate"); return 0; }
int cuMemGetAddressRange_v2(Address* base, std::size_t* size, Address a) {
    auto found = --memory.upper_bound(a);
    *base = found->first; *size = found->second.second; return 0;
}
int cuIpcGetMemHandle(Ipc* handle, Address a) {
    std::memset(handle, 0, sizeof *handle);
    std::strncpy(reinterpret_cast<char*>(handle->bytes), memory.at(a).first.c_str(), 63);
    say("ipc export"); return 0;
}
int cuIpcOpenMemHandle_v2(Address* a, Ipc handle, unsigned flags) {
    if (flags != 1) return 1;
    const std::string name(reinterpret_cast<char*>(handle.bytes));
    struct stat status;
    if (stat(in_folder(name).c_str(), &status) != 0) return 201;
    *a = mapped(name, status.st_size); opened[*a] = status.st_size; say("ipc open"); return 0;
}
int cuIpcCloseMemHandle(Address a) {
    if (!opened.count(a)) return 1;
    munmap(reinterpret_cast<void*>(a), opened[a]); say("ipc close"); return 0;
}
}
"""

MAKES = """
import ctypes, json, subprocess, sys
from weight_transfer import _core
OPENS = '''
import ctypes, sys
from weight_transfer import _core
arena = _core.DeviceArena.open(int(sys.argv[1]), 0, int(sys.argv[2]))
ctypes.memmove(arena.address, b"changed", 7)
del arena
'''
def elsewhere(arena, size):
    said = subprocess.run([sys.executable, "-c", OPENS, str(arena.fd), str(size)], pass_fds=[arena.fd],
                          capture_output=True, text=True)
    print("elsewhere:", json.dumps([said.stdout.split("\\n")[:-1], said.stderr.strip().split("\\n")[-1]]), flush=True)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["g++", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.cpp")]
    subprocess.run(command, check=True, timeout=60)
    return folder


def run(driver: Path, body: str, tmp_path: Path, **environment: str) -> tuple[list[str], list[Any]]:
    """What a process with that driver printed, and what the one that it had open its arena did."""
    place = {"LD_LIBRARY_PATH": str(driver), "MEMORY": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", MAKES + body],
        env=os.environ | place | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    theirs = [json.loads(line.removeprefix("elsewhere: ")) for line in lines if line.startswith("elsewhere")]
    return [line for line in lines if not line.startswith("elsewhere")], theirs


def test_memory_with_a_descriptor_is_mapped_and_given_back_in_order(driver: Path, tmp_path: Path) -> None:
    body = "a = _core.DeviceArena.create(0, 5)\nb = _core.DeviceArena.open(a.fd, 0, 5)\ndel a, b"
    said, _ = run(driver, body, tmp_path)
    ends = ["synchronize", "unmap", "free"]
    assert said == [
        *("create", "reserve", "map", "release"),
        *("import", "reserve", "map", "release"),
        *(*ends, *ends),
    ]


def test_a_mapping_that_fails_leaves_nothing(driver: Path, tmp_path: Path) -> None:
    body = "try: _core.DeviceArena.create(0, 5)\nexcept RuntimeError as error: print(error)"
    said, _ = run(driver, body, tmp_path, MAP_FAILS="1")
    assert said == ["create", "reserve", "map", "free", "release", "cuMemMap: CUDA_ERROR_OF_THE_TEST (2)"]


def test_a_device_without_descriptors_shares_memory_by_a_handle(driver: Path, tmp_path: Path) -> None:
    body = """
arena = _core.DeviceArena.create(0, 4096)
elsewhere(arena, 4096)
print(ctypes.string_at(arena.address, 7))
elsewhere(arena, 4095)
del arena
"""
    said, (whole, wrong) = run(driver, body, tmp_path, NO_DESCRIPTORS="1")
    assert said == ["allocate", "ipc export", "b'changed'", "synchronize", "deallocate"]
    assert whole == [["ipc open", "synchronize", "ipc close"], ""]
    assert wrong == [[], "ValueError: arena has 4096 bytes, expected 4095"]


ADOPTS = """
allocated = ctypes.c_ulonglong()
ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(allocated), ctypes.c_size_t(8192))
try:
    arena = _core.DeviceArena.adopt(allocated.value + 4096, 0, {size})
    elsewhere(arena, {size})
    print(ctypes.string_at(allocated.value + 4096, 7))
    del arena
except ValueError as error:
    print(error)
"""


def test_memory_that_others_allocated_is_theirs_to_give_back(driver: Path, tmp_path: Path) -> None:
    said, (theirs,) = run(driver, ADOPTS.format(size=4096), tmp_path)
    assert said == ["allocate", "ipc export", "b'changed'"]
    assert theirs == [["ipc open", "synchronize", "ipc close"], ""]


def test_what_reaches_past_its_allocation_is_refused(driver: Path, tmp_path: Path) -> None:
    said, _ = run(driver, ADOPTS.format(size=4097), tmp_path)
    assert said == ["allocate", "the memory's allocation ends after 4096 bytes, not 4097"]


def test_memory_of_expandable_segments_is_refused(driver: Path, tmp_path: Path) -> None:
    said, _ = run(driver, ADOPTS.format(size=4096), tmp_path, EXPANDABLE="1")
    assert said[1].endswith("it is virtual memory, as expandable segments are")


def test_a_descriptor_of_another_kind_is_no_handle(driver: Path, tmp_path: Path) -> None:
    """Only what is sealed against writing can be one: its sender could change it while it is read."""
    body = """
import os
host = _core.HostArena.create("tandem", 88)
ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(host)), b"tdmcuipc", 8)
arena = _core.DeviceArena.open(host.fd, 0, 88)
"""
    said, _ = run(driver, body, tmp_path)
    assert said[0] == "import"
