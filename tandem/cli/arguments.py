"""What the client's commands have in common: their arguments, the client these make, and how text is shown."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tandem.errors import invalid

if TYPE_CHECKING:
    from tandem.client import TandemClient


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in one line."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"tandem {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def with_services(parser: Parser, *services: str) -> Parser:
    """Add the flags that say where the services are, and how to talk to them."""
    for service in services:
        parser.add_argument(
            f"--{service}",
            metavar="ADDRESS",
            help=f"the {service} service's: unix:///path or host:port (TANDEM_{service.upper()}_ADDRESS; "
            "by default this user's socket)",
        )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="with its token (TANDEM_TOKEN_FILE)")
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="PEM file of authorities to trust, for TLS"
    )
    return parser


def client(options: argparse.Namespace, timeout_s: float = 30.0) -> TandemClient:
    """The client that the flags describe. `timeout_s` is the deadline in seconds of each call.

    Raises:
        InvalidArgument: one of them is malformed.
    """
    from tandem.client import TandemClient
    from tandem.rpc.trust import read_token

    file = options.token_file or os.environ.get("TANDEM_TOKEN_FILE")
    return TandemClient(
        getattr(options, "trainer", None),
        getattr(options, "inference", None),
        read_token(Path(file)) if file else None,
        timeout_s=timeout_s,
        ca_file=options.ca_file,
    )


def assignments(given: list[str], field: str) -> dict[str, Any]:
    """What flags give as NAME=VALUE: a value that is JSON as that, any other as text.

    Raises:
        InvalidArgument: one is of another form; it is called `field`.

    >>> assignments(["n=4", "name=policy", 'stop=["a=b"]'], "param")
    {'n': 4, 'name': 'policy', 'stop': ['a=b']}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise invalid(field, f"must be NAME=VALUE, is {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def say(text: str) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def safe(text: str, keep: str = "") -> str:
    """Text of a model or a log, with what would steer a terminal made visible, but for the characters in `keep`.

    >>> safe("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\\\n'
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
