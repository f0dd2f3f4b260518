"""Rollouts that an update finds running: no token is sampled from weights of two versions.

In float32, where a token of another version shows by itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tandem.engine.v1 import engine_pb2
from tandem.errors import Aborted, Reason, Unavailable
from tandem.inference.v1 import inference_pb2 as pb
from tests.faults import oracle, raw
from tests.faults.oracle import EXACT, OTHER, Rollouts
from tests.integration import calls
from tests.services import Service

#: Tokens of a block of the engine's prefix cache.
BLOCK = 128
KEEP, WAIT, ABORT = engine_pb2.PAUSE_MODE_KEEP, engine_pb2.PAUSE_MODE_WAIT, engine_pb2.PAUSE_MODE_ABORT


@pytest.fixture
def service(exact: Service) -> Iterator[Service]:
    yield exact
    for pid in exact.children():
        os.kill(pid, signal.SIGCONT)
    raw.restore(exact.weights)


@pytest.fixture
def old(checkpoints: dict[str, Path]) -> nn.Module:
    return oracle.model_of(checkpoints["llama"], torch.float32)


@pytest.fixture
def new(checkpoints: dict[str, Path]) -> nn.Module:
    model = oracle.model_of(checkpoints["llama"], torch.float32)
    oracle.perturb(model, 21)
    return model


def open_session(
    service: Service, model: nn.Module, transport: int
) -> tuple[raw.Session, dict[str, torch.Tensor]]:
    names = [spec.name for spec in raw.manifest(service.weights)]
    tensors = oracle.tensors_of(model, names)
    session = raw.Session(service.weights, tensors, transport)
    return (session.attach() if session.shared else session), tensors


def move(session: raw.Session, update: raw.Update, tensors: dict[str, torch.Tensor]) -> None:
    """Bring the bytes, and commit."""
    if session.shared:
        session.write(tensors)
    else:
        for chunk in session.chunks(tensors):
            update.send(chunk=chunk)
    session.version = update.commit(session.digest(tensors))


def paused(service: Service) -> bool:
    stats = service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=5)
    return stats.state == engine_pb2.SERVING_STATE_PAUSED


def thaw_once_asked_to_pause(service: Service, rollouts: Rollouts) -> None:
    """Let the engine move when what it will find first is the update's pause."""
    end = time.monotonic() + 20
    while not paused(service):
        assert time.monotonic() < end, "no update stopped generation"
    rollouts.thaw()


def running(
    service: Service, latest: int | None = None, on_commit: pb.OnCommit = pb.ON_COMMIT_UNSPECIFIED
) -> Rollouts:
    """Rollouts that are under way, and whose engine stands still, after `latest` tokens of each at most."""
    for _ in range(20):
        rollouts = Rollouts(service, stop=8, on_commit=on_commit)
        if rollouts.frozen(latest):
            return rollouts
        rollouts.join()
    raise AssertionError("this process is too slow to meet a rollout under way")


def begin_midway(service: Service, session: raw.Session, rollouts: Rollouts, **fields: int) -> raw.Update:
    """An in-place update that begins where the rollouts are stopped."""
    update = raw.Update(session.stub)
    update.send(begin=raw.pb.BeginUpdate(session_id=session.id, base_version=session.version, **fields))
    thaw_once_asked_to_pause(service, rollouts)
    update.expect("ready")
    return update


