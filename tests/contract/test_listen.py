"""A server is where it says, alone, and only if that was possible."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from conftest import Serve

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tandem.rpc import connect, connect_aio
from tandem.rpc.address import parse

GET = engine_pb2.GetStatsRequest()


async def answers(address: str) -> bool:
    async with connect_aio(address) as channel:
        stats = await engine_pb2_grpc.EngineServiceStub(channel).GetStats(GET, timeout=5)
    return stats.reason == "it works"


async def test_free_ports_are_reported(serve: Serve, folder: Path) -> None:
    serving = await serve(addresses=("127.0.0.1:0", f"unix://{folder}/a", "localhost:0"), insecure=True)
    tcp, unix, named = serving.addresses
    assert unix == f"unix://{folder}/a"
    for address in (tcp, named):
        assert parse(address).port > 0
    assert [await answers(address) for address in serving.addresses] == [True, True, True]


async def test_a_second_server_on_the_port_is_refused(serve: Serve) -> None:
    (address,) = (await serve(addresses=("127.0.0.1:0",), insecure=True)).addresses
    with pytest.raises(FailedPrecondition, match=f"cannot serve at {address}") as caught:
        await serve(addresses=(address,), insecure=True)
    assert caught.value.reason is Reason.ADDRESS_IN_USE
    assert await answers(address)


async def test_grpc_by_itself_shares_the_port() -> None:
    """The trap: two servers, one port, and nobody is told."""
    first, second = grpc.aio.server(), grpc.aio.server()
    port = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    assert second.add_insecure_port(f"127.0.0.1:{port}") == port
    await first.stop(None)
    await second.stop(None)


async def test_a_second_server_on_the_socket_is_refused(serve: Serve, folder: Path) -> None:
    (address,) = (await serve()).addresses
    inode = (folder / "socket").stat().st_ino
    with pytest.raises(FailedPrecondition, match="another server answers there"):
        await serve()
    assert (folder / "socket").stat().st_ino == inode
    assert await answers(address)


async def test_the_socket_of_a_dead_server_is_replaced(serve: Serve, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/socket")
    assert await answers((await serve()).addresses[0])


async def test_a_file_that_is_no_socket_is_left_alone(serve: Serve, folder: Path) -> None:
    (folder / "socket").write_text("thesis")
    with pytest.raises(InvalidArgument, match="exists and is no socket"):
        await serve()
    assert (folder / "socket").read_text() == "thesis"


async def test_the_folder_must_exist(serve: Serve, folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"the folder of .* does not exist"):
        await serve(addresses=(f"unix://{folder}/none/socket",))


async def test_a_failed_start_leaves_nothing_behind(
    serve: Serve, folder: Path, open_descriptors: Callable[[], int]
) -> None:
    (taken,) = (await serve(addresses=("127.0.0.1:0",), insecure=True)).addresses
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(FailedPrecondition):
            await serve(addresses=(f"unix://{folder}/a", taken), metrics_address="127.0.0.1:0", insecure=True)
    end = time.monotonic() + 5
    while (folder / "a").exists() or open_descriptors() > before:  # gRPC closes its own a moment later
        assert time.monotonic() < end, "a socket or a descriptor was left"
        await asyncio.sleep(0.02)
    assert await answers((await serve(addresses=(f"unix://{folder}/a",))).addresses[0])


async def test_a_busy_metrics_port_is_refused(serve: Serve, folder: Path) -> None:
    first = await serve(metrics_address="127.0.0.1:0")
    with pytest.raises(FailedPrecondition, match="cannot serve metrics"):
        await serve(addresses=(f"unix://{folder}/b",), metrics_address=f"127.0.0.1:{first.metrics_port}")


MALFORMED = [
    "",
    "host",
    "host:",
    ":1",
    "host:65536",
    "host:-1",
    "host:²",
    "ho st:1",
    "::1:50",
    "[::1]",
    "[nonsense]:1",
    "http://host:1",
    "unix:relative",
    "unix://relative",
    "unix:/one/slash",
    "unix-abstract:name",
    "unix:///folder/",
    "unix:///a\0b",
    "unix:///" + "x" * 107,
]


@pytest.mark.parametrize("address", MALFORMED)
async def test_malformed_addresses_are_named_on_both_sides(serve: Serve, address: str) -> None:
    with pytest.raises(InvalidArgument) as client:
        connect(address)
    with pytest.raises(InvalidArgument) as server:
        await serve(addresses=(address,))
    assert client.value.violations[0].field == "address"
    assert server.value.violations[0].field == "addresses"


async def test_the_longest_path_works(serve: Serve, folder: Path) -> None:
    path = str(folder / "s").ljust(107, "s")
    assert await answers((await serve(addresses=(f"unix://{path}",))).addresses[0])


def test_nobody_connects_to_port_0() -> None:
    with pytest.raises(InvalidArgument, match="port 0"):
        connect("127.0.0.1:0")


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:///a", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
        ("gpu-host:1", False),
    ],
)
def test_what_counts_as_this_host(address: str, loopback: bool) -> None:
    assert parse(address).is_loopback is loopback
    assert str(parse(address)) == address
