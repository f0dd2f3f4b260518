"""The services that take one policy's weights together: who takes part, and who holds the last version."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tandem.errors import Aborted, InvalidArgument, Reason, TandemError, Unavailable, invalid
from trainer_service.client import InferenceClient
from trainer_service.member import Member, went_away
from trainer_service.pulse import ANSWER_S
from trainer_service.session import Session
from weight_transfer.manifest import Manifest

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # between two looks for the first service that answers
_BACK_S = 0.2  # for which an update waits to hear whether services are back that were gone


class Roster:
    """Members that are out are joined when they answer; nobody waits long for them."""

    def __init__(
        self, clients: Sequence[InferenceClient], opened: Callable[[InferenceClient], Session]
    ) -> None:
        """Prepare; nothing is called yet.

        Raises:
            InvalidArgument: no service, or one of them twice.
        """
        addresses = [client.address for client in clients]
        if not addresses or len(set(addresses)) < len(addresses):
            raise invalid(
                "inference_address", f"names each replica once, not {', '.join(addresses) or 'none'}"
            )
        self.members = [Member(client, opened) for client in clients]
        self.manifest: Manifest | None = None  # of all, once one was joined
        self._by_client = {member.client: member for member in self.members}
        self._current: frozenset[InferenceClient] = frozenset()
        self._noting = threading.Lock()
        self._pool = ThreadPoolExecutor(len(self.members), "tandem-replicas")

    @property
    def current(self) -> frozenset[InferenceClient]:
        """The services that hold the version that was noted last. May be asked from any thread."""
        return self._current

    def note(self, version: int) -> None:
        """This is the version that counts: `current` are those that hold it."""
        with self._noting:
            self._current = frozenset(m.client for m in self.members if m.holds == version and not m.lost)

    def drop(self, client: InferenceClient, reason: str) -> None:
        """Count on a service no more. From any thread."""
        self._by_client[client].drop(reason)  # first: what is noted then leaves it out
        with self._noting:
            self._current -= {client}

    def forget_the_lost(self) -> None:
        """Those that were dropped are out: they must be joined before they take part again."""
        for member in self.members:
            member.leave()
        with self._noting:
            self._current = frozenset(client for client in self._current if not self._by_client[client].out)

    def each(self, members: Sequence[Member], call: Callable[[Member], None]) -> None:
        """Call for all at once, to the end. Raises what one raised."""
        futures = [self._pool.submit(call, member) for member in members]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def assemble(self, timeout_s: float, deadline: float, *, patiently: bool) -> list[Member]:
        """All members that can take part, at least one; those that were out and answer are joined.

        Args:
            timeout_s: how long that may take in all, for the error.
            deadline: when it has.
            patiently: whether to wait for each as long as a service takes that lives.

        Raises:
            Unavailable: none answers. And what `joined` raises.
        """
        self.forget_the_lost()
        while True:
            here = any(not member.out for member in self.members)
            out = [member for member in self.members if member.out and not (here and member.resting)]
            for member in out:
                member.ask()
            until = time.monotonic() + (ANSWER_S if patiently or len(out) == len(self.members) else _BACK_S)
            for member in out:
                # One that did not know its session is there.
                if member.answers(ANSWER_S if member.restarted else until - time.monotonic()):
                    self.joined(member)
            if members := [member for member in self.members if not member.out]:
                return members
            if time.monotonic() > deadline:
                raise Unavailable(
                    Reason.UNREACHABLE,
                    f"No inference service answers after {timeout_s:.0f} s: "
                    + ", ".join(member.client.address for member in self.members),
                )
            time.sleep(_LOOK_S)

    def joined(self, member: Member) -> bool:
        """Whether a session could be had. That a service is loading, or still has our last lease, is no error.

        Raises:
            InvalidArgument: MANIFEST_MISMATCH, it serves another model than the others, or than the trainer has.
            TandemError: it refuses.
        """
        try:
            member.join()
        except TandemError as error:
            if isinstance(error, Aborted) or went_away(error):
                logger.info("the replica at %s stays out: %s", member.client.address, error)
                return False
            raise
        carried = member.session.carried
        if self.manifest is not None and self.manifest != carried:
            member.drop("it serves another model")
            member.leave()
            raise InvalidArgument(
                Reason.MANIFEST_MISMATCH,
                f"The replica at {member.client.address} serves another model than the others, or in other dtypes.",
            )
        self.manifest = carried
        return True

    def close(self) -> None:
        """Call nobody any more."""
        self._pool.shutdown()
        for member in self.members:
            member.close()
        self._current = frozenset()