def update_midway(
    service: Service,
    session: raw.Session,
    rollouts: Rollouts,
    tensors: dict[str, torch.Tensor],
    **fields: int,
) -> None:
    """An update that comes where the rollouts are stopped."""
    if session.shared:
        with begin_midway(service, session, rollouts, **fields) as update:
            move(session, update, tensors)
        return
    with session.begin(**fields) as update:
        for chunk in session.chunks(tensors):
            update.send(chunk=chunk)
        update.send(commit=raw.pb.CommitUpdate(digest=session.digest(tensors)))
        thaw_once_asked_to_pause(service, rollouts)
        session.version = update.expect("committed").weight_version


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
def test_kept_rollouts_go_on_with_the_new_version(
    service: Service, old: nn.Module, new: nn.Module, transport: int
) -> None:
    session, tensors = open_session(service, new, transport)
    with session:
        version = session.version
        rollouts = running(service)
        update_midway(service, session, rollouts, tensors, in_flight=KEEP)
        rollouts.join()
    assert rollouts.error is None
    assert rollouts.finish == ["LENGTH"] * 3
    for i in range(3):
        counts = rollouts.by_version(i)
        assert set(counts) == {version, version + 1}, "the update did not come in the middle"
        assert counts[version] >= 8
    rollouts.assert_sampled_by({version: old, version + 1: new})
    tokens = oracle.PROMPTS[0] + rollouts.tokens[0]
    assert (logprobs_over(old, tokens) - logprobs_over(new, tokens)).abs().max() > OTHER


@torch.no_grad()
def logprobs_over(
    model: nn.Module, ids: list[int], cached: int = 0, by: nn.Module | None = None
) -> torch.Tensor:
    """Of each token after the first `cached` + 1, where `by` computed keys and values of the first `cached`."""
    past = None if by is None else by(torch.tensor([ids[:cached]]), use_cache=True).past_key_values
    logits = model(torch.tensor([ids[cached:]]), past_key_values=past).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[cached + 1 :])[:, None])[:, 0]


def test_no_token_is_computed_from_what_another_version_cached(
    service: Service, old: nn.Module, new: nn.Module
) -> None:
    """What goes on, and what comes after it with the same prefix."""
    for _ in range(5):
        session, tensors = open_session(service, new, raw.STREAM)
        with session:
            version = session.version
            rollouts = running(service, latest=70)
            update_midway(service, session, rollouts, tensors)
            rollouts.join()
        spans = [rollouts.by_version(i) for i in range(3)]
        firsts = [len(oracle.PROMPTS[i]) + spans[i][version] for i in range(3)]
        if max(firsts) < BLOCK:
            break
        raw.restore(service.weights)  # the update came so late that nobody can share what comes after it
    else:
        pytest.fail("no update came early enough")
    for i, prompt in enumerate(oracle.PROMPTS):
        counts, first = spans[i], firsts[i]
        assert set(counts) == {version, version + 1}, "the update did not come in the middle"
        ids = prompt + rollouts.tokens[i]
        expected = logprobs_over(new, ids)[first - 1 :]
        here = torch.tensor(rollouts.logprobs[i][counts[version] :])
        assert (here - expected).abs().max() < EXACT
        stale = logprobs_over(new, ids, first - 1, old)
        assert (stale - expected).abs().max() > 0.1, "what the old version cached would not be seen here"
        asked = calls.request(calls.ids(ids[:-40]), sampling={"temperature": 0, "max_tokens": 40})
        (after,) = calls.Reading(service, asked).end()
        assert after.num_cached_prompt_tokens > first, "it shares what the rollout computed anew"
        tokens = ids[:-40] + list(after.token_ids)
        expected = logprobs_over(new, tokens)[len(ids) - 41 :]
        assert (torch.tensor(after.logprobs) - expected).abs().max() < EXACT


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
def test_who_asks_for_it_goes_on_upon_what_is_cached_and_nobody_else(
    service: Service, old: nn.Module, new: nn.Module, transport: int
) -> None:
    session, tensors = open_session(service, new, transport)
    with session:
        version = session.version
        rollouts = running(service, on_commit=pb.ON_COMMIT_CONTINUE_CACHED)
        update_midway(service, session, rollouts, tensors)
        rollouts.join()
    assert rollouts.error is None
    for i, prompt in enumerate(oracle.PROMPTS):
        counts = rollouts.by_version(i)
        assert set(counts) == {version, version + 1}, "the update did not come in the middle"
        ids, first = prompt + rollouts.tokens[i], len(prompt) + counts[version]
        # The last token of the old version is read by the new one, as what it samples from.
        expected = logprobs_over(new, ids, first - 1, old)
        here = torch.tensor(rollouts.logprobs[i][counts[version] :])
        assert (here - expected).abs().max() < EXACT
        assert (logprobs_over(new, ids)[first - 1 :] - expected).abs().max() > 0.1
        asked = calls.request(calls.ids(ids[:-40]), sampling={"temperature": 0, "max_tokens": 40})
        for cached in (False, True):
            (after,) = calls.Reading(service, asked).end()
            tokens = ids[:-40] + list(after.token_ids)
            wanted = logprobs_over(new, tokens)[len(ids) - 41 :]
            assert (torch.tensor(after.logprobs) - wanted).abs().max() < EXACT
            assert bool(after.num_cached_prompt_tokens) is (cached and len(ids) - 40 > BLOCK)


