"""The settings that the README shows are ones that our own client can call."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import Serve
from test_auth import GET, Authority

from inference_service.config import InferenceSettings
from tandem.engine.v1 import engine_pb2_grpc
from tandem.rpc import connect_aio
from tandem.rpc.address import parse

README = Path(__file__).parents[2] / "README.md"


async def test_the_settings_are_served_and_called(serve: Serve, folder: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    text = block[1]
    for old, new in {"/run/credentials": folder, "/run/tandem": folder, ":7000": ":0", ":9100": ":0"}.items():
        assert old in text
        text = text.replace(old, str(new))
    (folder / "tandem.toml").write_text(text)
    (folder / "token").write_text("right\n")
    authority = Authority(folder, "authority")
    authority.issue("service")[1].rename(folder / "service.key")

    config = InferenceSettings.load([f"--config={folder}/tandem.toml"]).serving_config()
    fields = {name: getattr(config, name) for name in config.__slots__}
    serving = await serve(**fields | {"handle_signals": False})
    kinds = set()
    for address in serving.addresses:
        unix = parse(address).is_unix
        here = address if unix else f"127.0.0.1:{parse(address).port}"
        ca = None if unix else authority.file
        async with connect_aio(here, token="right", ca_file=ca) as channel:
            assert (await engine_pb2_grpc.EngineServiceStub(channel).GetStats(GET)).weight_version == 7
        kinds.add(unix)
    assert kinds == {True, False}
