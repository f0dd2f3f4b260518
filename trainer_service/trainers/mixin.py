"""What a TRL trainer needs to have its rollouts from an inference service."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from tandem.errors import invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service._trl import get_config_model_id
from trainer_service.account import Account
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.client import WRITABLE
from trainer_service.generation import RemoteGeneration
from trainer_service.policy_tensors import EVERYTHING, policy_tensors
from trainer_service.reaching import INFERENCE, Addresses, Services, Weights, reached, weights_of
from trainer_service.seeds import Numbering
from trainer_service.shards import Gathering
from trainer_service.together import Together
from trainer_service.tokenizers import check_tokenizer
from trainer_service.trainers.optimizer import OptimizerMixin
from trainer_service.trainers.resume import RELIED_ON, ResumeMixin
from weight_transfer.transports import SourceTensor

TRL_SERIES = "1.16."

#: The transports of each vllm_mode, the fastest first: "colocate" shares memory, "server" may be anywhere.
TRANSPORTS = {"colocate": ("shared",), "server": ("nccl", "stream")}

#: How a LoRA adapter reaches the engine: merged into its weights, or alone, beside weights that stay what they are.
LORA_MODES = ("merged", "adapter")
ADAPTER = "policy"  # what the engine calls it then

#: Sampling parameters that TRL's trainers take from their config, and what they are where it has no such field.
SAMPLING: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "generation_kwargs": None,
}


class RemoteMixin(OptimizerMixin, ResumeMixin):
    """Goes before one of TRL's trainers in the bases.

    TRL's own `__init__` runs with `use_vllm` off, so that it starts no engine; then vLLM's place is taken by
    a RemoteGeneration, and `use_vllm` turned on. Where TRL might then still generate by itself, this raises.
    """

    #: Arguments of the config that TRL reads only for its own generation, and what they are while it starts.
    _off: ClassVar[dict[str, Any]] = {
        "use_vllm": False,
        "generation_kwargs": None,
        "use_transformers_continuous_batching": False,
    }
    #: `logprobs` of VLLMGeneration, as the TRL trainer passes it.
    _logprobs: int | None = None
    #: Names of the TRL trainer that its subclass here relies on.
    _relied_on: ClassVar[tuple[str, ...]] = ()

    # What TRL's trainers have beside transformers'.
    vllm_generation: Any
    vllm_mode: str
    use_vllm: bool
    model: Any
    policy_weights: Weights | None
    _lora_mode = "merged"  # a trainer that takes another sets it first
    _evaluating = False
    _together: Together | None = None
    #: Where trainers that groups are known of keep account of them.
    account: Account | None = None

    def _start(self, init: Any, args: Any, address: Addresses | None, token: str | None) -> None:
        """Run TRL's `init`, then take vLLM's place."""
        mode = args.vllm_mode
        if self._lora_mode not in LORA_MODES:
            raise invalid("lora_mode", f"{self._lora_mode!r} is neither 'merged' nor 'adapter'")
        if mode not in TRANSPORTS:
            raise invalid("vllm_mode", f"{mode!r} is neither 'colocate' nor 'server'")
        client = reached(INFERENCE, "inference_address", address, token, mode)
        try:
            # Before a model is loaded.
            self._check_service(client.wait_until_serving(args.vllm_server_timeout, accept=WRITABLE))
            with replaced(args, self._off):
                init()
            check_tokenizer(client, self.processing_class, "processing_class")
            self._attach(client, args, TRANSPORTS[mode])
        except BaseException:
            client.close()
            raise
        self._check_contract()

    def _check_service(self, info: pb.GetModelResponse) -> None:
        """Refuse a service that lacks what this trainer needs."""

    def _attach(self, client: Services, args: Any, transports: Sequence[str]) -> None:
        main = self.accelerator.is_main_process
        adapter = ADAPTER if self._lora_mode == "adapter" else ""
        if adapter:
            adapter_tensors(self.model)  # what cannot be sent alone is told now
            transports = ("stream",)
        gathering = Gathering(self.accelerator, lambda: self.model, self._everything)
        options: dict[str, Any] = {}
        if "shared" in transports and self.accelerator.num_processes > 1:
            self._together = options["together"] = Together(self.accelerator, gathering, lambda: self.model)
        self.policy_weights = (
            weights_of(
                client,
                lambda: self.model,
                transport=transports,
                timeout_s=args.vllm_server_timeout,
                led=gathering.led,
                adapter=adapter,
                **options,
            )
            if main
            else None
        )
        self.use_transformers_continuous_batching = False
        self._generations = Numbering(self._where)
        self.vllm_generation = RemoteGeneration(
            self.model,
            self.accelerator,
            self.processing_class,
            client=client,
            weights=self.policy_weights,
            gathering=gathering,
            lora=adapter,
            seed=args.seed,
            numbering=Numbering(self._where),
            mode=args.vllm_mode,
            structured_outputs_regex=getattr(args, "vllm_structured_outputs_regex", None),
            server_timeout=args.vllm_server_timeout,
            max_model_length=getattr(args, "vllm_max_model_length", None),
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            max_completion_length=self._max_completion_length(args),
            logprobs=self._logprobs,
            **{name: getattr(args, name, default) for name, default in SAMPLING.items()},
        )
        self.use_vllm = True
        self._forget_sync()

    def _everything(self) -> list[SourceTensor]:
        """All that ranks may have to read together."""
        if self._lora_mode == "merged":
            return policy_tensors(self.model, EVERYTHING)
        return policy_tensors(self.model, EVERYTHING, merged=False) + adapter_tensors(self.model)

    def _max_completion_length(self, args: Any) -> int:
        return cast(int, args.max_completion_length)

    def _where(self) -> tuple[int, bool]:
        return self.state.global_step, self._evaluating

    def _forget_sync(self) -> None:
        """Have the policy synced before the next rollout, whatever step it is."""
        self._last_loaded_step = -1

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Goes around what TRL has rollouts made in: they must be the service's."""
        before = self.vllm_generation.calls
        yield
        if self.vllm_generation.calls == before:
            raise RuntimeError("TRL generated by itself, not by the inference service.")

    def _check_contract(self) -> None:
        """Refuse a TRL in which the names that this class relies on mean something else."""
        version = importlib.metadata.version("trl")
        if not version.startswith(TRL_SERIES):
            raise ImportError(f"trainer_service works with TRL {TRL_SERIES}*, not {version}")
        for name in (*self._relied_on, "state", "accelerator", "processing_class", *RELIED_ON):
            if not hasattr(self, name):
                raise ImportError(f"TRL {version}'s {type(self).__name__} has no {name}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. Where it raises within an optimizer step, the lease of that step is given back."""
        self.vllm_generation.numbering.restart()
        self._generations.restart()
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            if self.policy_weights is not None:
                self.policy_weights.abandon(f"training raised {type(error).__name__}")
            raise

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self.updating_weights():
            return super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> Any:
        with self.updating_weights():
            return super()._load_best_model(*args, **kwargs)

    @contextmanager
    def updating_weights(self) -> Iterator[None]:
        """Goes around any code that writes the policy's parameters in place, except an optimizer's step."""
        self._forget_sync()  # whatever is written must reach the engine
        if self.policy_weights is None:
            yield
        else:
            with self.policy_weights.update():
                yield

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. What is sampled after it is as if it had not been: a resumed run does not repeat it."""
        self._evaluating = True
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self._evaluating = False
        if self.accelerator.is_main_process and not self.vllm_generation.enable_sleep_mode:
            self.vllm_generation.client.reset_prefix_cache()  # a cached prefix has other rounding errors
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with what the service did since the last time."""
        for name, values in self.vllm_generation.drain_metrics().items():
            logs[name] = sum(values) / len(values)
        super().log(logs, start_time)

    def close(self) -> None:
        """End the session with the service. The model stays, in memory of its own; training cannot go on."""
        if self.policy_weights is not None:
            self.policy_weights.detach()
        if self._together is not None:
            self._together.leave()
        self.vllm_generation.client.close()


class MeteredMixin(RemoteMixin):
    """RemoteMixin for trainers that keep their figures in `_metrics`, by mode."""

    _metrics: dict[str, Any]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, which puts the service's figures with its own, under `eval_` while it evaluates."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in self.vllm_generation.drain_metrics().items():
            metrics[name].extend(values)
        super().log(logs, start_time)


def named_after(model: Any, suffix: str) -> str:
    """The folder that TRL's trainers write to if they are given none."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return f"{name.split('/')[-1]}-{suffix}"


@contextmanager
def replaced(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Give `target` other attributes for a while."""
    saved = {name: getattr(target, name) for name in values if hasattr(target, name)}
    try:
        for name in saved:
            setattr(target, name, values[name])
        yield
    finally:
        for name, value in saved.items():
            setattr(target, name, value)
