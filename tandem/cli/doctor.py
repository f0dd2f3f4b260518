"""`tandem doctor`: what of this host stands in Tandem's way, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

from tandem.cli.arguments import Parser, say
from tandem.cli.check_gpu import gpus
from tandem.cli.check_host import disk, ipc, python
from tandem.cli.check_services import folders, services
from tandem.cli.findings import Finding, Verdict, bad

_COLOURS = {Verdict.OK: "32", Verdict.NOTE: "33", Verdict.MEND: "31"}


def main(argv: list[str]) -> int:
    """Check this host. Returns 1 if something must be mended."""
    parser = Parser("doctor", "Look at this host. The exit code is 1 if something must be mended.")
    for name in ("inference", "trainer"):
        parser.add_argument(f"--{name}", metavar="ADDRESS", help=f"where the {name} service is or will be")
    parser.add_argument("--json", action="store_true", help="a JSON object in each line")
    options = parser.parse_args(argv)
    findings = examine({name: getattr(options, name) for name in ("inference", "trainer")})
    for finding in findings:
        say(json.dumps(finding.as_dict()) if options.json else _line(finding))
    count = Counter(finding.verdict for finding in findings)
    if not options.json:
        say(f"{len(findings)} checks: {count[Verdict.MEND]} to mend, {count[Verdict.NOTE]} to note")
    return 1 if count[Verdict.MEND] else 0


def examine(addresses: dict[str, str | None]) -> list[Finding]:
    """All findings. An address that is None is the one by default."""
    places, found = {}, []
    for name, given in addresses.items():
        try:
            places[name] = given or os.environ.get(f"TANDEM_{name.upper()}_ADDRESS") or _default(name)
        except ValueError as error:
            found.append(bad(f"{name} address", str(error), "remove that folder, or set XDG_RUNTIME_DIR"))
    return [*python(), *gpus(), *ipc(), *found, *folders(places), *disk(), *services(places)]


def _default(name: str) -> str:
    from tandem.settings import default_address

    return default_address(name)


def _line(finding: Finding) -> str:
    word = f"{finding.verdict:<4}"
    if sys.stdout.isatty():
        word = f"\x1b[{_COLOURS[finding.verdict]}m{word}\x1b[0m"
    mend = f"\n      -> {finding.mend}" if finding.mend else ""
    return f"{word}  {finding.check}: {finding.found}{mend}"
