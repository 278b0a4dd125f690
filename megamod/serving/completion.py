"""Completions of language models over HTTP, as OpenAI's, with the posterior of mixed experts."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import AfterValidator, Field

from megamod.errors import UserError, shorten
from megamod.evaluation.generate import Continuation, Sampling, TextGenerator
from megamod.schemas import Schema
from megamod.serving.exchange import (
    await_unless_abandoned,
    check_model_name,
    describe_fault,
    format_error,
    read_body,
)
from megamod.serving.request_queue import RequestQueue

logger = logging.getLogger(__name__)

MOST_STOPS = 4


def _make_single_value_type(allowed: object) -> object:
    """Make the type of a field of OpenAI's completions that accepts one value only.

    What other values ask for is not supported, so they are refused by a ValueError, for pydantic.

    Args:
        allowed: the accepted value, such as 1 for `n`.
    """

    def check_allowed(value: object) -> object:
        """Return the value; raise ValueError if it is not `allowed`."""
        if type(value) is not type(allowed) or value != allowed:
            raise ValueError(
                f"{shorten(value)} is not supported; give {json.dumps(allowed)}, or leave it out"
            )
        return value

    return Annotated[Any, AfterValidator(check_allowed)]


def _parse_stop(value: object) -> tuple[str, ...]:
    """Parse stop texts: null, a text, or a list of them; raise ValueError for anything else."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not fits or len(texts) > MOST_STOPS:
        raise ValueError(
            f"{shorten(value)} is neither a text nor a list of up to {MOST_STOPS} texts, none empty"
        )
    return tuple(texts)


class CompletionRequest(Schema):
    """Body of a request, with the fields of OpenAI's completions that are supported.

    Attributes:
        max_tokens: longest continuation, in tokens.
        temperature: divisor of the logits; 0 selects the most probable token each time.
        top_p: total probability of the tokens to sample from.
        seed: seed of the random numbers; None: drawn, and different each time.
        stop: texts that end the continuation.
        stream: send the text piece by piece as server-sent events.
        user: ignored.
    """

    prompt: str
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    stop: Annotated[Any, AfterValidator(_parse_stop)] = ()
    stream: bool = False
    n: _make_single_value_type(1) = 1
    best_of: _make_single_value_type(1) = 1
    echo: _make_single_value_type(False) = False
    logprobs: _make_single_value_type(None) = None
    user: str | None = None


@dataclass(eq=False)
class CompletionJob:
    """A request in the queue.

    Attributes:
        on_text: called in the worker thread with the text so far; None if it is not streamed.
        abandoned: set when nobody waits for the text any more, which stops it.
    """

    prompt: str
    sampling: Sampling
    on_text: Callable[[str], None] | None = None
    abandoned: bool = False

    def report_text(self, text: str) -> bool:
        """Pass the text so far to `on_text`; return False if nobody waits for more of it."""
        if self.on_text is not None:
            self.on_text(text)
        return not self.abandoned


