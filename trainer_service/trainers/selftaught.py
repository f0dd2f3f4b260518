"""For TRL's trainers in which the policy teaches itself, at a prompt that tells it more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from tandem.errors import invalid
from trainer_service.reaching import Addresses, Services
from trainer_service.teacher import Teacher, check_scoring
from trainer_service.trainers.mixin import MeteredMixin, RemoteMixin


class SelfTaughtMixin(MeteredMixin):
    """For SDFT and SDPO, which ask `vllm_generation` in `_generate` and, with `use_teacher_server`, the engine for the
    logprobs of the policy as it is now."""

    _off: ClassVar[dict[str, Any]] = {**RemoteMixin._off, "use_teacher_server": False}
    _relied_on: ClassVar[tuple[str, ...]] = (
        "_metrics",
        "_generate",
        "_prepare_training_batch",
        "_last_loaded_step",
        "use_teacher_server",
        "teacher_client",
    )

    use_teacher_server: bool
    teacher_client: Any

    def _start(self, init: Any, args: Any, address: Addresses | None, token: str | None) -> None:
        if args.use_teacher_server:
            _check_live(args)
        super()._start(init, args, address, token)

    def _attach(self, client: Services, args: Any, transports: Sequence[str]) -> None:
        super()._attach(client, args, transports)
        if not args.use_teacher_server:
            return
        generation = self.vllm_generation
        top = args.distillation_topk if args.distillation_mode == "topk_logits" else 1
        check_scoring(
            client.get_model(), temperature=args.temperature, top_logprobs=top, field="distillation_topk"
        )
        self.use_teacher_server = True
        self.teacher_client = Teacher(
            client, recover=generation.recover, version=lambda: cast(int, generation.weight_version)
        )

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._generating():
            return cast(Any, super())._generate(*args, **kwargs)

    def _prepare_training_batch(self, *args: Any, **kwargs: Any) -> Any:
        batch = cast(Any, super())._prepare_training_batch(*args, **kwargs)
        # TRL has gathered figures of all ranks by now: none generates any more.
        self.vllm_generation.rest()
        return batch


def _check_live(args: Any) -> None:
    """TRL's own checks of `use_teacher_server`, which is off while TRL starts."""
    if args.teacher_model_kind != "live":
        raise invalid(
            "teacher_model_kind", "with use_teacher_server it must be 'live': the engine has no other"
        )
    if getattr(args, "distillation_weight", 1.0) != 1.0:
        raise invalid("distillation_weight", "with use_teacher_server it must be 1: there are no full logits")
    if args.distillation_mode not in ("sampled_token", "topk_logits"):
        raise invalid(
            "distillation_mode", "with use_teacher_server it must be 'sampled_token' or 'topk_logits'"
        )
    if args.distillation_mode == "topk_logits" and args.distillation_topk is None:
        raise invalid("distillation_topk", "distillation_mode='topk_logits' needs it")
    if args.vllm_enable_sleep_mode:
        raise invalid(
            "vllm_enable_sleep_mode", "not with use_teacher_server: the engine scores after it generated"
        )
