"""Metrics for Prometheus: requests, batches, the queue, generated tokens, and the process."""

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megamod.serving.request_queue import BatchReport, RequestQueue

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the buckets of times."""


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        queue: the queue whose length is shown.
    """

    def __init__(self, queue: RequestQueue):
        """Register all metrics, and count batches through `on_batch` of the queue."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "megamod_requests",
            "Requests, by path and status of the response",
            ["path", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "megamod_request_seconds",
            "Seconds from a request to the end of its response, by path",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "megamod_batch_seconds",
            "Seconds of a batch in the model",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answered = Counter(
            "megamod_answered", "Inputs that the model has answered", registry=self.registry
        )
        self.places = Counter(
            "megamod_places",
            "Places of all groups that were run; those without an input had a copy of another",
            registry=self.registry,
        )
        self.generated_tokens = Counter(
            "megamod_generated_tokens", "Tokens that were generated", registry=self.registry
        )
        waiting = Gauge("megamod_waiting", "Inputs in the queue", registry=self.registry)
        waiting.set_function(lambda: queue.waiting)
        limit = Gauge("megamod_waiting_limit", "Room in the queue", registry=self.registry)
        limit.set(queue.limit)
        queue.on_batch = self.count_batch

    def count_batch(self, report: BatchReport) -> None:
        """Add a batch to the metrics; the queue calls it as `on_batch`."""
        self.answered.inc(report.requests)
        self.places.inc(report.places)
        self.batch_seconds.observe(report.seconds)

    def format_text(self) -> bytes:
        """Format all metrics in the text format of Prometheus, in UTF-8."""
        return generate_latest(self.registry)


class RequestCounter:
    """ASGI middleware that counts responses and their times.

    Args:
        app: the application.
        metrics: metrics of the server.
        paths: paths that are counted by name; others count as "other".
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]):
        """Store the arguments, see the class."""
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request, then count it by path and status, with its seconds.

        A request whose response never starts counts with status 500.

        Args:
            scope, receive, send: request and its channels, see the specification of ASGI.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, time.monotonic()

        async def send_and_read_status(message: Message) -> None:
            """Pass on a message of the response; store its status when the response starts."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_read_status)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(time.monotonic() - started)
