"""Generation for TRL's trainers by an inference service, in place of a vLLM engine of TRL's own."""

from __future__ import annotations

import io
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from transformers import ProcessorMixin

from tandem.errors import FailedPrecondition, Reason, TandemError, Unavailable, invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service._trl import VLLMGeneration
from trainer_service.client import PERHAPS_ASLEEP, WRITABLE, Group, is_gone
from trainer_service.ranks import OutOfStepError, heard, said
from trainer_service.reaching import Services, Weights, restore
from trainer_service.room import Room
from trainer_service.sampling import sampling_params
from trainer_service.seeds import Call, Numbering
from trainer_service.shards import Gathering
from trainer_service.updates import ATTEMPTS

logger = logging.getLogger(__name__)

_SYNC = "The main process could not sync: {}"
#: The adapter that is the policy is not there in an engine that was started again.
_TRY_AGAIN = (Reason.QUEUE_FULL, Reason.BASE_VERSION_MISMATCH, Reason.LORA_NOT_FOUND)


class RemoteGeneration(VLLMGeneration):
    """Generates rank by rank, without a collective: each may call as often as it likes, with any prompts.

    Weights are pushed by the main process alone, in `sync_weights`, which every rank must call.
    """

    # Stand-ins with what TRL looks at of its engine.
    llm: Any
    vllm_client: Any

    def __init__(
        self,
        *args: Any,
        client: Services,
        weights: Weights | None,
        gathering: Gathering | None = None,
        lora: str = "",
        seed: int | None = None,
        numbering: Numbering | None = None,
        **kwargs: Any,
    ):
        """Arguments are VLLMGeneration's, and:

        client: the service.
        weights: set in the main process only.
        gathering: how ranks read a model together that is spread over them.
        lora: the engine's adapter that is the policy, where its weights are not.
        seed: of all rollouts. `generation_kwargs` may have another, or None to draw what nobody can draw again.
        numbering: of the calls for rollouts, from which and the seed each has its own.
        """
        self.client = client
        self.weights = weights
        self.gathering = gathering
        self.lora = lora
        self.seed = seed
        self.numbering = numbering or Numbering()
        self.calls = 0
        self._version = 0  # what the last sync committed
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._logged = 0
        super().__init__(*args, **kwargs)
        self._room = Room(client, self.accelerator, shared=self.mode == "colocate")

    def _init_vllm(self) -> None:
        # A trainer that died may have left it torn, which the first sync heals, or asleep, or both.
        info = self.client.wait_until_serving(self.server_timeout, accept=WRITABLE)
        if info.state in PERHAPS_ASLEEP:
            self.client.wake_up()
        wanted = self.max_model_length
        if wanted is not None and wanted > info.max_model_len:
            raise invalid(
                "vllm_max_model_length",
                f"{wanted} is more than the service's max_model_len, {info.max_model_len}",
            )
        if self.enable_sleep_mode and not info.sleep_mode:
            raise invalid(
                "vllm_enable_sleep_mode", "the service's engine was started without enable_sleep_mode"
            )
        if self.structured_outputs_regex is not None and self.generation_kwargs.get("structured_outputs"):
            logger.warning("structured_outputs_regex takes precedence over generation_kwargs.")
        self._sampling()  # bad parameters are told now, not when the first batch is ready
        # The two places where TRL looks into its engine.
        model_config = SimpleNamespace(max_model_len=min(wanted or info.max_model_len, info.max_model_len))
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=model_config))
        server_info = {"model_config": {"logprobs_mode": info.logprobs_mode}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: server_info)
        self.accelerator.wait_for_everyone()

    @property
    def weight_version(self) -> int:
        """The version that the engine must hold now; 0 before the first sync."""
        return self.weights.weight_version if self.weights is not None else self._version

    def sync_weights(self) -> None:
        """Have the engine hold the policy. Every rank returns when it does; all raise where it failed."""
        self._room.make()  # before any rank generates
        version = 0
        error: BaseException | None = None
        together = self.gathering is not None and self.gathering.needed()
        if self.weights is None and self.gathering is not None and together:
            error = self.gathering.follow()
        if self.weights is not None:
            try:
                with self.gathering.leading() if self.gathering is not None and together else nullcontext():
                    self.weights.sync()
                version = self.weights.weight_version
            except OutOfStepError:
                raise
            except BaseException as raised:  # noqa: BLE001  raised again below, after the others were told
                error = raised
        self._version, failure = self._told(version, error)
        if error is not None:
            raise error
        if failure is not None:
            raise failure

    def _told(self, version: int, error: BaseException | None) -> tuple[int, Exception | None]:
        """What the main process says, on every rank. As tensors: accelerate pickles objects."""
        own, device = b"" if error is None else said(error, _SYNC), self.accelerator.device
        head = broadcast(torch.tensor([version, len(own)], dtype=torch.int64, device=device), from_process=0)
        version, length = head.tolist()
        text = torch.zeros(length, dtype=torch.uint8, device=device)
        if length and self.accelerator.is_main_process:
            text.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        return version, heard(bytes(broadcast(text, from_process=0).tolist())) if length else None

    def rest(self) -> None:
        """Have the engine sleep, if it shall. For when no rank generates any more; every rank must call it."""
        if self.enable_sleep_mode:
            self._room.free()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list[Any] | None] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[
        list[list[int]], list[list[int]], list[list[list[float | None]]] | None, list[list[list[int]]] | None
    ]:
        """Sample one rollout for each row of `prompts`, in order. Equal rows share their prefill.

        Args:
            prompts: token ids, one list per row.
            images: PIL images of each row, if any.
            num_generations: not needed: what is equal is seen.
            profiler: entered around the call.

        Returns:
            prompt_ids, completion_ids, logprobs and logprob_token_ids. The last two are of shape (rows,
            tokens, 1) where `self.logprobs` is 0, up to N + 1 where it is N, the most probable first, or None
            where it is None.
        """
        with profiler or nullcontext():
            rollouts = self.rollouts(prompts, images)
        completion_ids = [list(rollout.token_ids) for rollout in rollouts]
        if not self._wants_logprobs():
            return prompts, completion_ids, None, None
        pairs = [_logprobs(rollout) for rollout in rollouts]
        return prompts, completion_ids, [pair[1] for pair in pairs], [pair[0] for pair in pairs]

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[Any] | None] | None = None,
        **values: Any,
    ) -> list[pb.Rollout]:
        """One rollout for each row of `prompts`, in order. `values` are sampling parameters of this call alone."""
        started = time.perf_counter()
        keys, rows = _group(prompts, images)
        groups = [
            Group(prompts[members[0]], len(members), key[1]) for key, members in zip(keys, rows, strict=True)
        ]
        if self.enable_sleep_mode:
            self._room.wake()
        done: dict[int, pb.Rollout] = {}
        sampling = self._sampling(values, self.numbering.next())
        for members, group in zip(rows, self._generate(groups, sampling), strict=True):
            done |= zip(members, group, strict=True)
        self.calls += 1
        tokens = sum(len(rollout.token_ids) for rollout in done.values())
        self._metrics["tandem/tokens_per_second"].append(tokens / (time.perf_counter() - started))
        return [done[row] for row in range(len(prompts))]

    def drain_metrics(self) -> dict[str, list[float]]:
        """What happened since the last call, by the name in TRL's logs. Counts are this rank's own."""
        metrics, self._metrics = dict(self._metrics), defaultdict(list)
        if self.weights is not None and self.weights.history:
            count = self.weights.committed - self._logged
            self._logged = self.weights.committed
            if new := list(self.weights.history)[-count:] if count else []:
                metrics["tandem/sync_ms"] = [update.seconds * 1e3 for update in new]
                metrics["tandem/bytes_moved"] = [float(update.nbytes) for update in new]
                if changed := [float(update.changed) for update in new if update.changed is not None]:
                    metrics["tandem/elements_changed"] = changed
            metrics["tandem/weight_version"] = [float(self.weights.weight_version)]
            if self.weights.transport:  # a figure has no text: the name tells, and its value is 1
                metrics[f"tandem/transport/{self.weights.transport}"] = [1.0]
                metrics["tandem/aliased"] = [float(self.weights.aliased)]
        if self.accelerator.device.type == "cuda":  # of the whole device, which the engine may share
            free, total = torch.cuda.mem_get_info(self.accelerator.device)
            metrics["tandem/gpu_memory_gib"] = [(total - free) / 2**30]
        return metrics

    def _generate(self, groups: list[Group], sampling: pb.SamplingParams) -> list[list[pb.Rollout]]:
        """Rollouts of the version that was synced last, if need be from an engine that came back."""
        wanted = self._wants_logprobs()
        for left in reversed(range(ATTEMPTS)):
            try:
                rollouts = self.client.generate(
                    groups,
                    sampling,
                    logprobs=wanted,
                    lora=self.lora,
                    prompt_ids=any(group.images for group in groups),
                    # One that was started again is brought it by `recover`, and told at once.
                    min_weight_version=self.weight_version,
                    version_wait_s=0.0,
                )
                self._check(rollouts)
                _check_prompts(groups, rollouts)
            except TandemError as error:
                if not left or not (is_gone(error) or error.reason in _TRY_AGAIN):
                    raise
                logger.warning("generation failed, trying again: %s", error)
                self.recover(error)
            else:
                return rollouts
        raise AssertionError  # the loop returns or raises

    def _check(self, rollouts: list[list[pb.Rollout]]) -> None:
        expected = self.weight_version
        for rollout in (rollout for group in rollouts for rollout in group):
            if rollout.finish_reason == pb.FINISH_REASON_ABORTED or not rollout.token_ids:
                raise Unavailable(Reason.INTERRUPTED, "Rollouts were aborted: somebody paused the engine.")
            versions = {span.weight_version for span in rollout.version_spans}
            if expected and versions != {expected}:
                raise FailedPrecondition(
                    Reason.BASE_VERSION_MISMATCH,
                    f"Rollouts are of weight versions {sorted(versions)}, not of {expected}, which was "
                    "synced last: the engine was restarted, or has another trainer.",
                )

    def recover(self, error: TandemError) -> None:
        """Wait until the engine may give what it refused with `error`: it is free again, or holds the policy."""
        if error.reason == Reason.QUEUE_FULL:
            time.sleep(error.retry_after or 1.0)
        elif self.weights is not None:
            restore(self.weights, self.server_timeout)
            self._version = self.weights.weight_version
        else:
            self._wait_for_version()

    def _wait_for_version(self) -> None:
        """Wait until the engine has the version that was synced last: the main process gives it to one that came
        back."""
        deadline = time.monotonic() + self.server_timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            version = self.client.wait_until_serving(left).weight_version
            if version >= self._version:  # beyond it, waiting does not help, and the rollouts will tell
                return
            if not left:
                raise FailedPrecondition(
                    Reason.BASE_VERSION_MISMATCH,
                    f"The engine has weight version {version}, and after {self.server_timeout:.0f} s the main "
                    f"process has not given it {self._version} again, which was synced last.",
                )
            time.sleep(0.2)

    def _values(self) -> dict[str, Any]:
        """Sampling parameters by vLLM's names. `generation_kwargs` win, as in TRL."""
        values = {
            "max_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "logprobs": self.logprobs,
            **self.generation_kwargs,
        }
        if self.structured_outputs_regex is not None:
            values["structured_outputs"] = {"regex": self.structured_outputs_regex}
        return values

    def _wants_logprobs(self) -> bool:
        return self._values()["logprobs"] is not None

    def _sampling(
        self, values: Mapping[str, Any] | None = None, call: Call | None = None
    ) -> pb.SamplingParams:
        asked = {"seed": self.seed} | self._values() | dict(values or {})
        place = getattr(self.processing_class, "image_token_id", None)
        if (
            isinstance(self.processing_class, ProcessorMixin)
            and place is not None
            and "mixture_coef" not in asked
        ):
            # The loss would look for the image that a sampled place stands for. TRL's own generation suppresses it too.
            asked["logit_bias"] = {place: -100.0} | (asked.get("logit_bias") or {})
        params = sampling_params(asked)
        if call is not None and params.HasField("seed"):
            params.seed = call.seed(params.seed, self.accelerator.process_index)
        return params