class CompletionService:
    """A language model, an expert or a forest to serve.

    Args:
        text_generator: the model and its tokenizer.
        name: name of the model.
        max_tokens: most tokens that a request may ask for.

    Attributes:
        on_tokens: called with the number of tokens of every text.
    """

    kind, path = "completion", "/v1/completions"
    group_size = max_groups = 1

    def __init__(self, text_generator: TextGenerator, name: str, max_tokens: int):
        """Store the arguments, see the class; tokens are not counted until `on_tokens` is set."""
        self.text_generator, self.name, self.max_tokens = text_generator, name, max_tokens
        self.on_tokens: Callable[[int], None] = lambda count: None

    def make_model_entries(self) -> dict[str, object]:
        """Return the entries for the list of models: domains of the experts, and token limit."""
        return {"domains": list(self.text_generator.domains), "max_tokens": self.max_tokens}

    def make_job(self, body: CompletionRequest) -> CompletionJob:
        """Make the job of a request for the queue; a request without a seed gets a random one.

        Raises:
            UserError: if it asks for too many tokens.
        """
        if body.max_tokens > self.max_tokens:
            raise UserError(
                f"request, max_tokens: {body.max_tokens} is not {self.max_tokens} or less"
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        sampling = Sampling(
            body.max_tokens, body.temperature, body.top_p, seed=seed, stop=body.stop
        )
        return CompletionJob(body.prompt, sampling)

    def answer_batch(self, jobs: Sequence[CompletionJob]) -> list[Continuation]:
        """Generate the texts of jobs, one after the other, and report each length to `on_tokens`.

        Raises:
            UserError: if a prompt is too long.
        """
        texts = []
        for job in jobs:
            texts += self.text_generator.generate(job.prompt, job.sampling, job.report_text)
            self.on_tokens(texts[-1].new_tokens)
        return texts

    def make_router(self, queue: RequestQueue) -> APIRouter:
        """Make the route of the model.

        Args:
            queue: requests wait in it; it calls `answer_batch`.
        """
        router = APIRouter()
        schema = CompletionRequest.model_json_schema()
        content = {"content": {"application/json": {"schema": schema}}}

        @router.post(self.path, openapi_extra={"requestBody": content}, response_model=None)
        async def complete(request: Request) -> Response | dict[str, object]:
            """Return the continuation of a prompt, whole or as server-sent events."""
            body = await read_body(request, CompletionRequest)
            check_model_name(body.model, self.name)
            job = self.make_job(body)
            if body.stream:
                return await self._stream_completion(job, queue)
            try:
                (text,) = await await_unless_abandoned(request, queue.submit([job]))
            finally:
                job.abandoned = True
            return self._make_common_fields(job) | self._make_final_fields(text, text.new_text)

        return router

    async def _stream_completion(self, job: CompletionJob, queue: RequestQueue) -> Response:
        """Submit a job and stream its text as server-sent events.

        An error before the first piece of text is raised. A later one becomes an event, because the
        status of the response is sent by then.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        job.on_text = lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text)
        task = asyncio.ensure_future(queue.submit([job]))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        first = await pieces.get()
        if first is None:
            task.result()

        async def iterate_events() -> AsyncIterator[str]:
            """Yield an event per piece of text, the end of the response, and `[DONE]`."""
            head, sent, text = self._make_common_fields(job), "", first
            try:
                while text is not None:
                    if len(text) > len(sent):
                        yield _format_event(head | {"choices": [_make_choice(text[len(sent) :])]})
                        sent = text
                    text = await pieces.get()
                (end,) = task.result()
                yield _format_event(head | self._make_final_fields(end, end.new_text[len(sent) :]))
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status is sent already
                logger.exception("a stream failed")
                yield _format_event(format_error(500, describe_fault(error)))
            finally:
                job.abandoned = True
                task.cancel()

        return StreamingResponse(iterate_events(), media_type="text/event-stream")

    def _make_common_fields(self, job: CompletionJob) -> dict[str, object]:
        """Make the fields of every part of a response: id, kind, time, model and the seed in use.

        Called once per response, so that all events of a stream have one id.
        """
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "seed": job.sampling.seed,
        }

    def _make_final_fields(self, end: Continuation, text: str) -> dict[str, object]:
        """Make the fields of the last part of a response: text, reason of its end, token counts.

        Args:
            end: the whole continuation.
            text: text of this part: the continuation, or the end of it that was not yet sent.
        """
        choice = _make_choice(text, "stop" if end.finished else "length")
        if end.weights is not None:
            choice["posterior"] = dict(end.weights)
        usage = {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.new_tokens}
        return {
            "choices": [choice],
            "usage": usage | {"total_tokens": end.prompt_tokens + end.new_tokens},
        }


def _make_choice(text: str, reason: str | None = None) -> dict[str, object]:
    """Make the one entry of `choices` in a response.

    Args:
        text: text of this part of the response.
        reason: reason of the end, "stop" or "length"; None: more text follows.
    """
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


def _format_event(content: dict[str, object]) -> str:
    """Format JSON content as a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
