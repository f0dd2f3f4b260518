"""The Python client: submit and follow training jobs, and generate. `docs/sdk.md` is its guide.

`TandemClient` is for threads, `AsyncTandemClient` for asyncio; both have the same verbs and raise `tandem.errors`.
Importing it loads gRPC, and none of torch, vLLM or TRL.
"""

from tandem.client._aio.client import AsyncTandemClient
from tandem.client._aio.job import AsyncJob
from tandem.client._sync.client import TandemClient
from tandem.client._sync.job import Job
from tandem.client.requests import Prompt
from tandem.client.specs import Spec, job_spec
from tandem.client.values import (
    Checkpoint,
    CheckpointSaved,
    Event,
    JobState,
    Log,
    Metrics,
    Rollout,
    Sample,
    Samples,
    StateChange,
)

__all__ = [
    "AsyncJob",
    "AsyncTandemClient",
    "Checkpoint",
    "CheckpointSaved",
    "Event",
    "Job",
    "JobState",
    "Log",
    "Metrics",
    "Prompt",
    "Rollout",
    "Sample",
    "Samples",
    "Spec",
    "StateChange",
    "TandemClient",
    "job_spec",
]
