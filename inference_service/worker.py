"""What Tandem adds to a vLLM worker: methods that the service calls by name through collective_rpc.

vLLM imports this module in each worker before it loads the model, which is what registers the loader.
Arguments and results are plain values, as vLLM's message passing wants them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from inference_service import loader, orphans, passing
from inference_service.staging import taken, tensors_in, unstage
from weight_transfer.cuda import nccl
from weight_transfer.digest import combine
from weight_transfer.manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    from inference_service.worker_adapters import WorkerAdapters

orphans.end_with_service()


class TandemWorker:
    """Mixed into vLLM's worker class: `self` is the worker. vLLM refuses clashes, so names have a prefix."""

    def _tandem_model(self) -> Any:
        return self.get_model()  # type: ignore[attr-defined]

    def tandem_export(self, path: str) -> dict[str, Any]:
        """Send the arenas' descriptors to the Unix socket at `path`, and answer with what lies where."""
        held: loader.HeldWeights = self._tandem_model().tandem
        rank: int = self.rank  # type: ignore[attr-defined]
        passing.give(path, rank, [arena.fd for arena in held.arenas])
        return {
            "rank": rank,
            "gpu": held.gpu,
            "arenas": [arena.size for arena in held.arenas],
            "reloads": held.reloads,
            "reason": held.reason,
            "nccl": nccl.version() if held.gpu else 0,
            "free": torch.cuda.mem_get_info()[0] if held.gpu else 0,
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
        """Have vLLM make again what it computes with in another form, of what an update left."""
        model = self._tandem_model()
        model.tandem.reload(model, self.vllm_config)  # type: ignore[attr-defined]

    def tandem_restore(self) -> None:
        """Load the checkpoint again, in place."""
        model = self._tandem_model()
        held: loader.HeldWeights = model.tandem
        if held.loader is None:
            raise RuntimeError(held.reason)
        held.loader.restore(model, self.vllm_config)  # type: ignore[attr-defined]

    def tandem_digest(self) -> int:
        """Digest of the whole policy, in the order of its tensors' names. For a worker that holds all of it."""
        held: loader.HeldWeights = self._tandem_model().tandem
        return combine(held.reading.digests())

    def tandem_sums(self) -> dict[str, Any]:
        """The digest sums of what this worker holds: of each block in the order of `tandem_export`'s placements."""
        held: loader.HeldWeights = self._tandem_model().tandem
        return {"rank": self.rank, "sums": held.sums.sums()}  # type: ignore[attr-defined]

    def tandem_write(self, path: str, size: int, offsets: dict[str, int]) -> None:
        """Write what the service staged in the memory that it offers at `path`, where each tensor has its offset."""
        held: loader.HeldWeights = self._tandem_model().tandem
        unstage(taken(path, size), offsets, held.placements, held.arenas)
        self.tandem_settle()

    def tandem_link(
        self, path: str, ranks: int = 2, specs: list[tuple[str, str, list[int]]] | None = None
    ) -> None:
        """Begin the thread that receives by NCCL, and have it connect to the service's socket at `path`.

        Args:
            ranks: of the communicators that it will join: a trainer's, and those of all workers.
            specs: what comes, where each worker has parts of that alone.
        """
        from inference_service.receiving import Crew
        from inference_service.worker_link import WorkerLink

        rank: int = self.rank  # type: ignore[attr-defined]
        manifest = Manifest(tuple(TensorSpec(n, d, tuple(s)) for n, d, s in specs)) if specs else None
        before: WorkerLink | None = self.__dict__.get("_tandem_line")
        crew = Crew(rank + 1, ranks, manifest)
        self.__dict__["_tandem_line"] = WorkerLink(self._tandem_model().tandem, path, before, crew)

    def tandem_adapter_missing(self, modules: list[str]) -> list[str]:
        """Those of `modules` that cannot be adapted here."""
        return self._tandem_adapters().missing(modules)

    def tandem_adapter_prepare(
        self, number: int, path: str, size: int, specs: list[tuple[str, str, list[int]]]
    ) -> None:
        """Take an adapter's weights, which the service staged, and change nothing yet."""
        manifest = Manifest(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in specs))
        tensors = zip(manifest, tensors_in(taken(path, size), manifest), strict=True)
        self._tandem_adapters().prepare(number, {spec.name: tensor.clone() for spec, tensor in tensors})

    def tandem_adapter_swap(self, name: str, number: int, path: str) -> None:
        """Have the adapter be what was prepared, or what it was."""
        from vllm.lora.request import LoRARequest

        self._tandem_adapters().swap(LoRARequest(name, number, path))
        self.tandem_settle()

    def tandem_adapter_revert(self) -> None:
        """Undo `tandem_adapter_prepare` and, where it was done here, `tandem_adapter_swap`."""
        self._tandem_adapters().revert()
        self.tandem_settle()

    def tandem_adapter_forget(self, number: int) -> None:
        """Let go of an adapter."""
        self._tandem_adapters().forget(number)

    def _tandem_adapters(self) -> WorkerAdapters:
        found: WorkerAdapters | None = self.__dict__.get("_tandem_held_adapters")
        if found is None:
            from inference_service.worker_adapters import WorkerAdapters

            found = WorkerAdapters(self.model_runner.lora_manager)  # type: ignore[attr-defined]
            self.__dict__["_tandem_held_adapters"] = found
        return found

    def tandem_sleep(self) -> int:
        """Free the KV cache, and what is kept of work that is over. Answers with the bytes."""
        before = torch.cuda.mem_get_info()[0]
        self._tandem_model().tandem.asleep = True
        self.sleep(1)  # type: ignore[attr-defined]
        return max(0, torch.cuda.mem_get_info()[0] - before)  # others may have taken some

    def tandem_wake_up(self) -> None:
        """Rebuild what `tandem_sleep` freed, and make of the weights what could not be made meanwhile."""
        model = self._tandem_model()
        if model.tandem.asleep:
            self.wake_up()  # type: ignore[attr-defined]
        model.tandem.wake(model, self.vllm_config)  # type: ignore[attr-defined]

    def tandem_settle(self) -> None:
        """Wait for every kernel of this process."""
        if self.device.type == "cuda":  # type: ignore[attr-defined]
            torch.cuda.synchronize()

    def tandem_addresses(self) -> dict[str, int]:
        """Address of every parameter in this process."""
        return {name: p.data_ptr() for name, p in self._tandem_model().named_parameters()}
