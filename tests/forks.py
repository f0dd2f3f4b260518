"""Processes of tests that have everything imported: a fork server makes one in a tenth of a second."""

from __future__ import annotations

import multiprocessing

#: Of all tests: the fork server starts once in a process, with the modules that it was given by then.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "tests.weight_service",
        "tests.host_nccl",
        "tests.split_nccl",
        "tests.faults.trainer_process",
        "tests.faults.test_trainer_of_replicas_dies",
    ]
)