def _check_prompts(groups: Sequence[Group], rollouts: Sequence[Sequence[pb.Rollout]]) -> None:
    """Refuse rollouts of another prompt than the trainer has: both sides make tokens of an image."""
    for group, (first, *_) in zip(groups, rollouts, strict=True):
        if group.images and list(first.prompt_token_ids) != list(group.token_ids):
            raise invalid(
                "processing_class",
                f"makes {len(group.token_ids)} tokens of a prompt with images; the engine's makes others of them, "
                f"{len(first.prompt_token_ids)}",
            )


def _group(
    prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Any] | None] | None
) -> tuple[list[tuple[tuple[int, ...], tuple[bytes, ...]]], list[list[int]]]:
    """The different (token ids, encoded images) among the rows, and the rows that have each."""
    encoded: dict[int, bytes] = {}
    members: dict[tuple[tuple[int, ...], tuple[bytes, ...]], list[int]] = {}
    for row, ids in enumerate(prompts):
        pictures = (images[row] if images is not None else None) or ()
        for picture in pictures:
            if id(picture) not in encoded:
                encoded[id(picture)] = _png(picture)
        members.setdefault((tuple(ids), tuple(encoded[id(p)] for p in pictures)), []).append(row)
    return list(members), list(members.values())


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _logprobs(rollout: pb.Rollout) -> tuple[list[list[int]], list[list[float | None]]]:
    """Token ids and logprobs at each position, the most probable first. Always with the sampled token."""
    ids, logprobs = [], []
    top, k = rollout.top_logprobs, rollout.top_logprobs.k
    for position, (token, logprob) in enumerate(zip(rollout.token_ids, rollout.logprobs, strict=True)):
        row_ids = list(top.token_ids[position * k : (position + 1) * k])
        row = list(top.logprobs[position * k : (position + 1) * k])
        if token not in row_ids:  # then it is less probable than all of these
            row_ids.append(token)
            row.append(logprob)
        ids.append(row_ids)
        logprobs.append([None if math.isnan(value) else value for value in row])
    return ids, logprobs
