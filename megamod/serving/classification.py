"""Classifiers of texts and taggers of words over HTTP, N inputs in a multiplexed forward pass."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from megamod.errors import UserError
from megamod.evaluation.mux_pipeline import Answer, MuxPipeline
from megamod.evaluation.mux_pipeline import Request as Input
from megamod.schemas import Schema
from megamod.serving.exchange import await_unless_abandoned, check_model_name, read_body
from megamod.serving.request_queue import RequestQueue


class ClassificationRequest(Schema):
    """Body of a request.

    Attributes:
        input: one input, or a list of them. Texts: a text, or a pair as [TEXT, TEXT] in a list or
            {"text": TEXT, "text_pair": TEXT}. Words: a text that is split at blanks, or in a list
            also a list of words.
        model: name of the served model.
    """

    input: Any
    model: str | None = None


class ClassifierService:
    """A classifier or tagger to serve.

    Args:
        pipeline: runs the model; its `batch_size` bounds the groups of a batch.
        name: name of the model.
    """

    def __init__(self, pipeline: MuxPipeline, name: str):
        """Set route and group size by the kind of the pipeline's model."""
        self.pipeline, self.name = pipeline, name
        self.kind = "tagging" if pipeline.per_token else "classification"
        self.path = "/v1/tag" if pipeline.per_token else "/v1/classify"
        self.group_size, self.max_groups = pipeline.num_instances, pipeline.batch_size

    def make_model_entries(self) -> dict[str, object]:
        """Return the entries for the list of models: instances N of a forward pass, and labels."""
        return {"num_instances": self.group_size, "labels": self.pipeline.labels}

    def parse_inputs(self, body: ClassificationRequest) -> list[Input]:
        """Return the inputs of a request, each in the form of `MuxPipeline.parse_request`.

        Raises:
            UserError: naming an input that does not fit the model.
        """
        several = isinstance(body.input, list)
        if several and not body.input:
            raise UserError("request, input: [] has no input; give a text, or a list of inputs")
        inputs = body.input if several else [body.input]
        try:
            return [
                self.pipeline.parse_request(
                    value, f"request, input[{number}]" if several else "request, input"
                )
                for number, value in enumerate(inputs)
            ]
        except ValueError as error:
            raise UserError(str(error)) from error

    def answer_batch(self, inputs: Sequence[Input]) -> list[Answer | list[Answer]]:
        """Classify inputs; return their answers in the same order.

        Texts and pairs, which cannot be in one call of the pipeline, run one after the other.
        """
        answers: dict[int, Answer | list[Answer]] = {}
        for is_pair in (False, True):
            numbers = [n for n, value in enumerate(inputs) if isinstance(value, tuple) is is_pair]
            results = self.pipeline([inputs[number] for number in numbers])
            answers |= zip(numbers, results, strict=True)
        return [answers[number] for number in range(len(inputs))]

    def make_router(self, queue: RequestQueue) -> APIRouter:
        """Make the route of the model.

        Args:
            queue: requests wait in it; it calls `answer_batch`.
        """
        router = APIRouter()
        schema = {
            "content": {"application/json": {"schema": ClassificationRequest.model_json_schema()}}
        }

        @router.post(self.path, openapi_extra={"requestBody": schema})
        async def classify(request: Request) -> dict[str, object]:
            """Return the answer of every input, in their order."""
            body = await read_body(request, ClassificationRequest)
            check_model_name(body.model, self.name)
            inputs = self.parse_inputs(body)
            if len(inputs) > queue.limit:
                raise UserError(
                    f"request, input: {len(inputs)} inputs, {queue.limit} at most in a request"
                )
            answers = await await_unless_abandoned(request, queue.submit(inputs))
            return {
                "model": self.name,
                "results": [self._format_answer(answer) for answer in answers],
            }

        return router

    def _format_answer(self, answer: Answer | list[Answer]) -> dict[str, object]:
        """Format an answer of `MuxPipeline` for JSON.

        Label and score for a text; {"words": [...]} with word, label and score of each for words.
        """
        return {"words": answer} if isinstance(answer, list) else answer
