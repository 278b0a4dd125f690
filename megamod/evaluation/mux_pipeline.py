"""Inference with a trained classifier: any number of requests, N of them per forward pass.

    from megamod import MuxPipeline

    classify = MuxPipeline.from_pretrained("runs/sst2/model")
    classify(["a fine film", "a dull one"])     # [{"label": "1", "score": 0.98}, ...]
    classify([("a premise", "a hypothesis")])   # pairs, for a model of pairs
    tag = MuxPipeline.from_pretrained("runs/wnut17/model")
    tag([["Ada", "lives", "in", "London"]])     # [[{"word": "Ada", "label": "B-person", ...}]]

It works like a pipeline of transformers, for multiplexed and for stock models (N = 1). Pipelines of
transformers run multiplexed models too, but do not pad as in training and do not average copies.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from megamod.convert.sources import resolve_model
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.tasks.classification import (
    EncodedRows,
    RowLengthLimits,
    encode_texts,
    encode_words,
    iterate_held_out_rows,
)
from megamod.data.tasks.text_labels import TextSet
from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError
from megamod.evaluation.predict import Predictor, select_word_labels
from megamod.models.classifier_inputs import (
    compute_max_row_tokens,
    list_input_fields,
    needs_fixed_length,
)
from megamod.models.pretrained import check_all_weights_loaded, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Request = str | tuple[str, str] | dict[str, str] | list[str]
Answer = dict[str, str | float]

AUTO = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}


def is_classifier(fields: Mapping[str, object]) -> bool:
    """Return True if the fields of a config.json name a classifier of sequences or tokens."""
    return any(str(name).endswith(tuple(AUTO)) for name in fields.get("architectures") or ())


class MuxPipeline:
    """Pipeline that classifies requests in groups and returns answers in the order of the requests.

    The model is set to evaluation mode. Rows of a multiplexed model are padded to `max_length`;
    copies of requests of the batch fill the last group. So an answer depends on the other requests
    of the call, but on nothing else.

    Args:
        model: a classifier of sequences or tokens, on its device.
        tokenizer: tokenizer of the model.
        batch_size: groups of N rows per forward pass.
        max_length: tokens per row, as in training; longer rows are cut, with a warning.
        ensemble: put every request into N random groups and average its N logits: better answers
            for N times the work.
        seed: seed of these groups.
    Raises:
        ValueError: if the model is not such a classifier, or has no positions for `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        batch_size: int = 8,
        max_length: int = 128,
        ensemble: bool = False,
        seed: int = 0,
    ):
        """Check the model and its limits; see the class for arguments and errors."""
        config, name = model.config, type(model).__name__
        if not name.endswith(tuple(AUTO)):
            raise ValueError(f"{name} is no classifier; their names end in {', '.join(AUTO)}")
        position_limit = compute_max_row_tokens(config)
        if not 3 <= max_length <= position_limit:
            raise ValueError(
                f"max_length {max_length} is not between 3 and {position_limit} positions"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more groups")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.per_token = name.endswith("ForTokenClassification")
        self.num_instances = getattr(config, "num_instances", 1)
        self.batch_size, self.ensemble, self.seed = batch_size, ensemble, seed
        self.lengths = RowLengthLimits(max_length, position_limit, truncate=True)
        self.labels = [config.id2label[number] for number in range(config.num_labels)]
        self._pad_to = max_length if needs_fixed_length(config) else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        flag: str = "source",
        **options: int | bool,
    ) -> "MuxPipeline":
        """Load a pipeline from a model folder or a name on the hub.

        Args:
            source: folder or name of the model.
            tokenizer: folder or name of a tokenizer; None for that of the model.
            device: device that the model runs on.
            flag: option that named the model, for messages.
            options: see the class.
        Raises:
            UserError: if model or tokenizer cannot be loaded, or do not belong to a classifier.
        """
        checked = resolve_model(str(source), flag)
        name = (checked.config.architectures or ["a model of no named architecture"])[0]
        kind = next((kind for kind in AUTO if name.endswith(kind)), None)
        if kind is None:
            raise UserError(f"{flag} {source}: {name} is no classifier; finetune it first")
        model, report = load_pretrained(AUTO[kind], checked.name, flag, config=checked.config)
        check_all_weights_loaded(report, f"{flag} {source}")
        return cls(model.to(device), _load_pipeline_tokenizer(tokenizer or source), **options)

    def __call__(self, requests: Request | list[Request]) -> list[Answer] | list[list[Answer]]:
        """Classify one request, or a list of any number of them.

        Args:
            requests: a list is a list of requests. A classifier of sequences takes texts, or pairs
                as ("...", "...") or {"text": "...", "text_pair": "..."}, but not both in one call.
                A classifier of tokens takes lists of words, or texts to split at blanks, tabs and
                line ends.
        Returns:
            From a classifier of sequences {"label", "score"} of each request, the score being the
            probability, or the value of a regression. From a classifier of tokens a list of
            {"word", "label", "score"} for each request, and only this list for a single request.
            Words that were cut off have the label O, or the first one, and score 0.
        Raises:
            ValueError: naming a request of another kind.
        """
        batch = requests if isinstance(requests, list) else [requests]
        if not batch:
            return []
        self.model.eval()
        if not self.per_token:
            return self._classify_rows(batch)
        answers = self._classify_words(
            [_parse_words(item, f"request {number}") for number, item in enumerate(batch)]
        )
        return answers if isinstance(requests, list) else answers[0]

    def parse_request(self, request: object, where: str) -> Request:
        """Return a request that `__call__` takes in one form: a text, a pair as a tuple, or words.

        Args:
            request: a request in any form that `__call__` takes.
            where: beginning of the message.
        Raises:
            ValueError: if it is no such request.
        """
        if self.per_token:
            return _parse_words(request, where)
        texts = _parse_texts(request, where)
        return texts if len(texts) == 2 else texts[0]

    def _classify_rows(self, requests: Sequence[Request]) -> list[Answer]:
        """Classify texts or pairs; return an answer {"label", "score"} for each, in order.

        Args:
            requests: texts, or pairs of texts.
        Raises:
            ValueError: if a request is neither, or both are in one call.
        """
        rows = [_parse_texts(item, f"request {number}") for number, item in enumerate(requests)]
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"request {number}, {shorten(requests[number])}: give texts or pairs, not both"
                )
        columns = tuple(list(column) for column in zip(*rows, strict=True))
        names = [f"request {number}" for number in range(len(requests))]
        encoded = encode_texts(TextSet(columns, None, names), self.tokenizer, self.lengths)
        return [self._make_answer(logits) for _, logits in self._run_rows(encoded)]

    def _classify_words(self, sentences: list[list[str]]) -> list[list[Answer]]:
        """Label words: for each sentence a list of {"word", "label", "score"}.

        Label and probability of a word are those of its first token. A word beyond `max_length` has
        the label O, or the first label if there is no O, and score 0.
        """
        lines = [[number] * len(words) for number, words in enumerate(sentences)]
        tokens = TokenSet(sentences, None, lines, "requests", "request")
        encoded = encode_words(tokens, self.tokenizer, self.lengths, self.labels)
        best_labels, scores = np.zeros(len(encoded.ids), dtype=np.int64), np.zeros(len(encoded.ids))
        for row, logits in self._run_rows(encoded):
            start, stop = encoded.offsets[row : row + 2]
            token_scores = logits[: stop - start].softmax(-1).max(-1)
            scores[start:stop], best_labels[start:stop] = token_scores.values, token_scores.indices
        answers = []
        for row, labels in enumerate(select_word_labels(encoded, best_labels, self.labels)):
            start = encoded.offsets[row]
            first_tokens = encoded.word_starts[row].tolist()
            word_scores = [
                float(scores[start + first_token]) if first_token >= 0 else 0.0
                for first_token in first_tokens
            ]
            labelled = zip(sentences[row], labels, word_scores, strict=True)
            answers.append([{"word": w, "label": label, "score": x} for w, label, x in labelled])
        return answers

    def _run_rows(self, encoded: EncodedRows) -> Iterator[tuple[int, Tensor]]:
        """Run the model on all rows; yield number and logits of each row in order, on the CPU.

        Logits are [C]; from a classifier of tokens [L, C], padding included.
        """
        predictor = Predictor(self.model, list_input_fields(self.model.config), self.model.device)
        N = self.num_instances
        for held in iterate_held_out_rows(
            encoded, self.batch_size * N, N, self._pad_to, ensemble=self.ensemble, seed=self.seed
        ):
            yield from enumerate(predictor.compute_logits(held), start=held.start)

    def _make_answer(self, logits: Tensor) -> Answer:
        """Make the answer {"label", "score"} from the logits [C] of one row.

        The score is the probability of the best label; with one label, a regression, the value.
        """
        if len(self.labels) == 1:
            return {"label": self.labels[0], "score": float(logits[0])}
        score, best = logits.softmax(-1).max(-1)
        return {"label": self.labels[int(best)], "score": float(score)}


def _load_pipeline_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of an encoder from a folder or the hub.

    Args:
        source: folder or hub name of the model or the tokenizer.
    Raises:
        UserError: if there is none, or it lacks a padding token.
    """
    reason = None
    try:
        tokenizer = load_tokenizer(source).original
    except UserError as error:
        tokenizer, reason = None, error
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"{source} has no tokenizer of an encoder; name one by `tokenizer`"
        ) from reason
    return tokenizer


def _parse_texts(request: object, where: str) -> tuple[str, ...]:
    """Return the text, or the two texts, of a request.

    Args:
        request: a text, a pair, or {"text": ..., "text_pair": ...}.
        where: beginning of the message.
    Raises:
        ValueError: if it is neither a text nor a pair.
    """
    if isinstance(request, dict):
        texts = [request.get("text"), *(request[key] for key in request if key != "text")]
        fits = set(request) in ({"text"}, {"text", "text_pair"})
    else:
        texts = [request] if isinstance(request, str) else request
        fits = isinstance(request, str) or (isinstance(texts, list | tuple) and len(texts) == 2)
    if not fits or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}, {shorten(request)}: neither a text nor a pair of texts")
    return tuple(texts)


def _parse_words(request: object, where: str) -> list[str]:
    """Return the words of a request: a list as it is, or a text split at white space.

    Args:
        request: a list of words, or a text.
        where: beginning of the message.
    Raises:
        ValueError: if it is neither, or has no word.
    """
    words = re.findall(r"[^ \t\r\n]+", request) if isinstance(request, str) else request
    fits = isinstance(words, list | tuple) and all(isinstance(word, str) for word in words)
    if not fits or not words:
        raise ValueError(f"{where}, {shorten(request)}: neither a text nor a list of words")
    return list(words)
