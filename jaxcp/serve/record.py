# SPDX-License-Identifier: Apache-2.0
"""Takes down what becomes of a request: for its line in the log, and for the metrics."""

import dataclasses
import logging
import time
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxcp.serve.worker import Worker

LOG = logging.getLogger("jaxcp.serve.requests")
FIRST = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
BETWEEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """Counters in a registry of their own, as Prometheus reads them."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter(
            "jaxcp_requests", "Requests by route and status", ["route", "status"], **own
        )
        self.prompt = Counter("jaxcp_prompt_tokens", "Tokens of prompts", **own)
        self.cached = Counter("jaxcp_cached_tokens", "Tokens of prompts found in the pool", **own)
        self.generated = Counter("jaxcp_generated_tokens", "Tokens of answers", **own)
        self.left = Counter("jaxcp_clients_left", "Clients that left before the end", **own)
        self.first = Histogram(
            "jaxcp_first_token_seconds", "From request to first token", buckets=FIRST, **own
        )
        self.between = Histogram(
            "jaxcp_between_tokens_seconds", "From token to token", buckets=BETWEEN, **own
        )
        self._running = Gauge("jaxcp_running", "Answers with a row of the batch", **own)
        self._waiting = Gauge("jaxcp_waiting", "Answers that wait for a row", **own)
        self._steps = Gauge("jaxcp_steps", "Steps of the engine", **own)
        self._failures = Gauge("jaxcp_step_failures", "Steps that raised", **own)
        self._pages = Gauge("jaxcp_pages", "Pages of the pool", ["shard", "state"], **own)

    def text(self, worker: Worker) -> bytes:
        """Everything, in Prometheus's text format."""
        load = worker.load
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._steps.set(load.steps)
        self._failures.set(load.failures)
        for shard, counts in enumerate(load.pages):
            for state, count in zip(("held", "evictable", "free"), counts, strict=True):
                self._pages.labels(shard, state).set(count)
        return generate_latest(self.registry)


@dataclasses.dataclass(kw_only=True)
class Record:
    """One request, from its first byte to its last."""

    id: str
    metrics: Metrics
    method: str = ""
    route: str = "other"
    began: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    """Seconds after `began`."""
    finish: str | None = None
    error: str | None = None
    left: bool = False
    """True if the client left before the end."""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Text for the log, where that is wanted."""
    _latest: dict[int, float] = dataclasses.field(default_factory=dict)

    def tokens(self, choice: int, count: int, now: float) -> None:
        """Take note of tokens that came."""
        if not count:
            return
        if self.first_token is None:
            self.first_token = now - self.began
            self.metrics.first.observe(self.first_token)
        elif choice in self._latest:
            for _ in range(count):
                self.metrics.between.observe((now - self._latest[choice]) / count)
        self._latest[choice] = now

    def usage(self, prompt: int, cached: int, generated: int) -> None:
        """Take note of what was computed and found, once it is known."""
        self.prompt_tokens, self.cached_tokens, self.generated_tokens = prompt, cached, generated

    def close(self) -> None:
        """Write the line of the log, and count."""
        metrics = self.metrics
        metrics.requests.labels(self.route, str(self.status)).inc()
        metrics.prompt.inc(self.prompt_tokens)
        metrics.cached.inc(self.cached_tokens)
        metrics.generated.inc(self.generated_tokens)
        metrics.left.inc(int(self.left))
        line: dict[str, Any] = {
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "seconds": round(time.monotonic() - self.began, 4),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "first_token_seconds": None if self.first_token is None else round(self.first_token, 4),
            "finish": self.finish,
            "error": self.error,
            "left": self.left,
        }
        LOG.info("%s", msgspec.json.encode(line | self.texts).decode())
