"""Several inference services of one policy as one: rollouts are spread over them, and survive the loss of a service."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import DeadlineExceeded, Reason, TandemError, Unavailable, invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.batches import Wanted
from trainer_service.client import READY, Group, InferenceClient
from trainer_service.prefixes import Prefixes
from trainer_service.sampling import sampling_params
from trainer_service.spreading import Replica, Spread, nobody

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LOOK_S = 0.4  # between two looks at the replicas' health
_ANSWER_S = 1.4  # within which a replica answers: a dead one is noticed in less than two seconds
#: Rollouts by which a replica may be ahead of the idlest, and still get a prompt whose prefix it has read.
_AHEAD = 8


class Replicas:
    """What a trainer calls in place of one InferenceClient. Safe to use from several threads; not across a fork.

    A prompt goes to the replica that has read most of it, unless another has clearly less to do. All rollouts have
    seeds, drawn here if none is given: one that is asked for again elsewhere is the same rollout, and engines that were
    started alike do not sample alike.
    """

    def __init__(self, clients: Sequence[InferenceClient]) -> None:
        """Take the clients over; nothing is called yet.

        Raises:
            InvalidArgument: there is none, or two have one address.
        """
        addresses = [client.address for client in clients]
        if not addresses or len(set(addresses)) < len(addresses):
            raise invalid(
                "addresses", f"one for each replica is needed, got {', '.join(addresses) or 'none'}"
            )
        self.clients = list(clients)
        self.address = ", ".join(addresses)
        #: Addresses of the replicas that hold the weights, by whoever brings them; None where that is not to say.
        self.holding: Callable[[], Collection[str] | None] = lambda: None
        self._replicas = [Replica(client, index) for index, client in enumerate(clients)]
        self._prefixes = Prefixes()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def alive(self) -> list[str]:
        """Addresses of the replicas that answer and serve, as far as is known."""
        return [replica.client.address for replica in self._replicas if replica.answers and replica.serves]

    def get_model(self, timeout_s: float | None = None) -> pb.GetModelResponse:
        """Ask what is served: of the replicas that answer, the one with the newest weights.

        Raises:
            Unavailable: none answers.
        """
        found, error = [], None
        for replica in self._replicas:
            try:
                found.append(replica.client.get_model(timeout_s))
            except (Unavailable, DeadlineExceeded) as raised:
                error = raised
        if not found and error is not None:
            raise error
        return max(found, key=lambda model: model.weight_version)

    def wait_until_serving(
        self, timeout_s: float, *, accept: Sequence[ServingState] = READY
    ) -> pb.GetModelResponse:
        """Wait until the state of any replica is one of `accept`; what the one with the newest weights serves.

        Its context is the shortest of all that are accepted, and it can sleep if all can. Raises as InferenceClient's.
        """
        end = time.monotonic() + timeout_s
        while True:
            left, found, why = end - time.monotonic(), [], []
            for replica in self._replicas:
                try:
                    model = replica.client.get_model(max(1.0, min(left, 5.0)))
                except (Unavailable, DeadlineExceeded) as error:
                    why.append(f"{replica.client.address}: {error.message}")
                    continue
                if model.state in accept:
                    found.append(model)
                else:
                    name = ServingState.Name(model.state).removeprefix("SERVING_STATE_")
                    why.append(f"{replica.client.address}: {' '.join((name, model.reason)).strip()}")
            if found:
                newest = max(found, key=lambda model: model.weight_version)
                newest.max_model_len = min(model.max_model_len for model in found)
                newest.sleep_mode = all(model.sleep_mode for model in found)
                return newest
            if left <= 0:
                message = f"No replica is serving after {timeout_s:.0f} s: {'; '.join(why)}"
                raise Unavailable(Reason.UNREACHABLE, message)
            time.sleep(min(0.2, left))

    def generate(
        self,
        batch: Sequence[Group | tuple[Sequence[int], int]],
        sampling: pb.SamplingParams | Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 3600.0,
        **wanted: Any,
    ) -> list[list[pb.Rollout]]:
        """Sample rollouts, as InferenceClient does. What a replica that is lost had not given is asked of the others.

        Where no version wait is given, a replica with too old weights is passed by.

        Raises:
            Unavailable: no replica is left; the last one's reason.
            TandemError: as InferenceClient; the rest of the batch is cancelled.
        """
        groups = [Group(*group) for group in batch]
        if not groups:
            return []
        params = sampling if isinstance(sampling, pb.SamplingParams) else sampling_params(sampling or {})
        seed = params.seed if params.HasField("seed") else secrets.randbits(62)
        seeds, before = [], 0
        for group in groups:
            seeds.append(seed + before if group.seed is None else group.seed)
            before += group.n
        self._begin_to_watch()
        want = Wanted(**({"version_wait_s": 0.0} | wanted))
        return Spread(self, groups, seeds, params, want, time.monotonic() + timeout_s).run()

    def score(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[pb.SequenceScore]:
        """Get the logprobs of sequences, as InferenceClient does, of one replica."""
        error: TandemError | None = None
        for replica in self.usable():
            try:
                return replica.client.score(sequences, **options)
            except Unavailable as raised:
                error = raised
        raise error or nobody()

    def tokenize(self, texts: Sequence[Any], timeout_s: float | None = None) -> list[list[int]]:
        """Get token ids, as InferenceClient does, of one replica, whatever weights it has."""
        error: TandemError | None = None
        for replica in sorted(self._replicas, key=lambda replica: not (replica.answers and replica.serves)):
            try:
                return replica.client.tokenize(texts, timeout_s)
            except Unavailable as raised:
                error = raised
        raise error or nobody()

    def sleep(self, timeout_s: float | None = None) -> int:
        """Have every engine that can be reached sleep. The bytes of the one that freed most on a device."""
        return max(self._each(lambda client: client.sleep(timeout_s)))

    def wake_up(self, timeout_s: float | None = None) -> None:
        """Have every engine that can be reached wake up."""
        self._each(lambda client: client.wake_up(timeout_s))

    def reset_prefix_cache(self, timeout_s: float | None = None) -> None:
        """Have every engine that can be reached forget the prefixes that it has cached."""
        self._each(lambda client: client.reset_prefix_cache(timeout_s))

    def close(self) -> None:
        """Close the channels. Calls that run are cancelled."""
        self._closed.set()
        for client in self.clients:
            client.close()
        if self._watch is not None:
            self._watch.join()

    def usable(self, without: Collection[Replica] = ()) -> list[Replica]:
        """The replicas that may be asked for rollouts. Where none is known to answer, all: one may be back."""
        holding = self.holding()
        held = [
            replica
            for replica in self._replicas
            if replica not in without and (holding is None or replica.client.address in holding)
        ]
        return [replica for replica in held if replica.answers and replica.serves] or held

    def choose(self, tokens: Sequence[int], count: int, among: Sequence[Replica]) -> Replica:
        """Who is to be asked for `count` rollouts of a prompt. They count as its load from now on."""
        with self._lock:
            shared = self._prefixes.shared(tokens)
            least = min(replica.load for replica in among)
            near = [replica for replica in among if replica.load <= least + max(_AHEAD, count)]
            best = max(near, key=lambda r: (shared.get(r.index, 0), -r.load, -r.index))
            if not shared.get(best.index):
                best = min(among, key=lambda r: (r.load, r.index))
            best.load += count
            self._prefixes.add(tokens, best.index)
            return best

    def given(self, replica: Replica, count: int) -> None:
        """Rollouts that are no load of the replica's any more."""
        with self._lock:
            replica.load -= count

    def _each(self, call: Callable[[InferenceClient], T]) -> list[T]:
        errors: list[TandemError] = []
        answers: list[T] = []
        for client in self.clients:
            try:
                answers.append(call(client))
            except (Unavailable, DeadlineExceeded) as error:
                errors.append(error)
        if len(errors) == len(self.clients):
            raise errors[0]
        return answers

    def _begin_to_watch(self) -> None:
        with self._lock:
            if self._watch is None:
                self._watch = threading.Thread(target=self._look, name="tandem-replicas", daemon=True)
                self._watch.start()

    def _look(self) -> None:
        """See who answers, again and again. Calls to one that does not end, if anybody else can do them."""
        while not self._closed.wait(_LOOK_S):
            try:
                asked = [(replica, replica.client.check_health(_ANSWER_S)) for replica in self._replicas]
            except ValueError:  # the channels were closed
                return
            for replica, future in asked:
                self._note(replica, *_said(future))
            for replica in self._replicas:
                if not replica.answers and any(r.answers and r.serves for r in self._replicas):
                    for part in list(replica.parts):
                        part.cancel()

    def _note(self, replica: Replica, answers: bool, serves: bool) -> None:
        before = replica.answers and replica.serves
        replica.answers, replica.serves = answers, serves
        if before != (answers and serves) and not self._closed.is_set():
            logger.warning(
                "replica %s %s",
                replica.client.address,
                "serves" if serves else "does not serve" if answers else "does not answer",
            )
        if not answers:
            with self._lock:
                self._prefixes.forget(replica.index)


def _said(future: grpc.Future[Any]) -> tuple[bool, bool]:
    """Whether it answers, and whether it serves."""
    try:
        status = future.result(_ANSWER_S + 0.5).status
    except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
        return False, False
    return True, status == health_pb2.HealthCheckResponse.SERVING
