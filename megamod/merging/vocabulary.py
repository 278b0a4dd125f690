"""Union of the vocabularies of several models: the tokens, and the row of each in every model.

As in mergekit, a token that a model lacks gets the row of the base, else the mean of the rows that
models have. The keys of the `tokenizer:` block are those of mergekit.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from megamod.errors import UserError, shorten
from megamod.schemas import Key, Schema

UNION = "union"
"""Value of `tokenizer_source` for the tokens of all models."""
FILE = "tokenizer.json"
Donors = tuple[tuple[int, int], ...]
"""Rows to average, as (number of the model, number of the row); none: zeros."""


class TokenEntry(Schema):
    """Source of the row of a token, as a recipe has it; see `_read_row_origin` for its forms."""

    source: Any
    force: bool = False


class TokenizerBlock(Schema):
    """The `tokenizer:` block of a recipe."""

    source: Any
    tokens: Annotated[dict[Key, TokenEntry], BeforeValidator(lambda value: value or {})] = Field({})


@dataclass(frozen=True)
class RowOrigin:
    """Source of the row of a token, as a recipe sets it.

    Attributes:
        model: number of the input; None: zeros.
        token: token of that model, or number of a row of it; None: the same token.
        force: also replace the row in models that have the token.
    """

    model: int | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class VocabularyRequest:
    """The vocabulary that a recipe asks for.

    Attributes:
        source: number of the input with this vocabulary; None: the union of all.
        origins: sources of the rows of single tokens.
        recipe_key: key in the recipe, for messages.
    """

    source: int | None
    origins: Mapping[str, RowOrigin] = field(default_factory=dict)
    recipe_key: str = "tokenizer_source"


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    Attributes:
        rows: for each model [tokens] int64, its row of each token; -1: the average of its donors'.
        donors: for each model, by id of a token without a row, the rows to average.
        tokenizer: content of the tokenizer.json.
        has_new_tokens: it has tokens that the tokenizer it is made from lacks.
        ids: id of a token in the model with the configuration -> id in the result.
    """

    rows: Sequence[Tensor]
    donors: Sequence[Mapping[int, Donors]]
    tokenizer: Mapping[str, object]
    has_new_tokens: bool
    ids: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.rows[0])

    def renumber_token_ids(self, config: Mapping[str, object]) -> dict[str, object]:
        """Replace ids of special tokens (`..._token_id`) in `config` by ids in the result.

        Returns a copy; tokens that the result lacks become None.
        """

        def find_new_id(value: object) -> object:
            """Return the new id of an id, or of each id of a list; None for a token that the result
            lacks. A value of another type is returned as it is.
            """
            if isinstance(value, list):
                return [find_new_id(entry) for entry in value]
            return self.ids.get(value) if type(value) is int else value

        return {k: find_new_id(v) if k.endswith("_token_id") else v for k, v in config.items()}


@dataclass(frozen=True)
class _TokenizerContent:
    """Tokens of a tokenizer.json.

    Attributes:
        content: content of the file, parsed.
        ids: by token, in the order of the ids.
        added: entries of `added_tokens` by token.
    """

    file: Path
    content: Mapping[str, object]
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, object]]


def read_vocabulary_request(
    block: object, find: Callable[[object, str], int | None], where: str
) -> VocabularyRequest:
    """Look up the models of a recipe's `tokenizer:` block, or of its `tokenizer_source`.

    Args:
        block: a `TokenizerBlock`, or the value of `tokenizer_source`: the name of a model, "union"
            or "base".
        find: takes the name of a model and its key in the recipe, for messages; returns the number
            of the input, None for the union, or raises UserError.
        where: file and key of the block, for messages.
    Raises:
        UserError: naming the key, if its value is of the wrong kind or no model.
    """
    if not isinstance(block, TokenizerBlock):
        return VocabularyRequest(find(block, where), recipe_key=where)
    origins = {
        token: _read_row_origin(entry, find, f"{where}.tokens.{token!r}")
        for token, entry in block.tokens.items()
    }
    return VocabularyRequest(find(block.source, f"{where}.source"), origins, where)


def _read_row_origin(
    entry: TokenEntry, find: Callable[[object, str], int | None], where: str
) -> RowOrigin:
    """Read the model and token whose embedding row a token gets.

    Args:
        entry: a token's entry in the block `tokenizer:`. Its `source` is the name of a model, for
            the row of the same token; `{kind: zero}`; or `{kind: model_token, model: NAME}` with
            `token` or `token_id` for the row of another token.
        find, where: see `read_vocabulary_request`.
    Raises:
        UserError: naming the key, if its value is neither a model, zeros nor a token of a model.
    """
    force, source = entry.force, entry.source
    if not isinstance(source, dict):
        return RowOrigin(_find_model_number(source, find, f"{where}.source"), None, force)
    if source == {"kind": "zero"}:
        return RowOrigin(None, None, force)
    keys = sorted(map(str, source))
    if source.get("kind") != "model_token" or keys not in (
        ["kind", "model", "token"],
        ["kind", "model", "token_id"],
    ):
        raise UserError(
            f"{where}.source: is {shorten(source)}; give a model, {{kind: zero}}, or {{kind: "
            "model_token, model: MODEL, token: WORD}, with token_id in place of token for a number"
        )
    token = source.get("token", source.get("token_id"))
    if not isinstance(token, str) if "token" in source else type(token) is not int or token < 0:
        raise UserError(f"{where}.source.{keys[-1]}: {shorten(token)} is not a word or number")
    return RowOrigin(
        _find_model_number(source["model"], find, f"{where}.source.model"), token, force
    )


