"""`tandem up`: both services on this host, for as long as the command runs."""

from __future__ import annotations

import sys
import time

from tandem.cli.arguments import Parser, say
from tandem.cli.pair import Pair
from tandem.errors import Reason, TandemError, Unavailable
from tandem.processes import ChildError, Interrupted, Processes

_LIVE = ("QUEUED", "STARTING", "RUNNING", "RETRYING", "CANCELLING")
#: What the jobs get together to save and end in.
_END_JOBS_S = 60.0


def main(argv: list[str]) -> int:
    """Run both services until Ctrl-C, or until one of them ends. Then nothing of them is left."""
    parser = Parser(
        "up",
        "Run the inference service and the trainer service here, on this user's Unix sockets, until Ctrl-C. Jobs that "
        "are not over then are cancelled; tandem resume has them go on another time.",
    )
    parser.add_argument("--model", help="the checkpoint to serve: a folder, or a name that vLLM can resolve")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME=VALUE", help="vLLM's engine arguments"
    )
    parser.add_argument(
        "--inference-config", metavar="FILE", help="further settings: tandem inference --help"
    )
    parser.add_argument("--trainer-config", metavar="FILE", help="further settings: tandem trainer --help")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds to load in")
    options = parser.parse_args(argv)
    from tandem.settings import default_address

    addresses = {name: default_address(name) for name in ("inference", "trainer")}
    try:
        with Processes(None, {}) as processes:
            pair = Pair(
                processes,
                addresses,
                inference={
                    "model": options.model,
                    "engine": options.engine,
                    "config": options.inference_config,
                },
                trainer={"config": options.trainer_config},
            )
            pair.wait_until_serving(options.timeout)
            for name, address in addresses.items():
                say(f"{name:<10} {address}")
            say("both serve; Ctrl-C ends them")
            try:
                while True:
                    pair.wait()
            finally:
                _end_jobs(addresses["trainer"])
    except Interrupted:
        sys.stderr.write("stopped; nothing is left running\n")
        return 130
    except ChildError as error:
        raise Unavailable(Reason.UNREACHABLE, str(error)) from error


def _end_jobs(address: str) -> None:
    """Cancel what runs: jobs outlive their service otherwise."""
    from tandem.client import TandemClient

    deadline = time.monotonic() + _END_JOBS_S
    try:
        with TandemClient(trainer=address, timeout_s=10.0, patience_s=0.0) as client:
            jobs = [job.cancel() for job in client.jobs(states=_LIVE)]
            for job in jobs:
                for _ in job.watch(job.last_sequence, timeout_s=max(0.0, deadline - time.monotonic())):
                    pass
                say(f"{job.id} {job.state}")
    except TandemError as error:
        sys.stderr.write(
            f"tandem: jobs may still run, since the trainer service does not end them: {error}\n"
        )
