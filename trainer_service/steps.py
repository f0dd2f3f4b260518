"""Optimizers' steps as updates: the ones that write engine memory take the lease by themselves."""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any, Protocol

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Updates(Protocol):
    """Whose updates the steps are."""

    @property
    def parameters(self) -> dict[int, Parameter]:
        """Those that are engine memory, by `id`."""

    def enter(self) -> None: ...

    def leave(self, *, same_parameters: bool = False) -> None: ...

    def abandon(self, reason: str) -> None: ...


class Steps:
    """Goes around every step of every optimizer, since trainers and accelerate create, wrap and replace them as
    they like."""

    def __init__(self, updates: Updates) -> None:
        self._updates = weakref.ref(updates)
        self._step: FrameType | None = None  # the one that holds the lease
        self._thread = 0  # and in which thread that runs
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """From now on."""
        self._hooks = self._hooks or [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def forget(self) -> None:
        """The update of the step that runs was given up."""
        self._step = None

    def drop_failed(self) -> None:
        """Give up the update of a step that raised, where whoever called it went on."""
        if self._step is None or self._thread != threading.get_ident():
            return  # of another thread's nothing can be told
        if not _running(self._step) and (updates := self._updates()) is not None:
            updates.abandon("the optimizer's last step raised")

    def remove(self) -> None:
        """Until `watch` is called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        updates = self._updates()
        if updates is None or not _writes(optimizer, updates.parameters):
            return
        self.drop_failed()
        if not self._step:  # else a step that calls the step of its base class
            updates.enter()
            self._step, self._thread = sys._getframe(1), threading.get_ident()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (updates := self._updates()) is not None and self._step is sys._getframe(1):
            self._step = None
            updates.leave(same_parameters=True)


def _writes(optimizer: Optimizer, parameters: dict[int, Parameter]) -> bool:
    return bool(parameters) and any(
        id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]
    )


def _running(frame: FrameType) -> bool:
    """Whether we were called, at whatever depth, from `frame`."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is frame
