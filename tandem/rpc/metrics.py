"""Prometheus metrics of every gRPC server, under the names that dashboards for gRPC expect."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STARTED = Counter("grpc_server_started", "RPCs begun.", ["grpc_service", "grpc_method"])
HANDLED = Counter("grpc_server_handled", "RPCs ended.", ["grpc_service", "grpc_method", "grpc_code"])
HANDLING = Histogram(
    "grpc_server_handling_seconds",
    "Time from an RPC's begin to its end.",
    ["grpc_service", "grpc_method"],
    # Tokens take milliseconds, batches of rollouts minutes. A trainer's stream of updates lasts as long as the trainer,
    # which leaves it by cancelling it: single updates are counted by the policy.
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
LOOP_LAG = Gauge("event_loop_lag_seconds", "The longest that the event loop was late in ten seconds.")
