"""Settings of the inference service: where they come from, which wins, and what is said against wrong ones."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from inference_service import config
from inference_service.__main__ import main
from inference_service.config import InferenceSettings
from tandem.errors import InvalidArgument

FILE = """
model = "from-file"
grace_s = 3.0
addresses = ["unix:///file"]

[engine]
max_model_len = 111
dtype = "float16"
enforce_eager = true
hf_overrides = { head_dtype = "float32" }
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TANDEM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "inference.toml"
    path.write_text(FILE)
    return path


def test_flags(tmp_path: Path) -> None:
    settings = InferenceSettings.load(
        ["--model=m", "--addresses=unix:///a", "--addresses", "127.0.0.1:1", "--log-json", "--grace-s", "1.5"]
    )
    assert settings.model == "m"
    assert settings.addresses == ["unix:///a", "127.0.0.1:1"]
    assert settings.log_json
    assert settings.grace_s == 1.5
    assert settings.engine == {}


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_MODEL", "m")
    monkeypatch.setenv("TANDEM_ADDRESSES", '["unix:///a"]')
    monkeypatch.setenv("TANDEM_GRACE_S", "2")
    monkeypatch.setenv("TANDEM_ENGINE__MAX_MODEL_LEN", "256")
    monkeypatch.setenv("TANDEM_ENGINE__DTYPE", "float32")
    settings = InferenceSettings.load([])
    assert (settings.model, settings.addresses, settings.grace_s) == ("m", ["unix:///a"], 2.0)
    assert settings.engine == {"max_model_len": 256, "dtype": "float32"}


@pytest.mark.parametrize("way", ["separate", "joined", "environment"])
def test_the_file(file: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("TANDEM_CONFIG", str(file) if way == "environment" else "/nowhere")
    flags = {"separate": ["--config", str(file)], "joined": [f"--config={file}"], "environment": []}[way]
    settings = InferenceSettings.load(flags)
    assert (settings.model, settings.addresses, settings.grace_s) == ("from-file", ["unix:///file"], 3.0)
    assert settings.engine == {
        "max_model_len": 111,
        "dtype": "float16",
        "enforce_eager": True,
        "hf_overrides": {"head_dtype": "float32"},
    }


def test_flags_win_over_the_environment_and_that_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_GRACE_S", "2")
    monkeypatch.setenv("TANDEM_MODEL", "from-environment")
    monkeypatch.setenv("TANDEM_ENGINE__MAX_MODEL_LEN", "222")
    monkeypatch.setenv("TANDEM_ENGINE__DTYPE", "bfloat16")
    settings = InferenceSettings.load([f"--config={file}", "--model=from-flag", "--engine=max_model_len=333"])
    assert settings.model == "from-flag"
    assert settings.grace_s == 2
    assert settings.addresses == ["unix:///file"]
    assert settings.engine == {
        "max_model_len": 333,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "hf_overrides": {"head_dtype": "float32"},
    }


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_model_len=256", {"max_model_len": 256}),
        ("max-model-len=256", {"max_model_len": 256}),
        ("MAX_MODEL_LEN=256", {"max_model_len": 256}),
        ("enforce_eager=true", {"enforce_eager": True}),
        ("enforce_eager=True", {"enforce_eager": True}),
        ("gpu_memory_utilization=0.5", {"gpu_memory_utilization": 0.5}),
        ("dtype=bfloat16", {"dtype": "bfloat16"}),
        ("tokenizer=None", {"tokenizer": None}),
        ("tokenizer=/a/b=c", {"tokenizer": "/a/b=c"}),
        (
            'hf_overrides={"head_dtype": "float32", "x": [1, 2]}',
            {"hf_overrides": {"head_dtype": "float32", "x": [1, 2]}},
        ),
        ('{"max_model_len": 256, "dtype": "half"}', {"max_model_len": 256, "dtype": "half"}),
    ],
)
def test_engine_arguments_have_their_types(flag: str, value: dict[str, object]) -> None:
    assert InferenceSettings.load(["--model=m", "--engine", flag]).engine == value
    assert InferenceSettings.load(["--model=m", f"--engine={flag}", "--engine=seed=1"]).engine == value | {
        "seed": 1
    }


