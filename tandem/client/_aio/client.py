"""The client of both services."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self

from tandem.client._aio.calls import Calls
from tandem.client._aio.job import AsyncJob
from tandem.client.requests import Prompt, generate_request
from tandem.client.specs import Spec, job_spec
from tandem.client.values import JobState, Rollout, rollout_of, wire_state
from tandem.errors import Internal, Reason
from tandem.inference.v1 import inference_pb2
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.trainer.v1.trainer_pb2_grpc import TrainingJobServiceStub


class AsyncTandemClient:
    """Submits and follows jobs, and generates. It needs the service that is called, and no other.

    `async with AsyncTandemClient() as client:` closes it; so does `close`.
    """

    def __init__(
        self,
        trainer: str | None = None,
        inference: str | None = None,
        token: str | None = None,
        *,
        timeout_s: float = 60.0,
        patience_s: float = 60.0,
        **channel: Any,
    ) -> None:
        """Nothing is called yet.

        Args:
            trainer: the trainer service's address, `unix:///absolute/path` or `host:port`. By default
                TANDEM_TRAINER_ADDRESS, or else the socket that `tandem trainer` of the same user serves at.
            inference: the inference service's, by default TANDEM_INFERENCE_ADDRESS or its socket.
            token: the token of both.
            timeout_s: deadline in seconds of each call that takes none of its own.
            patience_s: seconds that a watch waits for a service that went away.
            channel: further arguments of `tandem.rpc.connect_aio`, such as `ca_file`.
        """
        options = {"token": token, **channel}
        self._trainer = Calls(TrainingJobServiceStub, "trainer", trainer, options)
        self._inference = Calls(InferenceServiceStub, "inference", inference, options)
        self._timeout_s, self._patience_s = timeout_s, patience_s

    async def submit(self, spec: Spec, *, request_id: str | None = None) -> AsyncJob:
        """Submit a job. Returns at once: `job.result()` waits, `job.watch()` follows.

        Args:
            spec: a job file's path, its table, or a JobSpec.
            request_id: names the submission: repeated with the same job, it gives the job that it made. One is
                made up, so that a call whose answer was lost does not make two jobs.

        Raises:
            InvalidArgument: names each field that is wrong; nothing was submitted.
        """
        request = pb.CreateJobRequest(request_id=request_id or str(uuid.uuid4()), job=job_spec(spec))
        return self._job((await self._trainer.one("CreateJob", request, self._timeout_s, repeat=True)).job)

    async def check(self, spec: Spec) -> None:
        """Have a job checked and not submitted. Arguments and errors are those of `submit`."""
        request = pb.CreateJobRequest(job=job_spec(spec), validate_only=True)
        await self._trainer.one("CreateJob", request, self._timeout_s, repeat=True)

    async def job(self, job_id: str) -> AsyncJob:
        """The handle of a job.

        Raises:
            NotFound: there is none of this id.
        """
        request = pb.GetJobRequest(job_id=job_id)
        return self._job((await self._trainer.one("GetJob", request, self._timeout_s)).job)

    async def jobs(
        self,
        *,
        states: Collection[JobState | str] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
    ) -> AsyncGenerator[AsyncJob, None]:
        """The jobs, the newest first, fetched page by page.

        Args:
            states: only jobs in one of these.
            labels: only jobs with all of these.
            page_size: jobs of one page, at most 1000.
        """
        wanted = [wire_state(state) for state in states]
        token = ""
        while True:
            request = pb.ListJobsRequest(
                page_size=page_size, page_token=token, states=wanted, labels=labels or {}
            )
            page = await self._trainer.one("ListJobs", request, self._timeout_s)
            for message in page.jobs:
                yield self._job(message)
            if not (token := page.next_page_token):
                return

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        lora: str = "",
        logprobs: bool = False,
        timeout_s: float = 600.0,
        **sampling: Any,
    ) -> list[Rollout]:
        """Sample rollouts, and wait for all of them.

        Args:
            prompts: one prompt or several: text, token ids, or a chat as messages with role and content.
            n: rollouts of each prompt.
            lora: a loaded adapter to sample with.
            logprobs: whether to send the tokens' logprobs.
            timeout_s: deadline in seconds of the whole call.
            sampling: by the names of the contract's SamplingParams: max_tokens, temperature, top_p, seed, stop.

        Returns:
            Whole rollouts: those of the first prompt, then those of the next.

        Raises:
            InvalidArgument: names the prompt or the parameter; nothing was sampled.
        """
        request = generate_request(
            prompts,
            sampling,
            n=n,
            lora=lora,
            logprobs=logprobs,
            mode=inference_pb2.OUTPUT_MODE_FINISHED,
        )
        done: list[Rollout] = []
        async with aclosing(self._inference.many("Generate", request, timeout_s)) as responses:
            async for response in responses:
                done += map(rollout_of, response.rollouts)
        if len(done) != (wanted := sum(prompt.n for prompt in request.prompts)):
            raise Internal(Reason.BUG, f"the service sent {len(done)} of {wanted} rollouts")
        return sorted(done, key=lambda rollout: (rollout.prompt_index, rollout.rollout_index))

    async def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        lora: str = "",
        logprobs: bool = False,
        timeout_s: float = 600.0,
        **sampling: Any,
    ) -> AsyncGenerator[Rollout, None]:
        """Sample rollouts, and have their pieces as they come. Arguments and errors are those of `generate`.

        Leaving the iteration cancels what runs.
        """
        request = generate_request(
            prompts,
            sampling,
            n=n,
            lora=lora,
            logprobs=logprobs,
            mode=inference_pb2.OUTPUT_MODE_DELTAS,
        )
        async with aclosing(self._inference.many("Generate", request, timeout_s)) as responses:
            async for response in responses:
                for message in response.rollouts:
                    yield rollout_of(message)

    async def close(self) -> None:
        """Close the channels. What runs is cancelled."""
        await self._trainer.close()
        await self._inference.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _job(self, message: job_pb2.Job) -> AsyncJob:
        return AsyncJob(self._trainer, message, self._timeout_s, self._patience_s)
