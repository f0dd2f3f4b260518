"""For TRL's trainers that generate turn by turn through VLLMGeneration."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from trainer_service.trainers.mixin import MeteredMixin, replaced


class TurnMixin(MeteredMixin):
    """For trainers whose `_generate_single_turn` asks `vllm_generation`: GRPO, RLOO, Distillation and their kin."""

    _relied_on: ClassVar[tuple[str, ...]] = (
        "_metrics",
        "_generate_single_turn",
        "_generate_and_score_completions",
    )

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._generating():
            return cast(Any, super())._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        result = cast(Any, super())._generate_and_score_completions(*args, **kwargs)
        # TRL has gathered figures of all ranks by now: none generates any more.
        self.vllm_generation.rest()
        return result


class ToolTurnMixin(TurnMixin):
    """TurnMixin for trainers whose rollouts may call tools."""

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL asks a colocated engine, and only that, for its true length limit. Ours always tells it.
        with replaced(self, {"vllm_mode": "colocate"}):
            return cast(Any, super())._tool_call_loop(*args, **kwargs)
