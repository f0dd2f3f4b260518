"""What a client or a script imports stays light, and imports point one way."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "vllm", "transformers", "trl", "cupy", "numpy"}


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` ran in a process of its own."""
    script = f"import sys\n{code}\nprint('modules:', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.splitlines()[-1].removeprefix("modules:").split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import tandem, tandem.errors, tandem.rpc",
            HEAVY | {"grpc", "google", "prometheus_client", "structlog"},
        ),
        (
            "import tandem.rpc.healthcheck",
            HEAVY | {"google", "prometheus_client", "structlog", "asyncio_mqtt"},
        ),
        (
            "from tandem.rpc import connect, connect_aio, translate",
            HEAVY | {"prometheus_client", "structlog"},
        ),
        ("from tandem.rpc import Serving, ServingConfig", HEAVY),
        ("from tandem.inference.v1 import inference_pb2_grpc", HEAVY),
        ("import tandem.client", HEAVY | {"aiohttp", "prometheus_client", "structlog", "pydantic", "rich"}),
        ("from tandem.weights.v1 import weights_pb2_grpc", HEAVY),
        ("import trainer_service.rewards", HEAVY | {"prometheus_client", "structlog", "pydantic"}),
        (
            "import tandem.cli; tandem.cli.main(['--help'])",
            HEAVY | {"aiohttp", "grpc", "inference_service", "trainer_service"},
        ),
    ],
)
def test_nothing_heavy_comes_along(code: str, absent: set[str]) -> None:
    modules = loaded(code)
    assert "tandem" in modules
    assert modules & absent == set()


def test_the_probe_sees_what_is_loaded() -> None:
    assert "grpc" in loaded("import tandem.rpc.channel")


def test_lazy_names_are_all_there() -> None:
    import tandem.rpc

    assert all(getattr(tandem.rpc, name).__module__.startswith("tandem.rpc.") for name in tandem.rpc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tandem.rpc.nonsense  # noqa: B018


def test_the_trainer_service_has_no_torch_and_no_users_code() -> None:
    """Jobs run in processes of their own: the service that owns them stays small, and lives when one does not."""
    modules = loaded("import trainer_service.__main__, trainer_service.server, trainer_service.jobs.sql")
    assert "sqlalchemy" in modules
    assert modules & {"torch", "vllm", "transformers", "trl", "cupy", "datasets"} == set()
