"""Settings of `python -m trainer_service.rewards`: flags, `TANDEM_REWARD_…` in the environment, a TOML file."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from tandem.settings import ServiceSettings


class RewardSettings(ServiceSettings):
    """A reward function, served to trainers."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_REWARD_")
    command: ClassVar[str] = "python -m trainer_service.rewards"

    function: CliPositionalArg[str] = Field(description="module:function, or the name of a reward of TRL's.")
    workers: int = Field(1, ge=1, description="In how many threads the function may run at once.")
