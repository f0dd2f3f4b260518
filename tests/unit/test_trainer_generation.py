"""What TRL gets from our generation, and what it does when the service fails."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.client import Group
from trainer_service.generation import RemoteGeneration
from trainer_service.seeds import Call, Numbering


class Service:
    """What RemoteGeneration needs of a client. `answer` makes the rollouts of a group."""

    def __init__(self, answer: Callable[[Group], list[pb.Rollout]] | None = None) -> None:
        self.answer = answer or (lambda group: [rollout(list(group.token_ids[:1]))] * group.n)
        self.calls: list[tuple[list[Group], pb.SamplingParams, bool]] = []
        self.loras: list[str] = []
        self.needed: list[dict[str, float]] = []
        self.errors: list[Exception] = []
        self.waited = 0
        self.state = ServingState.SERVING_STATE_SERVING
        self.woken = 0
        self.sleeps = False
        self.versions = [3]  # of the engine, one after the other; the last one stays

    def wait_until_serving(self, timeout_s: float, **_: object) -> pb.GetModelResponse:
        self.waited += 1
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        return pb.GetModelResponse(
            max_model_len=64,
            logprobs_mode="raw_logprobs",
            weight_version=version,
            state=self.state,
            sleep_mode=self.sleeps,
        )

    def wake_up(self) -> None:
        self.woken += 1

    def generate(
        self, groups: list[Group], sampling: pb.SamplingParams, logprobs: bool, lora: str, **needed: float
    ) -> list[list[pb.Rollout]]:
        self.needed.append(needed)
        self.calls.append((groups, sampling, logprobs))
        self.loras.append(lora)
        if self.errors:
            raise self.errors.pop(0)
        return [self.answer(group) for group in groups]


class Weights:
    """What RemoteGeneration needs of PolicyWeights."""

    def __init__(self, version: int = 3) -> None:
        self.weight_version = version
        self.synced = 0
        self.history: list[Any] = []
        self.committed = 0

    def sync(self) -> None:
        self.synced += 1


def rollout(ids: list[int], version: int = 3, **fields: Any) -> pb.Rollout:
    spans = [pb.VersionSpan(weight_version=version, num_tokens=len(ids))]
    fields.setdefault("logprobs", [-0.5] * len(ids))
    return pb.Rollout(token_ids=ids, version_spans=spans, **fields)


def generation(service: Service, weights: Weights | None = None, **options: Any) -> RemoteGeneration:
    # Not one for all: arguments of a trainer, which another test makes, have its state forgotten.
    accelerator = Accelerator(cpu=True)
    return RemoteGeneration(None, accelerator, None, client=service, weights=weights, **options)


def test_the_two_places_where_trl_looks_inside() -> None:
    made = generation(Service())
    assert made.llm.llm_engine.model_config.max_model_len == 64
    assert made.vllm_client.get_server_info()["model_config"]["logprobs_mode"] == "raw_logprobs"
    assert generation(Service(), max_model_length=32).llm.llm_engine.model_config.max_model_len == 32
    with pytest.raises(InvalidArgument, match="vllm_max_model_length"):
        generation(Service(), max_model_length=65)


def test_an_engine_that_cannot_sleep_is_found_out_before_the_first_batch() -> None:
    service = Service()
    with pytest.raises(InvalidArgument, match="vllm_enable_sleep_mode"):
        generation(service, enable_sleep_mode=True)
    service.sleeps = True
    generation(service, enable_sleep_mode=True)


@pytest.mark.parametrize(("state", "woken"), [("SERVING", 0), ("ASLEEP", 1), ("TORN", 1)])
def test_an_engine_that_a_dead_trainer_left_asleep_is_woken(state: str, woken: int) -> None:
    """Also where it died in its optimizer's step: in sleep mode the engine sleeps then, and is torn beside."""
    service = Service()
    service.state = ServingState.Value(f"SERVING_STATE_{state}")
    generation(service)
    assert service.woken == woken


def test_no_logprobs_where_none_are_wanted() -> None:
    service = Service(lambda group: [rollout([1, 2], logprobs=[])] * group.n)
    assert generation(service, logprobs=None).generate([[1]], None, 1) == ([[1]], [[1, 2]], None, None)
    assert service.calls[0][2] is False


