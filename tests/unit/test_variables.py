"""A misspelt variable is told of: nothing reads it, and nothing else would say so."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic_settings import SettingsConfigDict

from inference_service.config import InferenceSettings
from tandem.settings import ServiceSettings
from tandem.variables import unknown_variables, warn_of_unknown
from trainer_service.rewards.config import RewardSettings


class Trainer(ServiceSettings):
    """As the trainer service's: under a prefix that is also under the inference service's."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_TRAINER_")
    command: ClassVar[str] = "tandem trainer"
    max_running: int = 1


@pytest.mark.parametrize(
    ("settings", "name", "near"),
    [
        (InferenceSettings, "TANDEM_MODLE", "TANDEM_MODEL"),
        (InferenceSettings, "TANDEM_ENGINE_DTYPE", ""),  # one underscore of two
        (InferenceSettings, "TANDEM_INFERENCE_ADRESS", "TANDEM_INFERENCE_ADDRESS"),
        (InferenceSettings, "TANDEM_NONSENSE", ""),
        (InferenceSettings, "tandem_grase_s", "TANDEM_GRACE_S"),
        (InferenceSettings, "TANDEM_TRAINR_UIDS", "TANDEM_TRAINER_UIDS"),
        (InferenceSettings, "TANDEM_REWARD_TOKN", "TANDEM_REWARD_TOKEN"),
        (RewardSettings, "TANDEM_REWARD_WORKRS", "TANDEM_REWARD_WORKERS"),
        (Trainer, "TANDEM_TRAINER_MAX_RUNING", "TANDEM_TRAINER_MAX_RUNNING"),
        (Trainer, "TANDEM_TRAINER_NONSENSE", ""),
        (Trainer, "TANDEM_TRANER_MAX_RUNNING", "TANDEM_TRAINER_MAX_RUNNING"),
    ],
)
def test_a_slip_is_named(settings: type[ServiceSettings], name: str, near: str) -> None:
    assert unknown_variables(settings, {name: "1"}) == {name: near}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (InferenceSettings, "TANDEM_MODEL"),
        (InferenceSettings, "TANDEM_CONFIG"),
        (InferenceSettings, "TANDEM_ENGINE__MAX_MODEL_LEN"),
        (InferenceSettings, "TANDEM_TRAINER_UIDS"),
        (InferenceSettings, "TANDEM_TRAINER_MAX_RUNING"),  # the other service's to tell
        (InferenceSettings, "TANDEM_INFERENCE_TOKEN"),
        (InferenceSettings, "TANDEM_TEACHER_TOKEN"),
        (InferenceSettings, "TANDEM_REWARD_TOKEN_FILE"),
        (RewardSettings, "TANDEM_REWARD_TOKEN"),
        (RewardSettings, "TANDEM_REWARD_TOKEN_FILE"),
        (RewardSettings, "TANDEM_TRAINER_MAX_RUNING"),
        (Trainer, "TANDEM_REWARD_WORKERS"),
        (InferenceSettings, "PATH"),
        (Trainer, "TANDEM_TRAINER_CONFIG"),
        (Trainer, "TANDEM_TRAINER_UIDS"),
        (Trainer, "TANDEM_MODEL"),
        (Trainer, "TANDEM_TOKEN_FILE"),
        (Trainer, "TANDEM_INFERENCE_CA_FILE"),
    ],
)
def test_what_is_known_or_anothers_is_not(settings: type[ServiceSettings], name: str) -> None:
    assert unknown_variables(settings, {name: "1"}) == {}


def test_it_is_in_the_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TANDEM_MODLE", "m")
    warn_of_unknown(InferenceSettings)
    said = capsys.readouterr().out
    assert "warning" in said
    assert "TANDEM_MODLE" in said
    assert "did you mean TANDEM_MODEL?" in said
