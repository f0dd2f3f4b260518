"""What a job's process trains with, made from the job's specification: dataset, rewards, configuration, trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tandem.errors import invalid
from tandem.rpc.trust import read_token
from trainer_service import rewards
from trainer_service.jobs.configure import arguments
from trainer_service.jobs.spec import PAIRWISE, Dataset, JobSpec, Reward
from trainer_service.rewards.named import builtin, function

#: The reward of reasoning-gym's own scorers.
GYM = "reasoning_gym"


def config_class(algorithm: str) -> type[Any]:
    """TRL's configuration of an algorithm."""
    if algorithm in ("grpo", "rloo"):
        from trainer_service import _trl

        return {"grpo": _trl.GRPOConfig, "rloo": _trl.RLOOConfig}[algorithm]
    if algorithm == "online_dpo":
        from trainer_service._trl_experimental import OnlineDPOConfig

        return OnlineDPOConfig
    from trainer_service.trainers import NashMDConfig, XPOConfig

    return {"nash_md": NashMDConfig, "xpo": XPOConfig}[algorithm]


def trainer_class(algorithm: str) -> type[Any]:
    """Tandem's trainer of an algorithm."""
    from trainer_service import trainers

    names = {"grpo": "GRPO", "rloo": "RLOO", "online_dpo": "OnlineDPO", "nash_md": "NashMD", "xpo": "XPO"}
    found: type[Any] = getattr(trainers, f"{names[algorithm]}Trainer")
    return found


def dataset(spec: Dataset, cache: Path) -> Any:
    """The prompts, with the columns that the job renames renamed."""
    import datasets  # type: ignore[import-untyped]

    if spec.hub is not None:
        hub = spec.hub
        made = datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision)
    elif spec.json_lines is not None:
        made = datasets.Dataset.from_json(spec.json_lines, cache_dir=str(cache))
    elif spec.parquet is not None:
        made = datasets.Dataset.from_parquet(spec.parquet, cache_dir=str(cache))
    else:
        made = datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": entry["question"]}],
                    "answer": entry["answer"],
                    "item": i,
                }
                for i, entry in enumerate(tasks(spec))
            ]
        )
    return made.rename_columns(spec.columns)


def tasks(spec: Dataset, size: int | None = None) -> Any:
    """The tasks of reasoning-gym. Raises whatever it raises against a task or its settings."""
    import reasoning_gym  # type: ignore[import-untyped]

    gym = spec.reasoning_gym
    if gym is None:
        raise ValueError("the dataset has no tasks")
    state = random.getstate()  # some of its tasks draw from the global generator
    try:
        return reasoning_gym.create_dataset(gym.task, size=size or gym.size, seed=gym.seed, **gym.config)
    finally:
        random.setstate(state)


def reward(spec: Reward, data: Dataset, field: str) -> Any:
    """One reward, as TRL's trainers take it. Judges are made by `judge`.

    Raises:
        InvalidArgument: names the field under `field`.
    """
    if spec.builtin == GYM:
        return _gym_reward(data, f"{field}.builtin")
    if spec.builtin is not None:
        return rewards.checked(builtin(spec.builtin, spec.options or None, field=f"{field}.builtin"))
    if spec.function is not None:
        found = function(spec.function, field=f"{field}.function")
        return rewards.checked(found, field=f"{field}.function")
    if spec.model is not None:
        return spec.model
    if spec.service is None:
        raise invalid(field, "a judge is no reward of a single rollout")
    target = spec.service
    token = read_token(Path(target.token_file), f"{field}.service.token_file") if target.token_file else None
    channel: dict[str, Any] = {"ca_file": target.ca_file} if target.ca_file else {}
    return rewards.RemoteReward(target.address, token=token, timeout_s=target.timeout_s, **channel)


def judge(spec: Reward, field: str) -> Any:
    """A reward's judge."""
    if spec.judge is None:
        raise ValueError("the reward is no judge")
    return rewards.judge(spec.judge.name, spec.judge.options, field=f"{field}.judge")


def trainer(spec: JobSpec, folder: Path, *, cpu: bool, callbacks: list[Any], record: Any) -> Any:
    """The trainer. Loads the model, and waits for the inference service.

    Args:
        spec: the job's.
        folder: of the job.
        cpu: whether there is no GPU for it.
        callbacks: of transformers' trainer.
        record: is called with each reward function, and returns what is used in its place.
    """
    args = config_class(spec.algorithm)(**arguments(spec, folder / "checkpoints", cpu=cpu))
    given: dict[str, Any] = {}
    if any(part.judge is not None for part in spec.rewards):
        given["judge"] = judge(spec.rewards[0], "rewards[0]")
    else:
        found = [reward(part, spec.dataset, f"rewards[{i}]") for i, part in enumerate(spec.rewards)]
        given["reward_funcs"] = [record(one) if callable(one) else one for one in found]
    if spec.algorithm in PAIRWISE:  # GRPO's and RLOO's load it by themselves
        from transformers import AutoProcessor

        revision = spec.model.revision or "main"
        given["processing_class"] = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            spec.model.path, revision=revision, truncation_side="left", padding_side="left"
        )
    return trainer_class(spec.algorithm)(
        model=spec.model.path,
        args=args,
        train_dataset=dataset(spec.dataset, folder / "cache"),
        peft_config=_peft(spec),
        lora_mode=spec.model.lora.mode if spec.model.lora is not None else "merged",
        callbacks=callbacks,
        **given,
    )


def _peft(spec: JobSpec) -> Any:
    if spec.model.lora is None:
        return None
    from peft import LoraConfig

    lora = spec.model.lora
    named = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=lora.target_modules or None, **values)


def _gym_reward(data: Dataset, field: str) -> Any:
    if data.reasoning_gym is None:
        raise invalid(field, "only tasks of reasoning_gym have its scorers")
    import reasoning_gym

    made = tasks(data)

    def score(completions: list[Any], item: list[int], **_: Any) -> list[float]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        answers = [reasoning_gym.utils.extract_answer(text) or text for text in texts]
        return [float(made.score_answer(a, made[i])) for a, i in zip(answers, item, strict=True)]

    score.__name__ = GYM
    return score
