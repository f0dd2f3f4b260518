"""Every gRPC channel argument that Tandem sets, and why.

gRPC ignores names it does not know, so a contract test looks each of these up in gRPC's own binary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

Options = list[tuple[str, int | str]]

MAX_MESSAGE_BYTES: Final = 16 * 2**20
"""Default limit of one message, both ways, to be set alike on both sides. gRPC's own limit of 4 MiB is less
than a batch of rollouts with logprobs; none at all would let any peer exhaust memory."""

SO_REUSEPORT: Final = "grpc.so_reuseport"
"""0. By default a second server binds the same port without a word and takes half of the connections."""

MAX_RECEIVE: Final = "grpc.max_receive_message_length"
MAX_SEND: Final = "grpc.max_send_message_length"

MIN_PING_INTERVAL: Final = "grpc.http2.min_ping_interval_without_data_ms"
"""How often a client may ping while nothing else is sent. The default of 5 minutes kills long silent calls
of clients with keepalive (`too_many_pings`). The name with `recv` in it, seen elsewhere, is no name."""

MAX_PING_STRIKES: Final = "grpc.http2.max_ping_strikes"
"""0: a connection is never closed for pinging too often. Clients in other languages ping as they like."""

MAX_PINGS_WITHOUT_DATA: Final = "grpc.http2.max_pings_without_data"
"""0: no limit of pings between two messages, or keepalive ends within a long silent call."""

KEEPALIVE_TIME: Final = "grpc.keepalive_time_ms"
KEEPALIVE_TIMEOUT: Final = "grpc.keepalive_timeout_ms"

KEEPALIVE_WITHOUT_CALLS: Final = "grpc.keepalive_permit_without_calls"
"""1: idle connections are kept, or the first call after a long training step might find a dead one."""

HTTP_PROXY: Final = "grpc.enable_http_proxy"
"""0: a proxy meant for the web, named in the environment, is not asked for the address of a GPU host."""

INITIAL_BACKOFF: Final = "grpc.initial_reconnect_backoff_ms"
MIN_BACKOFF: Final = "grpc.min_reconnect_backoff_ms"
MAX_BACKOFF: Final = "grpc.max_reconnect_backoff_ms"
"""gRPC's defaults, 1 second growing to 2 minutes, would let a restarted service seem dead."""

SERVICE_CONFIG: Final = "grpc.service_config"

SERVER_KEEPALIVE_MS: Final = 60_000
CLIENT_KEEPALIVE_MS: Final = 30_000
MIN_PING_INTERVAL_MS: Final = 10_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000

_READS = {
    "tandem.inference.v1.InferenceService": ("GetModel", "Tokenize"),
    "tandem.engine.v1.EngineService": ("GetStats",),
    "tandem.weights.v1.WeightService": ("GetManifest", "GetWeightVersion"),
    "tandem.trainer.v1.TrainingJobService": ("GetJob", "ListJobs", "ListCheckpoints"),
}


def service_config() -> str:
    """Return the client's service config: methods that only read are tried again while it is unavailable."""
    names = [
        {"service": service, "method": method} for service, methods in _READS.items() for method in methods
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    throttling = {"maxTokens": 10, "tokenRatio": 0.1}
    return json.dumps(
        {"methodConfig": [{"name": names, "retryPolicy": policy}], "retryThrottling": throttling}
    )


def merge(base: Options, more: Iterable[tuple[str, int | str]]) -> Options:
    """Return both, where `more` wins. Of an argument that is given twice, gRPC takes the first."""
    return list((dict(base) | dict(more)).items())


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """Return the channel arguments of a server.

    Args:
        max_message_bytes: limit of one message in bytes, received or sent.
    """
    return [
        (SO_REUSEPORT, 0),
        (MAX_RECEIVE, max_message_bytes),
        (MAX_SEND, max_message_bytes),
        (MIN_PING_INTERVAL, MIN_PING_INTERVAL_MS),
        (MAX_PING_STRIKES, 0),
        (MAX_PINGS_WITHOUT_DATA, 0),
        (KEEPALIVE_TIME, SERVER_KEEPALIVE_MS),
        (KEEPALIVE_TIMEOUT, KEEPALIVE_TIMEOUT_MS),
        (KEEPALIVE_WITHOUT_CALLS, 1),
    ]


def client_options(
    max_message_bytes: int = MAX_MESSAGE_BYTES, keepalive_ms: int = CLIENT_KEEPALIVE_MS
) -> Options:
    """Return the channel arguments of a client.

    Args:
        max_message_bytes: limit of one message in bytes, received or sent.
        keepalive_ms: milliseconds of silence after which the connection is probed.
    """
    return [
        (MAX_RECEIVE, max_message_bytes),
        (MAX_SEND, max_message_bytes),
        (KEEPALIVE_TIME, keepalive_ms),
        (KEEPALIVE_TIMEOUT, KEEPALIVE_TIMEOUT_MS),
        (KEEPALIVE_WITHOUT_CALLS, 1),
        (MAX_PINGS_WITHOUT_DATA, 0),
        (HTTP_PROXY, 0),
        (INITIAL_BACKOFF, 100),
        (MIN_BACKOFF, 2_000),
        (MAX_BACKOFF, 1_000),
        (SERVICE_CONFIG, service_config()),
    ]