def test_top_logprobs_are_sorted_and_have_the_sampled_token() -> None:
    top = pb.TopLogprobs(k=2, token_ids=[7, 8, 7, 8], logprobs=[-0.25, -1.5, -0.125, -3.0])
    service = Service(lambda group: [rollout([8, 9], logprobs=[-1.5, -4.0], top_logprobs=top)])
    _, _, logprobs, ids = generation(service, logprobs=2).generate([[1]], None, 1)
    assert ids == [[[7, 8], [7, 8, 9]]]
    assert logprobs == [[[-0.25, -1.5], [-0.125, -3.0, -4.0]]]
    assert service.calls[0][1].top_logprobs == 2


def test_nan_is_none_as_trl_has_it() -> None:
    service = Service(lambda group: [rollout([5, 6], logprobs=[math.nan, -1.0])])
    assert generation(service).generate([[1]], None, 1)[2] == [[[None], [-1.0]]]


def test_images_are_part_of_what_is_equal() -> None:
    red, blue, red_again = (Image.new("RGB", (4, 4), color) for color in ("red", "blue", "red"))
    service = Service(lambda group: [rollout([5], prompt_token_ids=group.token_ids)] * group.n)
    generation(service).generate([[1], [1], [1], [1]], [[red], [blue], [red_again], None], 4)
    groups = service.calls[0][0]
    assert [(group.n, len(group.images)) for group in groups] == [(2, 1), (1, 1), (1, 0)]
    decoded = Image.open(io.BytesIO(groups[1].images[0]))
    assert (decoded.size, decoded.getpixel((0, 0))) == ((4, 4), (0, 0, 255))


def test_a_prompt_with_images_that_became_another_in_the_engine_is_refused() -> None:
    service = Service(lambda group: [rollout([5], prompt_token_ids=[1, 9, 9, 2])] * group.n)
    image = [Image.new("RGB", (4, 4))]
    with pytest.raises(InvalidArgument, match="makes 3 tokens of a prompt with images") as refusal:
        generation(service).generate([[1, 9, 2]], [image], 1)
    assert refusal.value.violations[0].field == "processing_class"
    generation(service).generate([[1, 9, 2]], None, 1)  # of text alone the service makes nothing


def test_sampling_is_trls_and_generation_kwargs_win() -> None:
    service = Service()
    generation(
        service,
        temperature=0.5,
        top_p=0.75,
        top_k=9,
        min_p=None,
        repetition_penalty=1.25,
        max_completion_length=11,
        generation_kwargs={"temperature": 2.0, "stop": ["x"], "structured_outputs": {"json": {}}},
        structured_outputs_regex="a+",
    ).generate([[1]], None, 1)
    assert service.calls[0][1] == pb.SamplingParams(
        temperature=2.0,
        top_p=0.75,
        top_k=9,
        repetition_penalty=1.25,
        max_tokens=11,
        top_logprobs=0,
        stop=["x"],
        structured_output=pb.StructuredOutput(regex="a+"),
    )


def test_unknown_generation_kwargs_are_told_at_once() -> None:
    with pytest.raises(InvalidArgument, match="use_beam_search"):
        generation(Service(), generation_kwargs={"use_beam_search": True})


def test_each_call_has_a_seed_of_its_own_that_a_resumed_run_has_too() -> None:
    class Rank(Accelerator):
        process_index = 2

    def seeds(places: list[tuple[int, bool]], **options: Any) -> list[int]:
        service, here = Service(), iter(places)
        made = RemoteGeneration(
            None,
            Rank(cpu=True),
            None,
            client=service,
            weights=None,
            **{"seed": 5, "numbering": Numbering(lambda: next(here))} | options,
        )
        for _ in places:
            made.generate([[1]], None, 1)
        return [call[1].seed for call in service.calls]

    whole = seeds([(0, False), (0, False), (1, False), (1, True), (1, False), (2, False)])
    assert len(set(whole)) == 6
    assert whole[:2] == [Call(0, 0).seed(5, 2), Call(0, 1).seed(5, 2)]
    assert seeds([(1, False), (1, False), (2, False)]) == [whole[2], *whole[4:]], "without what was evaluated"
    assert seeds([(0, False)], generation_kwargs={"seed": 6}) == [Call(0, 0).seed(6, 2)]
    assert seeds([(0, False)], seed=None) == seeds([(0, False)], generation_kwargs={"seed": None}) == [0]


