"""The inference service's settings: from flags, `TANDEM_…` in the environment, a TOML file, in this order.

Imports nothing heavy: settings are checked before vLLM is loaded.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from tandem.errors import invalid


def default_address() -> str:
    """A Unix socket in a folder that nobody else can enter: the service manager's, the user's, or in /tmp.

    Raises:
        ValueError: the folder in /tmp is somebody else's.
    """
    if folder := os.environ.get("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix://{folder}/tandem-inference.sock"
    private = Path(tempfile.gettempdir(), f"tandem-{os.geteuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if (
        found.st_uid != os.geteuid()
        or stat.S_IMODE(found.st_mode) != 0o700
        or not stat.S_ISDIR(found.st_mode)
    ):
        raise ValueError(f"{private} is not a folder of this user's alone: name an address")
    return f"unix://{private}/inference.sock"


def _default_addresses() -> list[str]:
    return [default_address()]


class InferenceSettings(BaseSettings):
    """What to serve, where, and to whom."""

    model_config = SettingsConfigDict(
        env_prefix="TANDEM_",
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    model: str = Field(description="The checkpoint to start from: a folder, or a name that vLLM can resolve.")
    addresses: list[str] = Field(
        default_factory=_default_addresses,
        description="Where to serve: unix:///path or host:port. A Unix socket is open to this user alone.",
    )
    token_file: Path | None = Field(
        None, description="File with the token that callers must send. host:port needs it, or tls_client_ca."
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain.")
    tls_key: Path | None = Field(None, description="PEM file of the server's private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the CA that callers' certificates need."
    )
    insecure: bool = Field(
        False,
        description="Whether host:port may go without TLS where other hosts reach it, and without token or client CA.",
    )
    max_message_bytes: int = Field(
        16 << 20,
        ge=1 << 16,
        le=1 << 30,
        description="Limit of one message, both ways. Clients need the same.",
    )
    max_chunk_bytes: int = Field(
        default_factory=lambda given: min(1 << 20, given.get("max_message_bytes", 1 << 21) // 2),
        ge=1 << 12,
        le=1 << 26,
        description="Largest chunk of a streamed update's bytes. 1 MiB, or half a message if that is less.",
    )
    max_rollouts: int = Field(
        1 << 16,
        ge=1,
        description="Rollouts and sequences that may wait or run at once, over all calls. More are refused.",
    )
    allow_chat_templates: bool = Field(
        False,
        description="Whether callers may send templates of their own for chats. A template is a program without limit.",
    )
    engine_timeout_s: float = Field(
        60.0, gt=0, description="seconds after which an engine that answers no control call is taken for dead"
    )
    lease_timeout_s: float = Field(
        2.0, ge=0.2, le=60, description="A trainer silent for this long in an open update has lost it."
    )
    trainer_uids: list[int] = Field(
        default_factory=list,
        description="Users, beside this one, whose trainers may share the weights' memory.",
    )
    grace_s: float = Field(10.0, ge=0, description="What running calls get to end in when the service stops.")
    drain_delay_s: float = Field(0.0, ge=0, description="How long to say NOT_SERVING before refusing calls.")
    exit_on_engine_death: bool = Field(
        False,
        description="Whether to drain and exit with 3 when the engine has died, for supervisors that look at exits.",
    )
    metrics_address: str | None = Field(None, description="host:port of Prometheus's /metrics.")
    log_json: bool = Field(False, description="Whether log lines are JSON.")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's engine arguments, by its names: --engine max_model_len=4096, [engine] in the file.",
    )

    @field_validator("engine", mode="after")
    @classmethod
    def _typed(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Flags and the environment give text: read what is JSON as that, in vLLM's (lower-case) names."""
        return {name.lower().replace("-", "_"): _json(given) for name, given in value.items()}

    @field_validator("max_chunk_bytes", mode="after")
    @classmethod
    def _fits(cls, value: int, info: Any) -> int:
        limit = info.data.get("max_message_bytes", value * 2)
        if value > limit // 2:
            raise ValueError(f"must fit into a message: at most half of max_message_bytes ({limit})")
        return value

    @model_validator(mode="after")
    def _tls_pair(self) -> InferenceSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self

    @classmethod
    def load(cls, argv: list[str]) -> InferenceSettings:
        """Settings from the command line `argv`, the environment, and the file that `--config` names.

        Raises:
            pydantic.ValidationError: a setting is wrong or unknown.
            InvalidArgument: the file cannot be read.
            SystemExit: --help, or a malformed flag.
        """
        files, argv = _taken("--config", argv)
        config = files[-1] if files else os.environ.get("TANDEM_CONFIG")
        # The library would cut the values of engine arguments at their commas.
        given, argv = _taken("--engine", argv)
        if given:
            argv = [*argv, f"--engine={json.dumps(_engine(given))}"]

        class Sources(cls):  # type: ignore[misc, valid-type]
            __doc__ = cls.__doc__

            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], env_settings: PydanticBaseSettingsSource, **_: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                flags: CliSettingsSource[Any] = CliSettingsSource(
                    settings_cls,
                    cli_prog_name="tandem inference",
                    cli_parse_args=argv,
                    cli_kebab_case=True,
                    cli_implicit_flags=True,
                    cli_hide_none_type=True,
                )
                return flags, env_settings, *_file(settings_cls, config)

        try:
            settings: InferenceSettings = Sources()
        except SettingsError as error:  # a list or a table that is none
            field = re.search(r'(?:field "|encountered for )(\w+)', str(error))
            raise invalid(field[1] if field else "settings", " ".join(str(error).split())) from error
        return settings


def _taken(flag: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of a flag, and the other arguments."""
    values, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == flag:
            if (value := next(arguments, None)) is None:
                raise invalid(flag.removeprefix("--"), "the flag needs a value")
            values.append(value)
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return values, rest


def _engine(given: list[str]) -> dict[str, Any]:
    """Engine arguments of flags, each `name=value` or a JSON object."""
    found: dict[str, Any] = {}
    for text in given:
        if text.startswith("{") and isinstance(several := _json(text), dict):
            found |= several
            continue
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise invalid("engine", f"must be name=value, is {text!r}")
        found[name] = value
    return found


def _file(settings_cls: type[BaseSettings], config: str | None) -> list[PydanticBaseSettingsSource]:
    if config is None:
        return []
    if not Path(config).is_file():
        raise invalid("config", f"no file {config!r}")
    try:
        return [TomlConfigSettingsSource(settings_cls, Path(config))]
    except (OSError, ValueError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise invalid("config", f"cannot read {config}: {error}") from error


def _json(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(given, given)
