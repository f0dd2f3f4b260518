"""For TRL's trainers whose teacher is a server: an inference service takes its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tandem.errors import invalid
from trainer_service.reaching import Addresses, Services, connected
from trainer_service.teacher import Teacher, check_scoring
from trainer_service.trainers.mixin import RemoteMixin

TEACHER = "TANDEM_TEACHER"


class TaughtMixin(RemoteMixin):
    """For ServerDistillation and IW-OPD, whose teacher has a service of its own."""

    teacher_client: Any

    def _start_taught(
        self,
        init: Callable[[], None],
        args: Any,
        address: Addresses | None,
        token: str | None,
        teacher_address: str | None,
        teacher_token: str | None,
    ) -> None:
        """`_start`, with the service at `teacher_address` for a teacher."""
        teacher_address = (
            teacher_address or os.environ.get(f"{TEACHER}_ADDRESS") or args.teacher_model_server_url
        )
        client = connected(TEACHER, "teacher_address", teacher_address, teacher_token)
        teacher = Teacher(client, timeout_s=args.vllm_server_timeout)

        def taught() -> None:
            init()
            self.teacher_client = teacher

        try:
            # Before a model is loaded.
            info = teacher.wait_until_serving()
            check_scoring(
                info, temperature=args.temperature, top_logprobs=args.loss_top_k, field="loss_top_k"
            )
            self._start(taught, args, address, token)
        except BaseException:
            teacher.close()
            raise

    def _attach(self, client: Services, args: Any, transports: Sequence[str]) -> None:
        teacher: Teacher | None = self.teacher_client
        if teacher is not None:
            if teacher.wait_until_serving().engine_id == client.get_model().engine_id:
                raise invalid("teacher_address", "is the policy's own engine, whose weights will be trained")
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            teacher.check_vocabulary(tokenizer, self.model.config.get_text_config().vocab_size)
        super()._attach(client, args, transports)

    def close(self) -> None:
        """As the others', and the teacher's client too."""
        super().close()
        if self.teacher_client is not None:
            self.teacher_client.close()
