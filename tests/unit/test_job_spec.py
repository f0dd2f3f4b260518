"""What is wrong with a job's table is told by its path, and all of it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import InvalidArgument
from tests.jobs import spec, table
from trainer_service.jobs.configure import arguments
from trainer_service.jobs.folder import JobFolder
from trainer_service.jobs.reading import read
from trainer_service.jobs.run import engine_command
from trainer_service.jobs.spec import ALGORITHMS, JobSpec

SOURCES = "hub, json_lines, parquet, reasoning_gym"


def test_what_was_given_is_read() -> None:
    read_back = spec(labels={"team": "a"}, hardware={"processes": 2})
    assert read_back.algorithm == "grpo"
    assert read_back.settings.model_dump(exclude_none=True) == {"num_generations": 4, "trl_options": {}}
    assert read_back.training.max_steps == 2
    assert read_back.hardware.processes == 2
    assert JobSpec.model_validate(read_back.model_dump(mode="json", exclude_none=True)) == read_back


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_may_be_chosen(algorithm: str) -> None:
    given = {name: value for name, value in table().items() if name != "grpo"} | {algorithm: {}}
    assert read(given).algorithm == algorithm


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"grop": {}}, {"job.grop": "there is no such field; did you mean grpo?"}),
        ({"rloo": {}}, {"job": "exactly one of grpo, rloo, online_dpo, nash_md, xpo is needed, found grpo and rloo"}),
        ({"grpo": {"mixture_coef": 0.5}}, {"job.grpo.mixture_coef": "there is no such field here; nash_md has it"}),
        ({"grpo": {"learning_rate": 1}}, {"job.grpo.learning_rate": "there is no such field here; training has it"}),
        ({"grpo": {"epsilom": 4}}, {"job.grpo.epsilom": "there is no such field; did you mean epsilon?"}),
        ({"grpo": {"num_generations": 1}}, {"job.grpo.num_generations": "Input should be greater than or equal to 2"}),
        ({"training": {}}, {"job.training": "one of max_steps and num_train_epochs is needed"}),
        (
            {"training": {"max_steps": "many", "seed": -1}},
            {
                "job.training.max_steps": "Input should be a valid integer, unable to parse string as an integer",
                "job.training.seed": "Input should be greater than or equal to 0",
            },
        ),
        ({"dataset": {}}, {"job.dataset": f"exactly one of {SOURCES} is needed, found none"}),
        ({"rewards": []}, {"job.rewards": "List should have at least 1 item after validation, not 0"}),
        ({"rewards": [{"function": "no"}]}, {"job.rewards[0].function": "must be module:function, is 'no'"}),
        (
            {"rewards": [{"builtin": "a"}, {"judge": {"name": "b"}}]},
            {"job.rewards[1].judge": "grpo has no pairs for a judge"},
        ),
        (
            {"inference": {"service": {"addresses": ["unix:///s", "nowhere"]}}},
            {
                "job.inference.service.addresses[1]": "'nowhere' has no port from 0 to 65535; an address is "
                "unix:///absolute/path or host:port"
            },
        ),
        (
            {"model": {"path": "/m", "lora": {"mode": "both"}}},
            {"job.model.lora.mode": "Input should be 'merged' or 'adapter'"},
        ),
        ({"model": {"path": "a\0b"}}, {"job.model.path": "has a character NUL"}),
        ({"labels": {"": "x"}}, {"job.labels": "the name '': String should have at least 1 character"}),
        ({"hardware": {"cpu": True, "gpus": 1}}, {"job.hardware.gpus": "a training on the CPU has none"}),
    ],
)  # fmt: skip  # a table
def test_what_is_wrong_is_named(fields: dict[str, Any], wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as raised:
        spec(**fields)
    assert {v.field: v.description for v in raised.value.violations} == wrong
    assert "\n" not in raised.value.message


def test_replicas_of_the_engine_take_their_weights_by_stream(tmp_path: Path) -> None:
    for addresses, mode in ((["unix:///a"], "colocate"), (["unix:///a", "unix:///b"], "server")):
        made = spec(inference={"service": {"addresses": addresses}})
        assert arguments(made, tmp_path, cpu=True)["vllm_mode"] == mode


@pytest.mark.parametrize(("rank", "room"), [(None, 8), (4, 8), (17, 32), (64, 64)])
def test_the_engine_of_a_job_has_room_for_its_adapter(tmp_path: Path, rank: int | None, room: int) -> None:
    lora = {"mode": "adapter"} | ({} if rank is None else {"rank": rank})
    made = spec(model={"path": "/m", "lora": lora}, inference={"managed": {"engine": {"max_model_len": 64}}})
    flag = engine_command(made, JobFolder(tmp_path))[-1]
    assert json.loads(flag.removeprefix("--engine=")) == {
        "dtype": "bfloat16",
        "enable_lora": True,
        "max_lora_rank": room,
        "max_model_len": 64,
    }
    merged = spec(model={"path": "/m", "lora": {}})
    assert json.loads(engine_command(merged, JobFolder(tmp_path))[-1].removeprefix("--engine=")) == {
        "dtype": "bfloat16"
    }
