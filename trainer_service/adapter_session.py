"""A session whose updates carry a LoRA adapter alone."""

from __future__ import annotations

from tandem.errors import NotFound
from tandem.weights.v1 import weights_pb2 as pb
from trainer_service.client import InferenceClient
from trainer_service.session import ANSWER_TIMEOUT_S, Calling, PolicyOf, Session, manifest_of, specs_of
from weight_transfer.manifest import Manifest
from weight_transfer.transports import SourceTensor
from weight_transfer.transports.base import digest_of


class AdapterSession(Session):
    """The adapter of one trainer, accepted by an engine that has the weights under it."""

    def __init__(
        self,
        client: InferenceClient,
        adapter_of: PolicyOf,
        base_of: PolicyOf,
        *,
        name: str,
        calling: Calling | None = None,
    ) -> None:
        """Introduce the adapter, and the weights that it is for, of which every byte is read.

        Args:
            client: the service.
            adapter_of: gives the adapter's tensors.
            base_of: gives the tensors under it, for the names that the engine's manifest has.
            name: what rollouts shall call it.
            calling: as Session's.

        Raises:
            InvalidArgument: the engine has no place for the adapter, or other weights; each tensor at fault is named.
            FailedPrecondition: LORA_OFF, or what `Session` says.
            Aborted: another trainer has the engine.
        """
        self._adapter = name
        self._base_of = base_of
        super().__init__(client, adapter_of, transport="stream", timeout_s=ANSWER_TIMEOUT_S, calling=calling)
        del self._base_of  # it is its owner's, who ends this session when nobody needs it any more

    def _request(self, manifest: Manifest, policy: list[SourceTensor]) -> pb.OpenSessionRequest:
        base = self._base_of(self.names)
        request = super()._request(manifest, base)
        request.adapter.name = self._adapter
        request.adapter.tensors.extend(specs_of(policy))
        same_names = {source.name for source in base} == set(self.names)
        # Of other tensors there is no digest: the service names them.
        request.adapter.base_digest = digest_of(manifest, base) if same_names else 0
        return request

    def _carried(self, manifest: Manifest, opened: pb.OpenSessionResponse) -> Manifest:
        return manifest_of(opened.adapter)

    def holds(self, number: int, digest: int) -> bool:
        try:
            return super().holds(number, digest)
        except NotFound:  # unloaded, or never committed
            return False
