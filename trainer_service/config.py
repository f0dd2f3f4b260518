"""The trainer service's settings: from flags, `TANDEM_TRAINER_…` in the environment, a TOML file, in this order.

Imports nothing heavy: settings are checked before anything else is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from tandem.settings import ServiceSettings, default_address


def _default_addresses() -> list[str]:
    return [default_address("trainer")]


def default_folder() -> Path:
    """The service manager's folder for state, or the user's."""
    if folder := os.environ.get("STATE_DIRECTORY"):
        return Path(folder)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "tandem"


class TrainerSettings(ServiceSettings):
    """Which jobs to keep, where, and for whom."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_TRAINER_")
    command: ClassVar[str] = "tandem trainer"

    addresses: list[str] = Field(
        default_factory=_default_addresses,
        description="Where to serve: unix:///path or host:port. A Unix socket is open to this user alone.",
    )
    folder: Path = Field(
        default_factory=default_folder,
        description="Where jobs are kept: a folder for each, with its checkpoints and logs. Its path is to be short.",
    )
    store: str = Field(
        "",
        description="The store's URL, as SQLAlchemy has it: postgresql+psycopg://... By default a file in the folder.",
    )
    max_running: int | None = Field(
        None, ge=1, description="Jobs that run at once. By default as many as there are GPUs, or one."
    )
    gpus: list[str] | None = Field(
        None, description="GPUs to give to jobs, as CUDA names them. By default all of the host."
    )
    cancel_grace_s: float = Field(
        60.0,
        ge=0,
        description="What a job that is told to end gets to save a checkpoint in, before it is killed.",
    )
    retry_delay_s: float = Field(
        1.0,
        ge=0,
        description="Until a job whose process died starts again. Doubles with each time, up to a minute.",
    )
    standby: int = Field(
        1,
        ge=0,
        description="Processes that have all libraries loaded before there is a job, which then starts at once. "
        "For jobs of one process. Each takes some 600 MiB.",
    )
