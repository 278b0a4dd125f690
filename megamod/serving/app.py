"""The application of a server: routes of its model, a page to try it, health, metrics, errors."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Protocol

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from megamod.serving.completion import CompletionService
from megamod.serving.exchange import add_error_handlers
from megamod.serving.metrics import Metrics, RequestCounter
from megamod.serving.page_policy import PAGE_POLICY
from megamod.serving.request_queue import RequestQueue
from megamod.version import __version__


class Service(Protocol):
    """A model to serve.

    Attributes:
        name: name of the model.
        kind: "classification", "tagging" or "completion".
        path: path of its route.
        group_size, max_groups: see `RequestQueue`.
        answer_batch: answers requests of the queue, in their order, in its worker thread.
    """

    name: str
    kind: str
    path: str
    group_size: int
    max_groups: int
    answer_batch: Callable[[Sequence], Sequence]

    def make_model_entries(self) -> dict[str, object]:
        """Return the entries of this kind of model for the list of models, /v1/models."""
        ...

    def make_router(self, queue: RequestQueue) -> APIRouter:
        """Make the route of the model, which submits to the queue."""
        ...


def make_app(service: Service, *, max_wait: float, max_queue: int) -> FastAPI:
    """Make the application that serves a model; its queue is `app.state.queue`.

    Args:
        service: the model to serve; a completion service reports its tokens to the metrics.
        max_wait: seconds that a request of an incomplete group waits for others.
        max_queue: most waiting inputs.
    """
    queue = RequestQueue(
        service.answer_batch,
        service.group_size,
        service.max_groups,
        max_wait=max_wait,
        limit=max_queue,
    )
    metrics = Metrics(queue)
    if isinstance(service, CompletionService):
        service.on_tokens = metrics.generated_tokens.inc

    @asynccontextmanager
    async def run_queue(_: FastAPI) -> AsyncIterator[None]:
        """Serve the queue while the application runs, then drain it; the lifespan of FastAPI."""
        worker = asyncio.ensure_future(queue.serve())
        yield
        await queue.drain()
        worker.cancel()

    app = FastAPI(
        title="megamod", version=__version__, docs_url=None, redoc_url=None, lifespan=run_queue
    )
    app.state.queue = queue
    app.include_router(service.make_router(queue))
    app.include_router(_make_common_router(service, queue, metrics))
    paths = [service.path, "/", "/healthz", "/metrics", "/v1/models", "/openapi.json"]
    add_error_handlers(app, paths)
    app.add_middleware(RequestCounter, metrics=metrics, paths=frozenset(paths))
    return app


def _make_common_router(service: Service, queue: RequestQueue, metrics: Metrics) -> APIRouter:
    """Make the routes that every model has: page, health, metrics and the list of models.

    Args:
        service: the model, named in the list of models.
        queue: its length and state are the health of the server.
        metrics: shown at /metrics.
    """
    router = APIRouter()
    page = files("megamod.serving").joinpath("page.html").read_text(encoding="utf-8")
    created = int(time.time())

    @router.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """Return the HTML page to try the model."""
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @router.get("/healthz")
    async def report_health() -> Response:
        """Return status 200, or 503 if the server is shutting down."""
        state = {"status": "draining" if queue.draining else "ok", "waiting": queue.waiting}
        return JSONResponse(state, 503 if queue.draining else 200)

    @router.get("/metrics")
    async def report_metrics() -> Response:
        """Return metrics in the text format of Prometheus."""
        return Response(metrics.format_text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def list_models() -> dict[str, object]:
        """List the model that is served."""
        model = {"id": service.name, "object": "model", "created": created, "owned_by": "megamod"}
        model |= {"kind": service.kind, "path": service.path}
        return {"object": "list", "data": [model | service.make_model_entries()]}

    return router
