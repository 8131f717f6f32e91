"""Prometheus metrics: counts and times, without prompts or keys."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from valign.guard.records import GuardDecision

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry per service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common = {"namespace": "valign", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests", ["route", "status"], **common)  # type: ignore[arg-type]
        self.seconds = Histogram("request_seconds", "Time to the answer", ["route"], buckets=SLOW, **common)  # type: ignore[arg-type]
        self.decisions = Counter("decisions", "Guarded prompts", ["action", "stage"], **common)  # type: ignore[arg-type]
        self.stage_seconds = Histogram("stage_seconds", "Time of a guard stage", ["stage"], buckets=FAST, **common)  # type: ignore[arg-type]
        self.images = Counter("pictures", "Images by what became of them", ["outcome"], **common)  # type: ignore[arg-type]
        self.batch = Histogram("batch_size", "Items of one model call", ["queue"], buckets=SIZES, **common)  # type: ignore[arg-type]
        self.under_way = Gauge("under_way", "Admitted, not yet answered", ["queue"], **common)  # type: ignore[arg-type]
        self.audit_failures = Counter("audit_failures", "Entries that could not be logged", **common)  # type: ignore[arg-type]
        self.reloads = Counter("reloads", "Reloads of policy and keys", ["outcome"], **common)  # type: ignore[arg-type]
        self.canaries = Counter("canaries", "Looks at the canaries", ["outcome"], **common)  # type: ignore[arg-type]
        self.ready = Gauge("ready", "1 when the models are loaded and warm", **common)  # type: ignore[arg-type]

    def count_decision(self, decision: GuardDecision) -> None:
        self.decisions.labels(decision.action, decision.stop or "none").inc()
        for verdict in decision.trace:
            self.stage_seconds.labels(verdict.stage).observe(verdict.milliseconds / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)