def test_a_call_that_is_tried_again_keeps_its_seed() -> None:
    service = Service()
    service.errors = [Unavailable(Reason.UNREACHABLE, "gone")]
    generation(service, Weights(), seed=5).generate([[1]], None, 1)
    first, again = service.calls
    assert first[1].seed == again[1].seed == Call(0, 0).seed(5, 0)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.integers(0, 3)), unique=True)
)
def test_seeds_are_as_good_as_random(places: list[tuple[int, int, bool, int]]) -> None:
    found = {Call(*place).seed(42, rank) for *place, rank in places}
    assert len(found) == len(places)
    assert all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable(Reason.UNREACHABLE, "gone"),
        Unavailable(Reason.ENGINE_TORN, "torn"),
        Unavailable(Reason.ENGINE_DEAD, "dead"),
    ],
    ids=lambda error: str(error.reason),
)
def test_an_engine_that_went_away_is_given_the_weights_anew(error: Exception) -> None:
    service, weights = Service(), Weights()
    service.errors = [error]
    assert generation(service, weights).generate([[1]], None, 1)[1] == [[1]]
    assert (weights.synced, len(service.calls)) == (1, 2)


def test_an_engine_that_lost_the_adapter_is_given_it_anew() -> None:
    service, weights = Service(), Weights()
    service.errors = [NotFound(Reason.LORA_NOT_FOUND, "no adapter")]
    assert generation(service, weights, lora="policy").generate([[1]], None, 1)[1] == [[1]]
    assert (weights.synced, service.loras) == (1, ["policy", "policy"])


def test_an_engine_with_older_weights_is_not_to_sample() -> None:
    service, weights = Service(), Weights()
    service.errors = [Unavailable(Reason.WEIGHTS_TOO_OLD, "it was started again")]
    assert generation(service, weights).generate([[1]], None, 1)[1] == [[1]]
    assert service.needed == [{"min_weight_version": 3, "version_wait_s": 0.0, "prompt_ids": False}] * 2
    assert weights.synced == 1


def test_rollouts_of_another_version_are_never_returned() -> None:
    versions = [1, 3]  # of the checkpoint, in an engine that was started again; then ours
    service, weights = Service(lambda group: [rollout([1], versions.pop(0))]), Weights()
    assert generation(service, weights).generate([[1]], None, 1)[1] == [[1]]
    assert weights.synced == 1

    mixed = pb.Rollout(token_ids=[1, 2], logprobs=[0, 0])
    mixed.version_spans.add(weight_version=2, num_tokens=1)
    mixed.version_spans.add(weight_version=3, num_tokens=1)
    with pytest.raises(FailedPrecondition, match=r"versions \[2, 3\], not of 3"):
        generation(Service(lambda group: [mixed]), Weights()).generate([[1]], None, 1)


def test_a_rank_without_weights_waits_until_the_engine_has_the_synced_version_again() -> None:
    service = Service(lambda group: [rollout([1], service.versions[0])])
    made = generation(service)
    made._version = 3
    service.versions = [1]
    service.errors = [Unavailable(Reason.UNREACHABLE, "gone")]
    service.versions = [1, 1, 3]
    assert made.generate([[1]], None, 1)[1] == [[1]]
    assert len(service.calls) == 2, "it did not ask an engine that has other weights"

    service.versions = [1]
    made.server_timeout = 0.3
    with pytest.raises(FailedPrecondition, match="has not given it 3 again"):
        made.generate([[1]], None, 1)


def test_aborted_rollouts_are_sampled_again() -> None:
    answers = [rollout([4], finish_reason=pb.FINISH_REASON_ABORTED), rollout([5])]
    service = Service(lambda group: [answers.pop(0)])
    assert generation(service, Weights()).generate([[1]], None, 1)[1] == [[5]]


def test_a_full_queue_is_waited_for() -> None:
    service, weights = Service(), Weights()
    service.errors = [ResourceExhausted(Reason.QUEUE_FULL, "full", retry_after=0.01)]
    assert generation(service, weights).generate([[1]], None, 1)[1] == [[1]]
    assert weights.synced == 0


def test_what_trying_again_does_not_change_is_raised_at_once() -> None:
    service = Service()
    service.errors = [InvalidArgument(Reason.PROMPT_TOO_LONG, "too long")]
    with pytest.raises(InvalidArgument, match="too long"):
        generation(service, Weights()).generate([[1]], None, 1)
    assert len(service.calls) == 1


def test_the_memory_in_use_is_told_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation(Service())
    assert "tandem/gpu_memory_gib" not in made.drain_metrics()
    made.accelerator = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30 * device.index, 2**32))
    assert made.drain_metrics()["tandem/gpu_memory_gib"] == [3.0]
