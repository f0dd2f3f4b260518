"""`tandem dashboard`."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.cli.arguments import Parser, say, with_services


def main(argv: list[str]) -> int:
    """Serve the page until Ctrl-C."""
    parser = with_services(
        Parser("dashboard", "Serve a web page of jobs, their curves and rollouts, and the engine's state."),
        "trainer",
        "inference",
    )
    parser.add_argument(
        "--address", default="127.0.0.1:8321", metavar="HOST:PORT", help="where (default 127.0.0.1:8321)"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="let other hosts reach the address, over plain HTTP"
    )
    options = parser.parse_args(argv)
    import asyncio

    from tandem.dashboard.server import Settings, run
    from tandem.rpc.trust import read_token

    file = options.token_file or os.environ.get("TANDEM_TOKEN_FILE")
    settings = Settings(
        address=options.address,
        insecure=options.insecure,
        trainer=options.trainer,
        inference=options.inference,
        token=read_token(Path(file)) if file else None,
        ca_file=options.ca_file,
    )
    asyncio.run(run(settings, say))
    return 0
