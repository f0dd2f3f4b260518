"""`tandem generate`."""

from __future__ import annotations

import sys
from typing import Any

from tandem.cli.arguments import Parser, assignments, client, safe, with_services

#: SamplingParams that have a flag of their own.
_FLAGS = {"max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int}


def main(argv: list[str]) -> int:
    """Stream one rollout to standard output."""
    parser = with_services(
        Parser("generate", "Sample from the policy; its text appears as it is sampled."), "inference"
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input if not given")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says in a chat")
    parser.add_argument("--system", metavar="TEXT", help="what the system says first; makes it a chat")
    parser.add_argument("--lora", default="", metavar="NAME", help="a loaded adapter to sample with")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for all of it")
    for name, kind in _FLAGS.items():
        default = 256 if name == "max_tokens" else None
        told = "(default 256)" if default else "as the service has it by default"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told)
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another of the contract's SamplingParams; values may be JSON",
    )
    options = parser.parse_args(argv)
    text = sys.stdin.read() if options.prompt is None else options.prompt
    given = {name: getattr(options, name) for name in _FLAGS if getattr(options, name) is not None}
    sampling = given | assignments(options.param, "param")
    keep, ending = "\n\t", "\n"
    with client(options) as tandem:
        stream = tandem.stream(
            _prompt(text, options), lora=options.lora, timeout_s=options.timeout, **sampling
        )
        for piece in stream:
            if piece.text:
                shown = safe(piece.text, keep) if sys.stdout.isatty() else piece.text
                sys.stdout.write(shown)
                sys.stdout.flush()
                ending = "" if shown.endswith("\n") else "\n"
    sys.stdout.write(ending)
    return 0


def _prompt(text: str, options: Any) -> Any:
    if options.system is None and not options.chat:
        return text
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]