def test_one_who_does_not_ask_for_it_has_all_read_anew(
    service: Service, old: nn.Module, new: nn.Module
) -> None:
    session, tensors = open_session(service, new, raw.STREAM)
    with session:
        version = session.version
        for _ in range(20):
            other = Rollouts(service, max_tokens=240)
            rollouts = Rollouts(service, stop=8, on_commit=pb.ON_COMMIT_CONTINUE_CACHED)
            if rollouts.frozen() and not any(other.finish):
                break
            rollouts.thaw()
            rollouts.join()
            other.join()
        update_midway(service, session, rollouts, tensors)
        for one in (rollouts, other):
            one.join()
    for i, prompt in enumerate(oracle.PROMPTS):
        for one in (rollouts, other):
            counts = one.by_version(i)
            assert set(counts) == {version, version + 1}, "the update did not come in the middle"
            first = len(prompt) + counts[version]
            expected = logprobs_over(new, prompt + one.tokens[i])[first - 1 :]
            here = torch.tensor(one.logprobs[i][counts[version] :])
            assert (here - expected).abs().max() < EXACT


def test_several_updates_within_one_rollout(
    service: Service, old: nn.Module, checkpoints: dict[str, Path]
) -> None:
    later = [oracle.model_of(checkpoints["llama"], torch.float32) for _ in range(2)]
    for seed, model in enumerate(later):
        oracle.perturb(model, 30 + seed)
    for _ in range(10):
        session, tensors = open_session(service, old, raw.SHARED)
        with session:
            session.update(tensors)
            models = {session.version: old}
            rollouts = running(service)
            for model in later:
                with begin_midway(service, session, rollouts) as update:
                    move(session, update, oracle.tensors_of(model, tensors))
                rollouts.stop_again(12)
                models[session.version] = model
                if not rollouts.frozen():
                    break
            rollouts.join()
        rollouts.assert_sampled_by(models)
        if all(len(rollouts.by_version(i)) == 3 for i in range(3)):
            return
    raise AssertionError("no rollout met two updates")


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
def test_awaited_rollouts_end_with_the_old_version(
    service: Service, old: nn.Module, new: nn.Module, transport: int
) -> None:
    session, tensors = open_session(service, new, transport)
    with session:
        version = session.version
        rollouts = running(service)
        update_midway(service, session, rollouts, tensors, in_flight=WAIT)
        rollouts.join()
    assert rollouts.finish == ["LENGTH"] * 3
    assert [rollouts.by_version(i) for i in range(3)] == [{version: 200}] * 3
    rollouts.assert_sampled_by({version: old})
    assert oracle.far_from(service, new, torch.float32) < EXACT


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
def test_aborted_rollouts_keep_what_they_have(
    service: Service, old: nn.Module, new: nn.Module, transport: int
) -> None:
    session, tensors = open_session(service, new, transport)
    with session:
        version = session.version
        rollouts = running(service)
        update_midway(service, session, rollouts, tensors, in_flight=ABORT)
        rollouts.join()
    assert rollouts.error is None
    assert rollouts.finish == ["ABORTED"] * 3
    for i in range(3):
        counts = rollouts.by_version(i)
        assert set(counts) == {version}
        assert 8 <= counts[version] < 200
    rollouts.assert_sampled_by({version: old})