def test_chunks_fit_into_messages_by_themselves() -> None:
    assert InferenceSettings.load(["--model=m"]).max_chunk_bytes == 1 << 20
    assert InferenceSettings.load(["--model=m", "--max-message-bytes=65536"]).max_chunk_bytes == 32768
    with pytest.raises(pydantic.ValidationError, match="at most half of max_message_bytes"):
        InferenceSettings.load(["--model=m", "--max-message-bytes=65536", "--max-chunk-bytes=40000"])


@pytest.mark.parametrize(
    ("flags", "text", "fields"),
    [
        ([], "", {"model"}),
        (["--model=m", "--grace-s=-1"], "", {"grace_s"}),
        (["--model=m", "--grace-s=soon", "--lease-timeout-s=0"], "", {"grace_s", "lease_timeout_s"}),
        (["--model=m", "--max-message-bytes=1"], "", {"max_message_bytes"}),
        (["--model=m", "--tls-key=/k"], "", {"settings"}),
        ([], 'model = "m"\nmodle = "n"', {"modle"}),
        ([], 'model = "m"\n[egnine]\nseed = 1', {"egnine"}),
        ([], "model = 3", {"model"}),
        ([], "model = ", {"config"}),
        (["--config=/nowhere"], "", {"config"}),
        (["--config"], "", {"config"}),
        (["--model=m", "--engine=max_model_len"], "", {"engine"}),
        (["--model=m", "--engine==3"], "", {"engine"}),
        (["--model=m", "--engine"], "", {"engine"}),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, flags: list[str], text: str, fields: set[str]) -> None:
    if text:
        (tmp_path / "wrong.toml").write_text(text)
        flags = [*flags, f"--config={tmp_path}/wrong.toml"]
    with pytest.raises(InvalidArgument) as raised:
        main(flags)
    assert {violation.field for violation in raised.value.violations} == fields
    assert "\n" not in raised.value.message


def test_a_list_in_the_environment_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_MODEL", "m")
    monkeypatch.setenv("TANDEM_TRAINER_UIDS", "everybody")
    with pytest.raises(InvalidArgument) as raised:
        main([])
    assert [violation.field for violation in raised.value.violations] == ["trainer_uids"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--modle=n", "unrecognized arguments: --modle=n; did you mean --model?"),
        ("--nothing-like-it", "unrecognized arguments: --nothing-like-it (tandem inference --help explains)"),
        ("--grace-s", "argument --grace-s: expected one argument (tandem inference --help explains)"),
    ],
)
def test_a_flag_that_is_none_is_named(flag: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        InferenceSettings.load(["--model=m", flag])
    assert [(v.field, v.description) for v in raised.value.violations] == [("flags", said)]


def test_the_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        InferenceSettings.load(["--help"])
    assert not raised.value.code
    said = capsys.readouterr().out
    for name, field in InferenceSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in said
        assert field.description


def test_the_default_address_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/tandem")
    assert config.default_address() == "unix:///run/tandem/tandem-inference.sock"
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert config.default_address() == "unix:///run/user/7/tandem-inference.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Path(config.default_address().removeprefix("unix://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)  # as one that somebody else made
    with pytest.raises(ValueError, match="name an address"):
        config.default_address()


def test_settings_are_checked_without_vllm() -> None:
    """Wrong ones are told at once, and not after the seconds that vLLM and torch take."""
    code = (
        "import sys; from inference_service.__main__ import main\n"
        "try: main(['--model=m', '--grace-s=-1'])\n"
        "except ValueError: pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"vllm", "torch", "transformers", "grpc", "numpy"} & set(done.stdout.split())
    assert "pydantic_settings" in done.stdout.split()