def _find_model_number(name: object, find: Callable[[object, str], int | None], where: str) -> int:
    """Find the number of the model of that name, where a recipe does not allow the union.

    Args:
        find, where: see `read_vocabulary_request`.
    Raises:
        UserError: for the union, and for a name that is not that of a model.
    """
    number = find(name, where)
    if number is None:
        raise UserError(f"{where}: is {shorten(name)}; give one of the models")
    return number


def unite_vocabularies(
    request: VocabularyRequest, folders: Sequence[Path], template: int, base: int | None
) -> Vocabulary | None:
    """Build the vocabulary that a recipe asks for; None if all models have it already.

    Tokens of the template (the base, else the first model) keep their ids. New tokens follow in the
    order of the models: first those of base vocabularies, then those that tokenizers have added.
    The tokenizer.json of every model is read.

    Args:
        request: source of the vocabulary and of single rows.
        folders: folders of the models; `template`: number of the one with the configuration.
        base: number of the recipe's `base_model`; None: it has no base.
    Raises:
        UserError: naming the file or token, if a tokenizer cannot be read or a row does not exist.
    """
    plain = request.source is not None and not request.origins
    if plain and not all((folder / FILE).is_file() for folder in folders):
        return None  # tokenizers of other formats are compared by `check_same_token_ids`
    known = [_read_tokenizer_content(folder / FILE) for folder in folders]
    if plain and all(tokenizer.ids == known[0].ids for tokenizer in known):
        return None
    holder = known[template if request.source is None else request.source]
    ids = dict(holder.ids)
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(
            f"{holder.file}: numbers of its {len(ids)} words are not 0 to {len(ids) - 1}, so no "
            "vocabulary can be made of it"
        )
    if request.source is None:
        for added in (False, True):
            for tokenizer in known:
                for token in tokenizer.ids:  # in the order of their ids
                    if (token in tokenizer.added) is added:
                        ids.setdefault(token, len(ids))
    for token in request.origins:
        ids.setdefault(token, len(ids))
    rows = [torch.tensor([t.ids.get(token, -1) for token in ids]) for t in known]
    donors: list[dict[int, Donors]] = [{} for _ in known]
    for token, row in ids.items():
        origin = request.origins.get(token)
        requested = (
            None
            if origin is None
            else _find_requested_row(origin, token, known, request.recipe_key)
        )
        having = tuple((n, t.ids[token]) for n, t in enumerate(known) if token in t.ids)
        if base is not None and token in known[base].ids:
            having = ((base, known[base].ids[token]),)
        for number, tokenizer in enumerate(known):
            if token not in tokenizer.ids or (origin is not None and origin.force):
                rows[number][row] = -1
                donors[number][row] = having if requested is None else requested
    numbers = {number: ids[token] for token, number in known[template].ids.items() if token in ids}
    grown = len(ids) > len(holder.ids)
    return Vocabulary(rows, donors, _build_tokenizer_json(holder, ids, known), grown, numbers)


def _find_requested_row(
    origin: RowOrigin, token: str, known: Sequence[_TokenizerContent], where: str
) -> Donors:
    """Find the row that a recipe names for a token, as donors to average; none: zeros.

    Args:
        token: token of the result, whose row `origin` gives.
        known: tokens of all models.
        where: key of the recipe, for the message.
    Raises:
        UserError: if the model does not have the named token. A row by number is not checked here.
    """
    if origin.model is None:
        return ()
    if isinstance(origin.token, int):
        return ((origin.model, origin.token),)
    source, tokenizer = token if origin.token is None else origin.token, known[origin.model]
    if source not in tokenizer.ids:
        raise UserError(f"{where}, tokens, {token!r}: {tokenizer.file} has no {source!r}")
    return ((origin.model, tokenizer.ids[source]),)


def _read_tokenizer_content(file: Path) -> _TokenizerContent:
    """Read the tokens of a tokenizer.json, added ones included, in the order of their ids.

    Raises:
        UserError: if there is no such file, or it is not one of a tokenizer.
    """
    try:
        content = json.loads(file.read_bytes())
        listed = content["model"]["vocab"]
        if isinstance(listed, list):  # unigrams, each with its score
            listed = {token: number for number, (token, _) in enumerate(listed)}
        added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
        ids = {**listed, **{token: entry["id"] for token, entry in added.items()}}
        ids = dict(sorted(ids.items(), key=lambda item: item[1]))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent}: has no {FILE}, which is needed to unite vocabularies"
        ) from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is not the file of a tokenizer: {error!r}") from error
    return _TokenizerContent(file, content, ids, added)


def _build_tokenizer_json(
    holder: _TokenizerContent, ids: Mapping[str, int], known: Sequence[_TokenizerContent]
) -> dict[str, object]:
    """Build the content of tokenizer.json: the content of `holder`, with new tokens as added
    tokens.

    Tokens in `ids` after the first len(holder.ids) are new. A new token has the settings that
    another tokenizer gives it, else those of a plain one.

    Args:
        holder: tokens of the model whose tokens keep their ids.
        ids: id of each token of the result, in the order of the ids.
        known: tokens of all models.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    plain |= {"special": False}
    entries = list(holder.content.get("added_tokens") or ())
    for token in list(ids)[len(holder.ids) :]:
        like = next((t.added[token] for t in known if token in t.added), plain)
        entries.append({**like, "content": token, "id": ids[token]})
    return {**holder.content, "added_tokens": entries}
