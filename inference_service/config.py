"""The inference service's settings: from flags, `TANDEM_…` in the environment, a TOML file, in this order.

Imports nothing heavy: settings are checked before vLLM is loaded.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from tandem import settings
from tandem.settings import ServiceSettings, typed


def default_address() -> str:
    """A Unix socket in a folder that nobody else can enter. Raises ValueError where there is none."""
    return settings.default_address("inference")


def _default_addresses() -> list[str]:
    return [default_address()]


class InferenceSettings(ServiceSettings):
    """What to serve, where, and to whom."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_")
    command: ClassVar[str] = "tandem inference"
    tables: ClassVar[tuple[str, ...]] = ("engine",)

    model: str = Field(description="The checkpoint to start from: a folder, or a name that vLLM can resolve.")
    reference_model: str | None = Field(
        None,
        description="A second model, whose logits rollouts may mix with the policy's: Nash-MD and XPO need it. "
        "Mostly the same checkpoint as model.",
    )
    addresses: list[str] = Field(
        default_factory=_default_addresses,
        description="Where to serve: unix:///path or host:port. A Unix socket is open to this user alone.",
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
    take_updates: bool = Field(
        True,
        description="Whether trainers may bring new weights. An engine that takes none has its weights once, also "
        "where experts or quantized layers would have a second form.",
    )
    update_mode: Literal["auto", "staged", "in_place"] = Field(
        "auto",
        description="Where updates go whose trainer does not say: staged beside the live weights, which takes as much "
        "memory as they do, or in_place, for which the engine stands still. auto: staged if they come by stream and "
        "the host has that memory free.",
    )
    trainer_uids: list[int] = Field(
        default_factory=list,
        description="Users, beside this one, whose trainers may share the weights' memory.",
    )
    exit_on_engine_death: bool = Field(
        False,
        description="Whether to drain and exit with 3 when the engine has died, for supervisors that look at exits.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's engine arguments, by its names: --engine max_model_len=4096, [engine] in the file.",
    )

    @field_validator("engine", mode="after")
    @classmethod
    def _typed(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Flags and the environment give text: read what is JSON as that, in vLLM's (lower-case) names."""
        return {name.lower().replace("-", "_"): typed(given) for name, given in value.items()}

    @field_validator("max_chunk_bytes", mode="after")
    @classmethod
    def _fits(cls, value: int, info: Any) -> int:
        limit = info.data.get("max_message_bytes", value * 2)
        if value > limit // 2:
            raise ValueError(f"must fit into a message: at most half of max_message_bytes ({limit})")
        return value
