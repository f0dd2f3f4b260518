"""A job's specification as TRL's: the configuration's arguments, by TRL's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer_service.jobs.spec import JobSpec

#: Fields of TRL's configurations that the service sets, or that would start what it does not own.
OWN = frozenset(
    {
        "hub_token",
        "output_dir",
        "push_to_hub",
        "resume_from_checkpoint",
        "reward_weights",
        "use_cpu",
        "use_vllm",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
    }
)
_SAVE_NONE = 2**31 - 1  # steps: the last one is saved in any case
#: Fields of Training that an algorithm's configuration has under another name.
_RENAMED = {
    algorithm: {"max_completion_length": "max_new_tokens"} for algorithm in ("online_dpo", "nash_md", "xpo")
}


def given_options(spec: JobSpec) -> dict[str, tuple[str, Any]]:
    """What the user set: by TRL's name, the path of the field in the job and its value. `trl_options` come last."""
    renamed = _RENAMED.get(spec.algorithm, {})
    found: dict[str, tuple[str, Any]] = {}
    for name, value in spec.training.model_dump(exclude_none=True).items():
        if name != "report_to":
            found[renamed.get(name, name)] = (f"training.{name}", value)
    for name, value in spec.settings.model_dump(exclude_none=True, exclude={"trl_options"}).items():
        found[name] = (f"{spec.algorithm}.{name}", value)
    for name, value in spec.settings.trl_options.items():
        found[name] = (f"{spec.algorithm}.trl_options.{name}", value)
    return found


def arguments(spec: JobSpec, folder: Path, *, cpu: bool) -> dict[str, Any]:
    """All arguments of TRL's configuration.

    Args:
        spec: the job's.
        folder: where checkpoints go.
        cpu: whether the training has no GPU.
    """
    values: dict[str, Any] = {
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": False,  # autocast, which a model in bfloat16 does not need
        "dataloader_pin_memory": not cpu,
        "report_to": spec.training.report_to or "none",
        "vllm_mode": "colocate" if _shares_host(spec) else "server",
    }
    values |= {name: value for name, (_, value) in given_options(spec).items()}
    if values.get("save_steps") == 0:
        values["save_steps"] = _SAVE_NONE
    init = {"dtype": spec.model.dtype}
    if spec.model.revision is not None:
        init["revision"] = spec.model.revision
    values["model_init_kwargs"] = init | (values.get("model_init_kwargs") or {})
    weights = [reward.weight for reward in spec.rewards]
    if any(weight != 1 for weight in weights):
        values["reward_weights"] = weights
    return values | {"output_dir": str(folder), "use_cpu": cpu, "save_strategy": "steps"}


def _shares_host(spec: JobSpec) -> bool:
    """Whether the engine's memory can be shared by default."""
    if spec.inference.service is not None:
        first, *more = spec.inference.service.addresses
        return not more and first.startswith("unix:")
    return spec.inference.managed is not None and spec.inference.managed.gpus == 0
