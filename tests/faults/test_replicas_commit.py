"""One trainer and three services of the same model, real processes: all commit a version, or none does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from inference_service.sessions import MAX_STREAM_SESSIONS
from tandem.errors import DataLoss, InvalidArgument, Reason
from tests.faults import raw
from tests.fleets import (
    COUNT,
    LEASE_S,
    VICTIM,
    Fleet,
    Replicated,
    change,
    sync_until_all,
)
from tests.policies import digest_of
from tests.weight_service import WeightService, network
from trainer_service.client import InferenceClient
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights


def test_every_replica_holds_the_same_bits(fleet: Fleet, replicated: Replicated) -> None:
    model = network()
    weights = replicated(model)
    for version in (2, 3):
        change(model)
        weights.sync()
        assert weights.holding() == set(fleet.addresses)
        assert fleet.states() == [("COMMITTED", version, digest_of(model))] * COUNT
        assert weights.weight_version == version
    assert weights.history[-1].stopped > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_replica_that_refuses_keeps_the_old_version_everywhere(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    model = network()
    weights = replicated(model, sparse=sparse)
    weights.sync()
    before = fleet.states()
    prepare = Member.prepare

    def refused(member: Member, digest: int) -> None:
        prepare(member, digest ^ (member.client.address == fleet.addresses[VICTIM]))

    change(model)
    with monkeypatch.context() as patched:
        patched.setattr(Member, "prepare", refused)
        with pytest.raises(DataLoss) as caught:
            weights.sync()
    assert caught.value.reason == Reason.DIGEST_MISMATCH
    assert fleet.states() == before
    assert weights.holding() == set(fleet.addresses), "all have what was committed last"
    weights.sync()
    assert weights.history[-1].changed is None
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


def test_a_tensor_that_is_not_there_any_more_is_named_and_nothing_changes(
    fleet: Fleet, replicated: Replicated
) -> None:
    model = network()
    weights = replicated(model)
    weights.sync()
    before, kept = fleet.states(), model[1]
    model[1] = nn.Identity()
    with pytest.raises(InvalidArgument, match=r"1\.weight: missing"):
        weights.sync()
    assert fleet.states() == before
    model[1] = kept
    change(model)
    weights.sync()
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


def test_changes_alone_go_to_all_and_everything_once_one_is_new(fleet: Fleet, replicated: Replicated) -> None:
    model = network()
    weights = replicated(model, sparse=True)
    weights.sync()
    for _ in range(2):
        with torch.no_grad():
            model[0].weight[0, 0] += 1
        weights.sync()
        assert (weights.history[-1].changed, weights.holding()) == (1, set(fleet.addresses))
    victim = fleet.services[VICTIM]
    victim.kill()
    victim.start()
    fleet.engines[VICTIM].wait_until_serving(60)
    sync_until_all(fleet, weights)
    assert weights.history[-1].changed is None
    change(model)
    weights.sync()
    assert weights.history[-1].changed == sum(p.numel() for p in model.parameters())
    assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT


def test_one_that_does_not_know_its_session_any_more_is_given_all_at_once(
    fleet: Fleet, replicated: Replicated
) -> None:
    """As one does that was started again since the last update."""
    model = network()
    weights = replicated(model, sparse=True)
    weights.sync()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for _ in range(MAX_STREAM_SESSIONS):
        raw.Session(fleet.engines[VICTIM].weights, tensors, raw.STREAM)
    change(model)
    weights.sync()
    assert weights.holding() == set(fleet.addresses)
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


def test_replicas_that_share_memory_or_are_one(fleet: Fleet) -> None:
    client = InferenceClient(fleet.addresses[0])
    with pytest.raises(InvalidArgument, match="the memory of one engine alone"):
        ReplicatedWeights([client], network, transport="shared")
    with pytest.raises(InvalidArgument, match="are staged, not in_place"):
        ReplicatedWeights([client], network, mode="in_place")
    for clients in ([], [client, client]):
        with pytest.raises(InvalidArgument, match="each replica once"):
            ReplicatedWeights(clients, network)
    client.close()


def other_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=False))


def test_a_replica_of_another_model_is_named(fleet: Fleet, replicated: Replicated, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        stranger = WeightService(f"unix://{folder}/s", LEASE_S, other_network)
        stranger.start()
        clients = [InferenceClient(fleet.addresses[0]), InferenceClient(stranger.address)]
        clients[1].wait_until_serving(60)
        weights = ReplicatedWeights(clients, network, timeout_s=10.0)
        with pytest.raises(InvalidArgument) as caught:
            weights.sync()
        assert caught.value.reason == Reason.MANIFEST_MISMATCH
        weights.detach()
        stranger.kill()
