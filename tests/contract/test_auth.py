"""Nobody calls without the token or the socket's permission, and no token travels where it can be read."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import socket
import stat
from pathlib import Path

import grpc
import pytest
from conftest import Serve, failure
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from engine import ScriptedEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import InvalidArgument, Reason, TandemError, Unauthenticated
from tandem.rpc import Serving, connect, connect_aio, translate
from tandem.rpc.listen import Tls
from tandem.rpc.trust import read_token

GET = engine_pb2.GetStatsRequest()


@pytest.mark.parametrize("token", [None, "wrong", "right-but-longer", "righ"])
async def test_a_call_without_the_token_is_refused(serve: Serve, token: str | None) -> None:
    serving = await serve(token="right")
    async with connect_aio(serving.addresses[0], token=token) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        error = translate(await failure(stub.GetStats(GET)))
        assert (type(error), error.reason) == (Unauthenticated, Reason.TOKEN_INVALID)
        # Which methods exist is not told either.
        unknown = await failure(channel.unary_unary("/no.Such/Method")(b""))
        assert unknown.code() == grpc.StatusCode.UNAUTHENTICATED
        # But whoever supervises the service need not know the token.
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_two_tokens_are_none(serve: Serve) -> None:
    serving = await serve(token="right")
    async with connect_aio(serving.addresses[0], token="wrong") as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).GetStats(
            GET, metadata=[("authorization", "Bearer right")]
        )
        assert (await failure(call)).code() == grpc.StatusCode.UNAUTHENTICATED


async def test_the_token_travels_over_a_unix_socket(serve: Serve) -> None:
    serving = await serve(token="right")
    async with connect_aio(serving.addresses[0], token="right") as channel:
        assert (await engine_pb2_grpc.EngineServiceStub(channel).GetStats(GET)).weight_version == 7

    def call() -> int:
        with connect(serving.addresses[0], token="right") as channel:
            return engine_pb2_grpc.EngineServiceStub(channel).GetStats(GET).weight_version

    assert await asyncio.to_thread(call) == 7


async def test_a_client_of_another_language_calls_over_a_plain_channel(serve: Serve) -> None:
    """Local credentials put nothing on the wire, so `grpcurl -plaintext` and its like work."""
    serving = await serve(token="right", addresses=("127.0.0.1:0",))
    async with connect_aio(serving.addresses[0]) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).GetStats(
            GET, metadata=[("authorization", "Bearer right")]
        )
        assert (await call).weight_version == 7
    unix = await serve()
    async with grpc.aio.insecure_channel(unix.addresses[0]) as channel:
        assert (await engine_pb2_grpc.EngineServiceStub(channel).GetStats(GET)).weight_version == 7


def test_no_token_over_a_channel_that_can_be_read() -> None:
    with pytest.raises(InvalidArgument, match="readable on the way"):
        connect("127.0.0.1:1", token="right")
    with pytest.raises(InvalidArgument, match="readable on the way"):
        connect("example.org:1", token="right", insecure=True)


async def test_grpc_itself_refuses_call_credentials_on_an_insecure_channel() -> None:
    """The trap behind it: gRPC says so only at the first call."""
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.UsageError):
            await channel.unary_unary("/a.B/C")(b"", credentials=grpc.access_token_call_credentials("right"))


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "ü"])
def test_a_token_that_cannot_be_a_header_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument, match="printable ASCII"):
        connect("unix:///tmp/socket", token=token)


@pytest.mark.parametrize("token", ["", "a b", "ü"])
async def test_a_service_refuses_the_tokens_that_its_clients_do(serve: Serve, token: str) -> None:
    with pytest.raises(InvalidArgument, match="token: must be printable ASCII"):
        await serve(token=token)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "cannot read .*: No such file"),
        (b"", "holds no token"),
        (b" \n", "holds no token"),
        (b"two words", "holds no token"),
        ("ü".encode(), "holds no token"),
        (b"\xff\xfe", "holds no token"),
    ],
    ids=["missing", "empty", "space", "words", "umlaut", "binary"],
)
def test_a_token_file_without_a_token_is_named(folder: Path, data: bytes | None, says: str) -> None:
    if data is not None:
        (folder / "token").write_bytes(data)
    with pytest.raises(InvalidArgument, match=says) as caught:
        read_token(folder / "token")
    assert [violation.field for violation in caught.value.violations] == ["token_file"]
    assert "words" not in str(caught.value), "a secret is no text of an error"


def test_a_token_file_may_end_its_line(folder: Path) -> None:
    (folder / "token").write_text("right\n")
    assert read_token(folder / "token") == "right"


@pytest.mark.parametrize(
    ("mode", "refused"),
    [(0o700, False), (0o775, False), (0o1777, False), (0o777, True), (0o707, True)],
    ids=oct,
)
async def test_no_socket_where_everybody_may_put_one(
    serve: Serve, folder: Path, mode: int, refused: bool
) -> None:
    folder.chmod(mode)
    address = f"unix://{folder}/socket"
    if refused:
        with pytest.raises(InvalidArgument, match="every user may replace") as caught:
            await serve()
        assert caught.value.violations[0].field == "addresses"
        with pytest.raises(InvalidArgument, match="every user may replace") as caught:
            connect(address, token="right")
        assert caught.value.violations[0].field == "address"
    else:
        await serve()
        connect(address, token="right").close()
    connect(address).close()  # nothing secret is sent


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("thing", ["folder", "link", "socket"])
async def test_no_socket_in_a_place_that_is_somebody_elses(serve: Serve, folder: Path, thing: str) -> None:
    place = folder / "place"
    (folder / "real").mkdir(0o700)
    if thing == "link":
        place.symlink_to(folder / "real")
        os.lchown(place, 65534, 65534)
    else:
        (folder / "real").rename(place)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{place}/socket")
        os.chown(place if thing == "folder" else place / "socket", 65534, 65534)
    with pytest.raises(InvalidArgument, match="is another user's"):
        await serve(addresses=(f"unix://{place}/socket",))
    with pytest.raises(InvalidArgument, match="is another user's"):
        connect(f"unix://{place}/socket", token="right")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
async def test_a_place_that_was_taken_after_the_channel_was_made_gets_no_token(
    serve: Serve, folder: Path, engine: ScriptedEngine
) -> None:
    """The service may start after its clients, and somebody else before both."""
    place = folder / "place"
    async with connect_aio(f"unix://{place}/socket", token="right") as channel:
        place.mkdir(0o700)
        await serve(addresses=(f"unix://{place}/socket",), token="right")
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        assert (await stub.GetStats(GET, wait_for_ready=True, timeout=5)).weight_version == 7
        os.chown(place, 65534, 65534)
        assert "is another user's" in str((await failure(stub.GetStats(GET))).details())


async def test_the_socket_is_its_owners_alone_from_the_start(serve: Serve, folder: Path) -> None:
    umask = os.umask(0)
    try:
        serving = await serve()
    finally:
        assert os.umask(umask) == 0, "bind must restore the umask"
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600
    group = await serve(addresses=(f"unix://{folder}/group",), socket_mode=0o660)
    assert stat.S_IMODE((folder / "group").stat().st_mode) == 0o660
    assert serving.addresses != group.addresses


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_cannot_connect(serve: Serve, folder: Path) -> None:
    """gRPC does not look at who connects; the file's permissions are the only guard."""
    await serve()
    folder.chmod(0o755)
    script = f"import socket; socket.socket(socket.AF_UNIX).connect('{folder}/socket')"
    child = await asyncio.create_subprocess_exec(
        "/usr/bin/python3", "-c", script, user=65534, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await child.communicate()
    assert child.returncode == 1
    assert b"PermissionError" in errors
    folder.chmod(0o700)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "example.org:1"])
