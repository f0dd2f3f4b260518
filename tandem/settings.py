"""Settings of the services: from flags, the environment, a TOML file, in this order.

Imports nothing heavy: settings are checked before anything of the service's own is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pydantic
from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from tandem.errors import InvalidArgument, Reason, Violation, invalid

if TYPE_CHECKING:
    from tandem.rpc import ServingConfig

_OF_FLAGS = "error parsing CLI: "  # the library's


def default_address(service: str) -> str:
    """A Unix socket in a folder that nobody else can enter: the service manager's, the user's, or in /tmp.

    Raises:
        ValueError: the folder in /tmp is somebody else's.
    """
    if folder := os.environ.get("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix://{folder}/tandem-{service}.sock"
    private = Path(tempfile.gettempdir(), f"tandem-{os.geteuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if (
        found.st_uid != os.geteuid()
        or stat.S_IMODE(found.st_mode) != 0o700
        or not stat.S_ISDIR(found.st_mode)
    ):
        raise ValueError(f"{private} is not a folder of this user's alone: name an address")
    return f"unix://{private}/{service}.sock"


class ServiceSettings(BaseSettings):
    """Where to serve and to whom, which is alike in every service. Subclasses add what is served.

    A subclass names its `command`, the `env_prefix` in its `model_config`, and its default addresses.
    """

    model_config = SettingsConfigDict(
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    #: What the user types, for --help.
    command: ClassVar[str]
    #: Settings that are tables of anything: flags give them as name=value or as JSON.
    tables: ClassVar[tuple[str, ...]] = ()

    addresses: list[str] = Field(
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
    grace_s: float = Field(10.0, ge=0, description="What running calls get to end in when the service stops.")
    drain_delay_s: float = Field(0.0, ge=0, description="How long to say NOT_SERVING before refusing calls.")
    metrics_address: str | None = Field(None, description="host:port of Prometheus's /metrics.")
    log_json: bool = Field(False, description="Whether log lines are JSON.")

    @model_validator(mode="after")
    def _tls_pair(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self

    @classmethod
    def load(cls, argv: list[str]) -> Self:
        """Settings from the command line `argv`, the environment, and the file that `--config` names.

        Raises:
            pydantic.ValidationError: a setting is wrong or unknown.
            InvalidArgument: the file cannot be read, or a flag is malformed or unknown.
            SystemExit: --help.
        """
        files, argv = _taken("--config", argv)
        config = files[-1] if files else os.environ.get(f"{cls.model_config['env_prefix']}CONFIG")
        # The library would cut the values of tables at their commas.
        for table in cls.tables:
            given, argv = _taken(f"--{table}", argv)
            if given:
                argv = [*argv, f"--{table}={json.dumps(_table(table, given))}"]

        class Sources(cls):  # type: ignore[misc, valid-type]
            __doc__ = cls.__doc__

            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], env_settings: PydanticBaseSettingsSource, **_: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                flags: CliSettingsSource[Any] = CliSettingsSource(
                    settings_cls,
                    cli_prog_name=cls.command,
                    cli_parse_args=argv,
                    cli_kebab_case=True,
                    cli_implicit_flags=True,
                    cli_hide_none_type=True,
                    cli_exit_on_error=False,
                )
                return flags, env_settings, *_file(settings_cls, config)

        try:
            settings: Self = Sources()
        except SettingsError as error:
            if (said := str(error)).startswith(_OF_FLAGS):
                raise invalid("flags", cls._hinted(said.removeprefix(_OF_FLAGS))) from error
            # A list or a table that is none.
            field = re.search(r'(?:field "|encountered for )(\w+)', str(error))
            raise invalid(field[1] if field else "settings", " ".join(str(error).split())) from error
        return settings

    @classmethod
    def _hinted(cls, said: str) -> str:
        """What the library says of flags, with the one that was meant."""
        flags = [f"--{name.replace('_', '-')}" for name in (*cls.model_fields, "config")]
        given = re.search(r"--[\w-]+", said)
        near = difflib.get_close_matches(given[0], flags, n=1) if given and given[0] not in flags else []
        return said + (f"; did you mean {near[0]}?" if near else f" ({cls.command} --help explains)")

    @classmethod
    def checked(cls, argv: list[str]) -> Self:
        """`load`, for programs: every setting that is wrong is in one InvalidArgument."""
        try:
            return cls.load(argv)
        except pydantic.ValidationError as error:
            violations = [
                Violation(".".join(map(str, e["loc"])) or "settings", e["msg"])
                for e in error.errors(include_url=False)
                if e["type"] != "default_factory_not_called"  # a consequence of another
            ]
            first = violations[0]
            raise InvalidArgument(
                Reason.FIELD_INVALID, f"{first.field}: {first.description}", violations=violations
            ) from None

    def serving_config(self) -> ServingConfig:
        """How to serve, for `tandem.rpc.Serving`. Reads the token's file.

        Raises:
            InvalidArgument: the file holds no token.
        """
        from tandem.rpc import ServingConfig
        from tandem.rpc.listen import Tls
        from tandem.rpc.trust import read_token

        tls = (
            Tls(self.tls_certificate, self.tls_key, self.tls_client_ca)
            if self.tls_certificate is not None and self.tls_key is not None
            else None
        )
        return ServingConfig(
            addresses=tuple(self.addresses),
            token=read_token(self.token_file) if self.token_file else None,
            tls=tls,
            insecure=self.insecure,
            max_message_bytes=self.max_message_bytes,
            grace_s=self.grace_s,
            drain_delay_s=self.drain_delay_s,
            metrics_address=self.metrics_address,
        )


def typed(given: Any) -> Any:
    """A value that a flag or the environment gave as text: what is JSON, or Python's True, False, None, as that."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(given, given)


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


def _table(field: str, given: list[str]) -> dict[str, Any]:
    """A table of flags' values, each `name=value` or a JSON object."""
    found: dict[str, Any] = {}
    for text in given:
        if text.startswith("{") and isinstance(several := typed(text), dict):
            found |= several
            continue
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise invalid(field, f"must be name=value, is {text!r}")
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
