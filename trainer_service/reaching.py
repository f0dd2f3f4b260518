"""From addresses to what calls the services there, and to what brings them the policy: one service, or several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tandem.errors import invalid
from tandem.rpc.address import parse
from trainer_service.client import InferenceClient
from trainer_service.replicas import Replicas
from trainer_service.replicated import ReplicatedWeights
from trainer_service.weights import PolicyWeights

INFERENCE = "TANDEM_INFERENCE"
_LOOK_S = 0.2

#: `unix:///absolute/path` or `host:port`; or several, of services that are replicas of each other.
Addresses = str | Sequence[str]
Services = InferenceClient | Replicas
Weights = PolicyWeights | ReplicatedWeights


def connected(prefix: str, field: str, address: str | None, token: str | None) -> InferenceClient:
    """A client of a service. What is not given is in variables of the environment.

    Args:
        prefix: of the variables: {prefix}_ADDRESS, _TOKEN, and the files that a service on another host needs,
            _CA_FILE, _CERT_FILE and _KEY_FILE.
        field: what to call the address in errors.
        address: `unix:///absolute/path` or `host:port`.
        token: the service's.

    Raises:
        InvalidArgument: there is no address, or it is malformed.
    """
    address = address or os.environ.get(f"{prefix}_ADDRESS")
    if not address:
        raise invalid(field, f"give it, or set {prefix}_ADDRESS: unix:///path or host:port")
    parse(address, field=field)
    files: dict[str, Any] = {}
    for name in ("ca_file", "cert_file", "key_file"):
        if file := os.environ.get(f"{prefix}_{name.upper()}"):
            files[name] = file
    return InferenceClient(address, token=token or os.environ.get(f"{prefix}_TOKEN") or None, **files)


def reached(
    prefix: str, field: str, addresses: Addresses | None, token: str | None, mode: str = "server"
) -> Services:
    """As `connected`, where the address may be several, in the variable with commas between them.

    Raises:
        InvalidArgument: as `connected`; or several services, and `mode` is that the trainer's memory is the engine's.
    """
    given = addresses or os.environ.get(f"{prefix}_ADDRESS") or ""
    several = [one.strip() for one in given.split(",")] if isinstance(given, str) else list(given)
    if len(several) < 2:
        return connected(prefix, field, several[0] if several else None, token)
    if mode != "server":
        raise invalid("vllm_mode", f"several services take their weights with 'server', not with {mode!r}")
    clients = []
    try:
        for address in several:
            if not address:
                raise invalid(field, "one of several addresses is empty")
            clients.append(connected(prefix, field, address, token))
        return Replicas(clients)
    except BaseException:
        for client in clients:
            client.close()
        raise


def weights_of(services: Services, model: Callable[[], nn.Module], **options: Any) -> Weights:
    """What brings the policy to the services. From then on, rollouts are asked of those that hold it.

    options: of PolicyWeights. How updates go is in variables of the environment: TANDEM_INFERENCE_UPDATE_MODE is staged
        or in_place, and TANDEM_INFERENCE_SPARSE is 1 where those by stream or NCCL shall carry what changed alone.

    Raises:
        InvalidArgument: a variable or an option has another value, or one that several services cannot have.
    """
    options = _updates_asked_for() | options
    if isinstance(services, InferenceClient):
        return PolicyWeights(services, model, **options)
    weights = ReplicatedWeights(services.clients, model, **options)
    services.holding = lambda: weights.holding() if weights.weight_version else None
    return weights


def _updates_asked_for() -> dict[str, Any]:
    mode, sparse = f"{INFERENCE}_UPDATE_MODE", f"{INFERENCE}_SPARSE"
    if os.environ.get(sparse, "") not in ("", "0", "1"):
        raise invalid(sparse, f"is 0 or 1, not {os.environ[sparse]!r}")
    if os.environ.get(mode, "") not in ("", "staged", "in_place"):
        raise invalid(mode, f"is staged or in_place, not {os.environ[mode]!r}")
    return {"mode": os.environ.get(mode, ""), "sparse": os.environ.get(sparse) == "1"}


def restore(weights: Weights, patience_s: float) -> None:
    """Have the policy held again, where engines went away. The version stays what it was, if it can.

    patience_s: for how long one of several services is waited for before what it holds becomes a version of its own.
    """
    if isinstance(weights, ReplicatedWeights):
        end = time.monotonic() + patience_s
        while True:
            weights.catch_up()
            if weights.current:
                return
            if time.monotonic() > end:
                break
            time.sleep(_LOOK_S)
    weights.sync()
