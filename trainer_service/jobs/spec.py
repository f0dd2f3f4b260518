"""What a job is made of, in Python: the contract's JobSpec, as the store and the job's processes read it.

Here is checked what can be told from one value; `reading` has the rest of what the values alone tell, and `check` what
needs TRL, files and imports.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tandem.errors import InvalidArgument
from tandem.rpc.address import parse

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Table = dict[str, Any]

_IMPORT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: The algorithms, by the field of the spec that chooses each.
ALGORITHMS = ("grpo", "rloo", "online_dpo", "nash_md", "xpo")
#: Algorithms that compare rollouts in pairs, which judges do.
PAIRWISE = ("online_dpo", "nash_md", "xpo")


class Part(BaseModel):
    """A message of the contract. What is None was not set."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _one_of(part: BaseModel, *names: str) -> None:
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise ValueError(f"exactly one of {', '.join(names)} is needed, {found}")


def _address(value: str) -> str:
    try:
        parse(value)
    except InvalidArgument as error:
        raise ValueError(error.violations[0].description) from error
    return value


def _importable(value: str) -> str:
    if not _IMPORT.fullmatch(value):
        raise ValueError(f"must be module:function, is {value!r}")
    return value


def _plain(value: str) -> str:
    if "\0" in value:
        raise ValueError("has a character NUL")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
Address = Annotated[str, AfterValidator(_address)]
Importable = Annotated[str, AfterValidator(_importable)]


class Lora(Part):
    """A low-rank adapter."""

    rank: PositiveInt | None = None
    alpha: float | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: list[Text] = []
    mode: Literal["merged", "adapter"] = "merged"


class Model(Part):
    """A policy to begin with."""

    path: Text
    revision: Text | None = None
    dtype: Text = "bfloat16"
    lora: Lora | None = None


class HubDataset(Part):
    """A dataset of the Hugging Face hub."""

    path: Text
    config: Text | None = None
    split: Text = "train"
    revision: Text | None = None


class ReasoningGym(Part):
    """Tasks of reasoning-gym."""

    task: Text
    size: PositiveInt = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    config: Table = {}


class Dataset(Part):
    """Where prompts come from."""

    hub: HubDataset | None = None
    json_lines: Text | None = None
    parquet: Text | None = None
    reasoning_gym: ReasoningGym | None = None
    columns: dict[Plain, Plain] = {}

    @model_validator(mode="after")
    def _source(self) -> Self:
        _one_of(self, "hub", "json_lines", "parquet", "reasoning_gym")
        return self


class Judge(Part):
    """A judge of pairs."""

    name: Text
    options: Table = {}


class RewardTarget(Part):
    """Where a reward service is."""

    address: Address
    token_file: Text | None = None
    ca_file: Text | None = None
    timeout_s: float = Field(default=60.0, gt=0)


class Reward(Part):
    """What a rollout earns."""

    builtin: Text | None = None
    function: Importable | None = None
    model: Text | None = None
    judge: Judge | None = None
    service: RewardTarget | None = None
    weight: float = 1.0
    options: Table = {}

    @model_validator(mode="after")
    def _kind(self) -> Self:
        _one_of(self, "builtin", "function", "model", "judge", "service")
        if self.options and self.builtin is None:
            raise ValueError("options are for built-in rewards")
        return self


class ManagedInference(Part):
    """An inference service of the job's own."""

    engine: Table = {}
    gpus: Count = 0


class InferenceTarget(Part):
    """An inference service that is there."""

    addresses: list[Address] = Field(min_length=1)
    token_file: Text | None = None
    ca_file: Text | None = None


class Inference(Part):
    """Who generates."""

    managed: ManagedInference | None = None
    service: InferenceTarget | None = None

    @model_validator(mode="after")
    def _target(self) -> Self:
        _one_of(self, "managed", "service")
        return self


class Training(Part):
    """What every algorithm has. What is None has TRL's own default."""

    max_steps: PositiveInt | None = None
    num_train_epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, ge=0)
    lr_scheduler_type: Text | None = None
    warmup_steps: Count | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, ge=0)
    optim: Text | None = None
    per_device_train_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    max_completion_length: PositiveInt | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Count | None = None
    beta: float | None = Field(default=None, ge=0)
    gradient_checkpointing: bool | None = None
    save_steps: Count | None = None
    save_total_limit: PositiveInt | None = None
    logging_steps: PositiveInt | None = None
    report_to: list[Text] = []


class Algorithm(Part):
    """What each algorithm's settings have."""

    trl_options: Table = {}


class Grpo(Algorithm):
    """Settings of TRL's GRPOTrainer."""

    num_generations: Annotated[int, Field(ge=2)] | None = None
    num_iterations: PositiveInt | None = None
    epsilon: float | None = Field(default=None, ge=0)
    epsilon_high: float | None = Field(default=None, ge=0)
    loss_type: Text | None = None
    scale_rewards: Text | None = None
    mask_truncated_completions: bool | None = None
    steps_per_generation: PositiveInt | None = None


class Rloo(Algorithm):
    """Settings of TRL's RLOOTrainer."""

    num_generations: Annotated[int, Field(ge=2)] | None = None
    num_iterations: PositiveInt | None = None
    epsilon: float | None = Field(default=None, ge=0)
    normalize_advantages: bool | None = None
    steps_per_generation: PositiveInt | None = None


class OnlineDpo(Algorithm):
    """Settings of TRL's OnlineDPOTrainer."""

    loss_type: Text | None = None
    missing_eos_penalty: float | None = Field(default=None, gt=0)


class NashMd(Algorithm):
    """Settings of NashMDTrainer."""

    mixture_coef: Share | None = None
    missing_eos_penalty: float | None = Field(default=None, gt=0)


class Xpo(Algorithm):
    """Settings of XPOTrainer."""

    alpha: float | None = Field(default=None, ge=0)
    loss_type: Text | None = None
    missing_eos_penalty: float | None = Field(default=None, gt=0)


class Hardware(Part):
    """On what to train."""

    processes: PositiveInt = 1
    accelerate_config: Text | None = None
    gpus: Count | None = None
    cpu: bool = False

    @property
    def launched(self) -> bool:
        """Whether accelerate's launcher starts the training's processes."""
        return self.processes > 1 or self.accelerate_config is not None


class JobSpec(Part):
    """What to train, on what, for what reward, where."""

    model: Model
    dataset: Dataset
    rewards: list[Reward] = Field(min_length=1)
    inference: Inference
    training: Training = Training()
    grpo: Grpo | None = None
    rloo: Rloo | None = None
    online_dpo: OnlineDpo | None = None
    nash_md: NashMd | None = None
    xpo: Xpo | None = None
    hardware: Hardware = Hardware()
    max_retries: Count = 3
    labels: dict[Text, Plain] = {}

    @model_validator(mode="after")
    def _algorithm(self) -> Self:
        _one_of(self, *ALGORITHMS)
        return self

    @property
    def algorithm(self) -> str:
        """The algorithm's name, one of ALGORITHMS."""
        return next(name for name in ALGORITHMS if getattr(self, name) is not None)

    @property
    def settings(self) -> Algorithm:
        """The algorithm's settings."""
        settings: Algorithm = getattr(self, self.algorithm)
        return settings
