"""What the demo asks the inference service: whether it is ready, and greedy answers to chats."""

from __future__ import annotations

import grpc

from examples.demo.tasks import MAX_TOKENS, Task
from tandem import rpc
from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import Unavailable
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub


class Service:
    """An inference service at an address."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = InferenceServiceStub(channel)  # type: ignore[no-untyped-call]

    def model(self) -> pb.GetModelResponse:
        """What is served."""
        with rpc.translated():
            answer: pb.GetModelResponse = self._stub.GetModel(pb.GetModelRequest(), timeout=5)
            return answer

    def ready(self) -> bool:
        """Whether tokens can be had."""
        try:
            return self.model().state == ServingState.SERVING_STATE_SERVING
        except Unavailable:
            return False

    def answers(self, tasks: list[Task]) -> list[str]:
        """What the model says to each task, its most probable token at each step."""
        request = pb.GenerateRequest(
            prompts=[_prompt(task) for task in tasks],
            sampling=pb.SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
            include_text=True,
            no_logprobs=True,
        )
        texts = [""] * len(tasks)
        with rpc.translated():
            for response in self._stub.Generate(request, timeout=120):
                for rollout in response.rollouts:
                    texts[rollout.prompt_index] = rollout.text
        return texts


def _prompt(task: Task) -> pb.Prompt:
    messages = [pb.ChatMessage(role=said["role"], content=said["content"]) for said in task.chat]
    return pb.Prompt(chat=pb.Chat(messages=messages))
