"""Requests read from HTTP bodies, and errors as responses: one sentence each, in OpenAI's form."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megamod.errors import UserError
from megamod.schemas import parse_checked_json
from megamod.serving.request_queue import DrainingError, QueueFullError

logger = logging.getLogger(__name__)

LARGEST_BODY = 2**20
"""Most bytes of a request's body."""

KINDS = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "not_found_error",
    413: "invalid_request_error",
    429: "overloaded_error",
    503: "unavailable_error",
}
"""Type of an error, by status; other statuses are server errors."""

Checked = TypeVar("Checked")
Answer = TypeVar("Answer")


class RefusedRequestError(UserError):
    """A request that is refused with another status than 400."""

    def __init__(self, status: int, message: str):
        """Make the error for an HTTP `status`, with one sentence for the client as `message`."""
        super().__init__(message)
        self.status = status


async def read_body(request: Request, schema: type[Checked]) -> Checked:
    """Read a request's body as an instance of a schema, see `megamod.schemas.parse_checked_json`.

    Args:
        request: the request, whose body was not read yet.
        schema: subclass of `Schema` that describes the body.
    Raises:
        UserError: naming the first field that does not fit, with what is allowed.
        RefusedRequestError: if the body is larger than `LARGEST_BODY`.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise RefusedRequestError(
                413, f"request: its body has more than {LARGEST_BODY:,} bytes, the most allowed"
            )
    return parse_checked_json(bytes(body), schema, "request")


def check_model_name(requested: str | None, served: str) -> None:
    """Refuse a request that names another model than the one that is served.

    Args:
        requested: name in the request; None: it has none, and passes.
    Raises:
        RefusedRequestError: with status 404.
    """
    if requested not in (None, served):
        raise RefusedRequestError(
            404, f"request, model: {requested!r} is not served here; give {served!r}, or none"
        )


async def await_unless_abandoned(request: Request, work: Coroutine[None, None, Answer]) -> Answer:
    """Await work for a request, and cancel it if the client disconnects.

    Args:
        request: the request, whose body was read already.
        work: coroutine that computes the answer, such as `RequestQueue.submit`.
    Returns:
        the result of `work`.
    Raises:
        ClientDisconnect: if the client is gone.
        Exception: that of the work.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def describe_fault(error: Exception) -> str:
    """Return the message to a client for an unexpected exception: its class, without its text."""
    return f"the server failed to answer: {type(error).__name__}, see its log"


def format_error(status: int, message: str) -> dict[str, object]:
    """Format an error as JSON content in the form of OpenAI's API.

    Args:
        status: HTTP status of the response, which decides the type of the error.
        message: one sentence for the client.
    """
    kind = KINDS.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "code": status}}


def add_error_handlers(app: FastAPI, paths: list[str]) -> None:
    """Register handlers that answer every error of a request with a status and one sentence.

    Args:
        app: the application, which is changed.
        paths: all paths of the application, which the answer to an unknown path lists.
    """

    def respond(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        """Make a JSON response with an error, see `format_error`."""
        return JSONResponse(format_error(status, message), status, headers)

    @app.exception_handler(UserError)
    async def refuse_request(_: Request, error: UserError) -> Response:
        """Answer with status 400, or with that of a `RefusedRequestError`."""
        return respond(getattr(error, "status", 400), str(error))

    @app.exception_handler(QueueFullError)
    async def refuse_for_now(_: Request, error: QueueFullError) -> Response:
        """Answer with status 429, and the seconds after which to try again."""
        return respond(429, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(DrainingError)
    async def refuse_at_end(_: Request, error: DrainingError) -> Response:
        """Answer with status 503, as the server is shutting down."""
        return respond(503, str(error), {"Connection": "close"})

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(_: Request, error: ClientDisconnect) -> Response:
        """Return status 499 for the metrics: the client is gone."""
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> Response:
        """Answer status 404 for an unknown path, 405 for a method that its path does not have."""
        where = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another")
            return respond(405, f"{where}: give the method {allowed}", error.headers)
        return respond(error.status_code, f"{where}: no such page; there are {', '.join(paths)}")

    @app.exception_handler(Exception)
    async def report_fault(request: Request, error: Exception) -> Response:
        """Answer an unexpected exception with status 500, without its details."""
        return respond(500, describe_fault(error))
