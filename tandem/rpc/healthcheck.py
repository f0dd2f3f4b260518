"""`python -m tandem.rpc.healthcheck ADDRESS [SERVICE]` exits 0 if the service serves. For probes.

It speaks the two small messages of grpc.health.v1 itself, to import nothing but gRPC.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import grpc

from tandem.errors import InvalidArgument
from tandem.rpc.channel import connect

SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


def main(argv: list[str] | None = None) -> int:
    """Check once. Exit code: 0 serving, 1 not serving or unknown, 2 wrong arguments, 3 no answer."""
    parser = argparse.ArgumentParser(
        prog="tandem.rpc.healthcheck", description="Ask a service for its health."
    )
    parser.add_argument("address", help="unix:///absolute/path or host:port")
    parser.add_argument("service", nargs="?", default="", help="its full name; the process if not given")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait for the answer")
    parser.add_argument("--ca-file", help="PEM file of the authorities, for TLS")
    arguments = parser.parse_args(argv)
    name = arguments.service.encode()
    if len(name) > 127:
        parser.error("the service's name is too long")
    request: Any = b"\x0a" + bytes([len(name)]) + name if name else b""
    try:
        with connect(arguments.address, ca_file=arguments.ca_file, insecure=True) as channel:
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            answer = check(request, timeout=arguments.timeout)
    except InvalidArgument as error:
        parser.error(error.message)
    except grpc.RpcError as error:
        code = error.code()
        sys.stderr.write(f"{arguments.address}: {code.name}: {error.details()}\n")
        return 1 if code == grpc.StatusCode.NOT_FOUND else 3
    if answer != SERVING:
        sys.stderr.write(f"{arguments.address}: NOT_SERVING\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