def test_a_trainer_that_leaves_while_generation_is_brought_to_a_stop(
    service: Service, old: nn.Module
) -> None:
    """Nothing was written yet: everything goes on."""
    session, _ = open_session(service, old, raw.SHARED)
    with session:
        version = session.version
        rollouts = running(service)
        update = raw.Update(service.weights)
        update.send(begin=raw.pb.BeginUpdate(session_id=session.id, base_version=version, in_flight=WAIT))
        end = time.monotonic() + 20
        while not paused(service):
            assert time.monotonic() < end
        update.cancel()
        rollouts.join()
        assert [rollouts.by_version(i) for i in range(3)] == [{version: 200}] * 3
        assert raw.state(service.weights) == "COMMITTED"
        assert oracle.far_from(service, old, torch.float32) < EXACT
        with session.begin() as again:
            again.abort(untouched=True)


def test_rollouts_that_come_while_weights_are_written_wait_for_the_new_version(
    service: Service, new: nn.Module
) -> None:
    session, tensors = open_session(service, new, raw.SHARED)
    with session:
        with session.begin() as update:
            rollouts = Rollouts(service, max_tokens=8)
            assert service.health() == "SERVING", "they are taken"
            assert paused(service)
            service.engine.Resume(engine_pb2.ResumeRequest(), timeout=5)  # not theirs to resume
            move(session, update, tensors)
        rollouts.join()
        assert [rollouts.by_version(i) for i in range(3)] == [{session.version: 8}] * 3
        rollouts.assert_sampled_by({session.version: new})


def test_scores_are_of_one_version(service: Service, old: nn.Module, new: nn.Module) -> None:
    session, tensors = open_session(service, new, raw.SHARED)
    with session:
        stub, ids = service.inference, list(range(3, 250))
        request = oracle.pb.ScoreRequest(sequences=[oracle.pb.TokenIds(ids=ids)] * 8)
        calls = [stub.Score(request, timeout=60) for _ in range(4)]
        models = {session.version: old}
        with session.begin() as update:
            move(session, update, tensors)
        models[session.version] = new
        for call in calls:
            for response in call:
                for score in response.scores:
                    expected = logprobs_over(models[score.weight_version], ids)
                    assert (torch.tensor(score.logprobs) - expected).abs().max() < EXACT


def test_rollouts_end_with_an_error_when_the_weights_tear(service: Service, old: nn.Module) -> None:
    session, tensors = open_session(service, old, raw.SHARED)
    with session:
        rollouts = running(service)
        with begin_midway(service, session, rollouts) as update:
            session.view("model.norm.weight").fill_(0)
            with pytest.raises(Unavailable) as caught:
                update.abort(untouched=False, reason="an exception in the trainer")
        assert caught.value.reason == Reason.ENGINE_TORN
        rollouts.join()
        assert rollouts.error is not None
        assert rollouts.error.reason == Reason.ENGINE_TORN
        assert "an exception in the trainer" in rollouts.error.message
        rollouts.assert_sampled_by({session.version: old})
        session.update(tensors)


def test_a_client_that_paused_keeps_its_pause_over_an_update(service: Service, new: nn.Module) -> None:
    session, tensors = open_session(service, new, raw.SHARED)
    engine = service.engine
    with session:
        engine.Pause(engine_pb2.PauseRequest(), timeout=5)
        with pytest.raises(Aborted) as caught:  # it would end or run on what the client froze
            session.begin(in_flight=ABORT)
        assert caught.value.reason == Reason.LEASE_HELD
        assert raw.state(service.weights) == "COMMITTED"
        session.update(tensors)
        rollouts = Rollouts(service, max_tokens=4)
        assert paused(service)
        assert rollouts.tokens == [[], [], []]
        engine.Resume(engine_pb2.ResumeRequest(), timeout=5)
        rollouts.join()
        rollouts.assert_sampled_by({session.version: new})
