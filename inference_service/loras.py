"""LoRA adapters in the engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inference_service.folders import Folder
from inference_service.refusals import one_line
from tandem.errors import FailedPrecondition, NotFound, Reason, invalid

Shapes = Mapping[str, tuple[int, ...]]

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Adapter:
    """One that rollouts can ask for. `request` is vLLM's name for it."""

    request: Any
    users: int = 0
    retired: bool = False
    trained: bool = False  # by a session's updates: it has no folder
    digest: int | None = None  # of the last of those


class Loras:
    """The adapters that rollouts can ask for by name.

    Each is kept as a copy: vLLM reads an adapter's folder again whenever it made room for another meanwhile, and dies
    if it is not there any more. The copy's path, which is never used twice, also keeps the prefixes apart that were
    cached with different weights under one name. What runs with an adapter that is replaced or unloaded ends with it.

    Those of trainers are replaced in place: what runs with one goes on with its new weights, and prefixes are forgotten
    with each update.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._adapters: dict[str, Adapter] = {}
        self._trained: dict[str, Adapter] = {}
        self._ids = itertools.count(1)
        self._folder = Folder("loras")

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, sorted."""
        return sorted(self._adapters)

    def get(self, name: str) -> Adapter:
        """A loaded adapter.

        Raises:
            FailedPrecondition: LORA_OFF. NotFound: LORA_NOT_FOUND.
        """
        self._check_on()
        if name not in self._adapters:
            raise NotFound(Reason.LORA_NOT_FOUND, f"no adapter {name!r} is loaded", metadata={"lora": name})
        return self._adapters[name]

    def limits(self) -> tuple[str, int]:
        """The dtype in which the engine has adapters, and the highest rank.

        Raises:
            FailedPrecondition: LORA_OFF.
        """
        self._check_on()
        config = self._llm.vllm_config.lora_config
        return str(config.lora_dtype).removeprefix("torch."), int(config.max_lora_rank)

    def trained(self, name: str) -> Adapter:
        """A trainer's adapter of that name, always the same. Rollouts can ask for it once it was `put`."""
        from vllm.lora.request import LoRARequest

        if name not in self._trained:
            number = next(self._ids)
            request = LoRARequest(name, number, str(self._folder.path / str(number)))
            self._trained[name] = Adapter(request, trained=True)
        return self._trained[name]

    def put(self, name: str, adapter: Adapter) -> None:
        """Let rollouts ask for what the engine has under that name now."""
        old, self._adapters[name] = self._adapters.get(name), adapter
        adapter.retired = False
        if old is not None and old is not adapter:
            self._retire(old)

    def drop(self, name: str) -> None:
        """Let no rollout ask for it any more."""
        self._adapters.pop(name, None)

    @contextlib.asynccontextmanager
    async def copied(self, name: str, path: str, policy: Shapes | None = None) -> AsyncIterator[Adapter]:
        """A copy of the adapter in the folder `path`, to `load`. It is removed if the block fails.

        Args:
            policy: the policy's tensors, if known. vLLM takes whatever an adapter has for others, or of other shapes.

        Raises:
            FailedPrecondition: LORA_OFF. InvalidArgument: there is no adapter, or not one that fits.
        """
        from vllm.lora.request import LoRARequest

        self._check_on()
        if name in self._adapters and self._adapters[name].trained:
            raise invalid("name", f"{name!r} is a trainer's adapter: unload it first, or choose another name")
        number = next(self._ids)
        adapter = Adapter(LoRARequest(name, number, str(self._folder.path / str(number))))
        try:
            await asyncio.to_thread(_copy, path, adapter.request.lora_path, policy or {})
            yield adapter
        except BaseException:
            self._retire(adapter)
            raise

    async def load(self, name: str, adapter: Adapter) -> None:
        """Load a copied adapter, in place of any of that name.

        Raises:
            InvalidArgument: vLLM cannot use it.
        """
        try:
            await self._llm.add_lora(adapter.request)
        except Exception as error:  # utility calls lose the type on their way
            if self._llm.errored:
                raise
            raise invalid("path", one_line(error)) from error
        self.put(name, adapter)

    async def unload(self, name: str) -> None:
        """Forget an adapter. Raises as `get` does."""
        adapter = self.get(name)
        del self._adapters[name]
        self._retire(adapter)
        if adapter.users:
            return
        if adapter.trained:
            await self._llm.collective_rpc("tandem_adapter_forget", args=(adapter.request.lora_int_id,))
        else:
            await self._llm.remove_lora(adapter.request.lora_int_id)

    @contextlib.contextmanager
    def using(self, adapter: Adapter) -> Iterator[None]:
        """Keep an adapter while a rollout runs with it."""
        adapter.users += 1
        try:
            yield
        finally:
            adapter.users -= 1
            if adapter.retired:
                self._retire(adapter)

    def close(self) -> None:
        """Remove the copies."""
        self._folder.remove()

    def _check_on(self) -> None:
        if self._llm.vllm_config.lora_config is None:
            raise FailedPrecondition(Reason.LORA_OFF, "start the engine with enable_lora to use adapters")

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired = True
        if not adapter.users:  # vLLM itself forgets it in favour of newer ones
            shutil.rmtree(adapter.request.lora_path, ignore_errors=True)


def _copy(path: str, to: str, policy: Shapes) -> None:
    """Copy an adapter and check it."""
    from safetensors import SafetensorError, safe_open

    for name in _FILES:
        if not os.path.isfile(os.path.join(path, name)):
            raise invalid("path", f"no {name} in {path!r}")
    os.makedirs(to, mode=0o700)
    for name in _FILES:
        shutil.copyfile(os.path.join(path, name), os.path.join(to, name))
    try:
        with safe_open(os.path.join(to, _FILES[1]), "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise invalid("path", f"{_FILES[1]} cannot be read: {one_line(error)}") from error
    for name, shape in shapes.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if why := why_not_adapted(module, name, shape, policy, part):
            raise invalid("path", why)


def why_not_adapted(module: str, name: str, shape: tuple[int, ...], policy: Shapes, part: str) -> str:
    """What keeps the engine from using an adapter's tensor.

    Args:
        module: that it adapts.
        name: of the tensor.
        shape: of the tensor.
        policy: shapes of the policy's tensors, if known.
        part: A.weight or B.weight.
    """
    if module.endswith(("lm_head", "embed_tokens")):
        # Score would leave it out: vLLM gives a prompt's logprobs without an adapter's share in the logits.
        return f"the adapter changes {module}, which is not supported"
    if not policy:
        return ""
    if (weight := policy.get(f"{module}.weight")) is None:
        return f"the adapter changes {module}, which the policy does not have"
    fits = {"A.weight": shape[1:] == weight[1:], "B.weight": shape[:1] == weight[:1]}.get(part, True)
    return "" if fits else f"{name} has shape {list(shape)}, but {module}.weight {list(weight)}"