async def test_other_hosts_are_not_served_without_tls(serve: Serve, address: str) -> None:
    with pytest.raises(InvalidArgument, match="can be reached by other hosts"):
        await serve(addresses=(address,))


async def test_not_everybody_who_connects_over_tcp_is_served(serve: Serve, folder: Path) -> None:
    """Loopback is every user's of the host, and TLS by itself asks nobody who they are."""
    authority = Authority(folder, "authority")
    alone, asking = (Tls(*authority.issue("service"), ca) for ca in (None, authority.file))
    for tls in (None, alone):
        with pytest.raises(InvalidArgument, match=r"set token_file or tls_client_ca, or allow insecure"):
            await serve(addresses=("127.0.0.1:0",), tls=tls)
    for fields in ({"token": "right"}, {"tls": asking}, {"insecure": True}, {"insecure": True, "tls": alone}):
        await serve(addresses=("127.0.0.1:0",), **fields)


def test_other_hosts_are_not_called_without_tls() -> None:
    with pytest.raises(InvalidArgument, match="is another host"):
        connect("192.0.2.1:1")
    connect("192.0.2.1:1", insecure=True).close()
    connect("[::1]:1").close()


class Authority:
    """Signs certificates, and writes them to files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(name, self._sign(self._name, self._key, authority=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(name, self._sign(subject, key, authority=False)), self._write(f"{name}.key", pem)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self._folder / f"{name}.pem"
        path.write_bytes(data)
        return path


async def test_tls_carries_the_token_and_mutual_tls_refuses_strangers(
    serve: Serve, engine: ScriptedEngine, folder: Path
) -> None:
    authority, stranger = Authority(folder, "authority"), Authority(folder, "stranger")
    cert, key = authority.issue("service")
    tls = Tls(cert_file=cert, key_file=key, client_ca_file=authority.file)
    serving: Serving = await serve(addresses=("127.0.0.1:0",), tls=tls, token="right")
    (address,) = serving.addresses

    async def call(signer: Authority | None) -> bytes | TandemError:
        pair = (None, None) if signer is None else signer.issue("client")
        channel = connect_aio(
            address,
            ca_file=authority.file,
            cert_file=pair[0],
            key_file=pair[1],
            token="right",
        )
        async with channel:
            try:
                stub = engine_pb2_grpc.EngineServiceStub(channel)
                return (await stub.Pause(engine_pb2.PauseRequest(), timeout=1)).SerializeToString()
            except grpc.RpcError as error:
                return translate(error)

    async def pause(request: object, context: object) -> None: ...

    engine.pause = pause
    assert await call(authority) == b""
    for refused in (await call(stranger), await call(None)):
        assert isinstance(refused, TandemError)
        assert refused.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_missing_tls_files_are_named(serve: Serve, folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"tls\.key_file: cannot read .*: No such file"):
        await serve(addresses=("127.0.0.1:0",), tls=Tls(folder / "a", folder / "b"), token="right")
    with pytest.raises(InvalidArgument, match="ca_file: cannot read"):
        connect("127.0.0.1:1", ca_file=folder / "none")
    with pytest.raises(InvalidArgument, match="needs both"):
        connect("127.0.0.1:1", ca_file=folder / "none", cert_file=folder / "none")
