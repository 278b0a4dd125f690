"""Tiny models as services, clients of their applications, and answers computed without them."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch
from fastapi import FastAPI
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from megamod.evaluation.mux_pipeline import MuxPipeline
from megamod.models.mux.bert import MuxBertForSequenceClassification, MuxBertForTokenClassification
from megamod.models.mux.configuration import MuxBertConfig
from megamod.serving.app import make_app
from megamod.serving.classification import ClassifierService

WORDS = 400
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(WORDS))]
LENGTH = 9
LABELS = {0: "O", 1: "B-A", 2: "I-A"}
SIZE = dict(
    vocab_size=len(VOCAB),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.5,
    pad_token_id=0,
    id2label=LABELS,
)


def make_tokenizer(folder: Path) -> BertTokenizerFast:
    """A tokenizer of the words w0, w1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def make_classifier(instances: int, *, tagger: bool = False) -> torch.nn.Module:
    """A classifier with random weights; N = 1 is a stock one."""
    torch.manual_seed(instances)
    if instances == 1:
        return BertForSequenceClassification(BertConfig(**SIZE)).eval()
    kind = MuxBertForTokenClassification if tagger else MuxBertForSequenceClassification
    return kind(MuxBertConfig(**SIZE, num_instances=instances, cls_token_id=2)).eval()


def make_service(folder: Path, instances: int, max_groups: int, **kind: bool) -> ClassifierService:
    """The service of such a classifier, named "tiny"."""
    model = make_classifier(instances, **kind)
    pipeline = MuxPipeline(model, make_tokenizer(folder), batch_size=max_groups, max_length=LENGTH)
    return ClassifierService(pipeline, "tiny")


def make_text(number: int) -> str:
    """A text of three words that no other number below 144,000 has."""
    return f"w{number % 20} w{20 + number // 20 % 20} w{40 + number // 400}"


class FedRows:
    """The rows that a classifier was fed, and its logits anew, without pipeline and queue.

    Every text must be fed once; copies that fill a group come after it.
    """

    def __init__(self, service: ClassifierService):
        self.model, self.tokenizer = service.pipeline.model, service.pipeline.tokenizer
        self.batches: list[torch.Tensor] = []
        self._positions: dict[tuple[int, ...], tuple[int, int]] = {}
        self._shares: dict[int, torch.Tensor] = {}
        self._handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs) -> None:
        for line, row in enumerate(kwargs["input_ids"].tolist()):
            while row[-1] == 0:
                row.pop()
            self._positions.setdefault(tuple(row), (len(self.batches), line))
        self.batches.append(kwargs["input_ids"])

    def predict(self, text: str) -> dict[str, str | float]:
        """The answer for a text in the company in which it was fed, by a call of the model."""
        self._handle.remove()
        batch, line = self._positions[tuple(self.tokenizer(text)["input_ids"])]
        if batch not in self._shares:
            ids = self.batches[batch]
            with torch.no_grad():
                logits = self.model(input_ids=ids, attention_mask=ids.ne(0).long()).logits
            self._shares[batch] = logits.softmax(-1)
        score, best = self._shares[batch][line].max(-1)
        return {"label": LABELS[int(best)], "score": float(score)}


class InterceptedPipeline:
    """A pipeline that calls `before` with the requests of a batch, which may fail or wait."""

    def __init__(self, pipeline: MuxPipeline, before: Callable[[list], object]):
        self.pipeline, self.before = pipeline, before

    def __call__(self, requests: list) -> list:
        if requests:
            self.before(requests)
        return self.pipeline(requests)

    def __getattr__(self, name: str) -> object:
        return getattr(self.pipeline, name)


def make_tiny_app(service, max_wait: float = 0.02, max_queue: int = 64) -> FastAPI:
    """The application of a service, with short waits."""
    return make_app(service, max_wait=max_wait, max_queue=max_queue)


@asynccontextmanager
async def open_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, whose queue runs."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60) as client,
    ):
        yield client


def read_error(response: httpx.Response, statuses: Sequence[int]) -> str:
    """The sentence of an error response with one of these statuses."""
    assert response.status_code in statuses, (response.status_code, response.text)
    error = response.json()["error"]
    assert error["code"] == response.status_code and error["type"]
    assert "\n" not in error["message"]
    return error["message"]
