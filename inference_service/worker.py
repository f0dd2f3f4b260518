"""What Tandem adds to a vLLM worker: methods that the service calls by name through collective_rpc.

vLLM imports this module in each worker before it loads the model, which is what registers the loader.
Arguments and results are plain values, as vLLM's message passing wants them.
"""

from __future__ import annotations

import socket
from typing import Any

from inference_service import loader, orphans
from weight_transfer import descriptors

orphans.end_with_service()


class TandemWorker:
    """Mixed into vLLM's worker class: `self` is the worker. vLLM refuses clashes, so names have a prefix."""

    def _tandem_model(self) -> Any:
        return self.get_model()  # type: ignore[attr-defined]

    def tandem_export(self, path: str) -> dict[str, Any]:
        """Send the arenas' descriptors to the Unix socket at `path`, and answer with what lies where."""
        held: loader.HeldWeights = self._tandem_model().tandem
        rank: int = self.rank  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(path)
            connection.sendall(rank.to_bytes(4, "little"))
            descriptors.send(connection, [arena.fd for arena in held.arenas])
            connection.recv(1)  # the service has them
        return {
            "rank": rank,
            "arenas": [arena.size for arena in held.arenas],
            "reloaded": held.reloaded,
            "reason": held.reason,
            "placements": [
                [
                    p.spec.name,
                    p.spec.dtype,
                    p.spec.shape,
                    [
                        [b.arena, b.arena_offset, b.arena_strides, b.tensor_offset, b.tensor_strides, b.shape]
                        for b in p.blocks
                    ],
                ]
                for p in held.placements
            ],
        }

    def tandem_reload(self) -> None:
        """Have vLLM load again what could not be placed, from where an update left it."""
        model = self._tandem_model()
        model.tandem.reload(model)

    def tandem_restore(self) -> None:
        """Load the checkpoint again, in place."""
        model = self._tandem_model()
        held: loader.HeldWeights = model.tandem
        if held.loader is None:
            raise RuntimeError(held.reason)
        held.loader.restore(model, self.model_config)  # type: ignore[attr-defined]

    def tandem_addresses(self) -> dict[str, int]:
        """Address of every parameter in this process."""
        return {name: p.data_ptr() for name, p in self._tandem_model().named_parameters()}
