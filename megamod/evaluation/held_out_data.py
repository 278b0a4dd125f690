"""Held-out text of a data-bin as a language model reads it: sequences, domain tokens, context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.data.lm.batches import iterate_eval_batches
from megamod.data.lm.blocks import TokenBlocks
from megamod.data.lm.databin import DataBin
from megamod.data.lm.pretraining import LmData
from megamod.errors import UserError
from megamod.evaluation.perplexity import Batch, prepend_context
from megamod.models.auto import check_document_masking
from megamod.models.lm.configuration import (
    DemixConfig,
    LmConfig,
    get_default_sequence_length,
    get_domains,
    get_max_sequence_length,
)
from megamod.run_recipe import read_run_recipe
from megamod.states.token_ids import check_same_token_ids
from megamod.states.tokenizer_files import find_tokenizer_folder


@dataclass(frozen=True)
class HeldOut:
    """Domains of one split of a data-bin, and how models read them.

    Attributes:
        path: folder of the data-bin.
        domains: names of the columns of a matrix of scores.
        split: "train", "valid" or "test".
        block_size: tokens per sequence; None: the model's longest.
        batch_size: sequences per batch.
        domain_token: "true" starts sequences with the token of the domain, "false" does not, "auto"
            does if the model's vocabulary includes such tokens.
        own_only: score each expert on its own domain only.
        experts: experts to score, of models that have several; None: all.
        context_window: preceding tokens that are read with each sequence and not scored; sequences
            are shorter by as many.
        force_domain_token: domain whose token starts all sequences; None: the domain of the text.
        mask_documents: "true" if attention stops at the ends of documents, "false" if not, "auto":
            as in the training of each model.
        verify: see `DataBin`.
    """

    path: str
    domains: Sequence[str]
    split: str
    block_size: int | None
    batch_size: int
    domain_token: str
    own_only: bool
    experts: Sequence[str] | None = None
    context_window: int = 0
    force_domain_token: str | None = None
    mask_documents: str = "auto"
    verify: str = "sample"


def open_held_out_data(folder: Path, config: LmConfig, held_out: HeldOut) -> LmData:
    """Open the data-bin as the model in `folder` reads it.

    Sequences start with domain tokens if the model's vocabulary includes them, unless
    `held_out.domain_token` is "false". The default length of a sequence is that of the model.

    Args:
        folder: folder of the model, for its tokenizer and for messages.
        config: configuration of the model.
        held_out: the data-bin and the settings of reading.
    Raises:
        UserError: if tokenizer, vocabulary, domains or sequence length do not match.
    """
    databin = DataBin(held_out.path, held_out.verify)
    check_tokenizer_matches(folder, databin, "--model")
    block_size = held_out.block_size or get_default_sequence_length(config)
    longest = get_max_sequence_length(config)
    if longest is not None and block_size > longest:
        raise UserError(
            f"--max_seq_length {block_size}: the model in {folder} has {longest} positions"
        )
    vocabulary, domains = databin.vocab_size, get_domains(config)
    stock = config.model_type != DemixConfig.model_type
    with_tokens = vocabulary + len(domains)
    if stock and config.vocab_size < vocabulary:
        raise UserError(
            f"--model {folder} has a vocabulary of {config.vocab_size}; --data {held_out.path} "
            f"needs {vocabulary}"
        )
    if not stock and config.vocab_size not in (vocabulary, with_tokens):
        raise UserError(
            f"--model {folder} has a vocabulary of {config.vocab_size}; --data {held_out.path} "
            f"needs {vocabulary}, or {with_tokens} with a token for each of the model's "
            f"{len(domains)} domains"
        )
    has_domain_tokens = config.vocab_size > vocabulary and not stock
    if held_out.domain_token == "true" and not has_domain_tokens:
        raise UserError(
            f"--domain_token true: the model in {folder} has no domain tokens, its vocabulary of "
            f"{config.vocab_size} is that of the data"
        )
    forced = held_out.force_domain_token
    if forced is not None and (not has_domain_tokens or held_out.domain_token == "false"):
        reason = (
            "--domain_token is false"
            if has_domain_tokens
            else f"the model in {folder} has no domain tokens"
        )
        raise UserError(f"--force_domain_token {forced}: {reason}")
    if forced is not None and forced not in domains:
        raise UserError(
            f"--force_domain_token {forced}: the model in {folder} has tokens for "
            f"{', '.join(domains)}"
        )
    domain_token = has_domain_tokens and held_out.domain_token != "false"
    longest = block_size - 1 - domain_token
    if held_out.context_window > longest:
        raise UserError(
            f"--context_window {held_out.context_window}: sequences of {block_size} tokens leave "
            f"room for {longest} at most"
        )
    data = LmData(
        held_out.path,
        # The id of a domain token depends on the index of its name among all training domains.
        domains=domains if domain_token else None,
        block_size=block_size,
        domain_token=domain_token,
        verify=held_out.verify,
    )
    for domain in held_out.domains:
        if domain not in data.databin.domains:
            raise UserError(
                f"--domains: {held_out.path} has no domain {domain!r}; its domains are "
                f"{', '.join(data.databin.domains)}"
            )
        if domain_token and forced is None and domain not in data.domains:
            raise UserError(
                f"--domains: the model in {folder} has no token for {domain!r}; it has "
                f"{', '.join(data.domains)}; --force_domain_token uses one of them"
            )
    return data


def find_document_end_id(
    folder: Path, config: LmConfig, data: LmData, held_out: HeldOut
) -> int | None:
    """Find the id at the end of documents, at which the model's attention stops; None: at none.

    `held_out.mask_documents` decides; with "auto" the recipe of the training run in `folder`, and
    without a recipe attention does not stop.

    Args:
        folder: folder of the model.
        config: configuration of the model.
        data: data that it reads, for the id.
        held_out: its `mask_documents` counts.
    Raises:
        UserError: if the model's family cannot mask documents.
    """
    choice = held_out.mask_documents
    if choice == "auto":
        choice = "true" if read_run_recipe(folder).get("mask_documents") is True else "false"
    if choice == "false":
        return None
    check_document_masking(config)
    return data.special_ids["eos_token_id"]


def check_tokenizer_matches(folder: Path, databin: DataBin, flag: str) -> None:
    """Refuse a model whose tokenizer gives other ids than the tokenizer of the data.

    If one of the two has no tokenizer, nothing is checked.

    Args:
        folder: folder of the model.
        databin: the data, whose tokenizer is in its folder `tokenizer`.
        flag: flag that named the model, for the message.
    Raises:
        UserError: naming both folders and a word.
    """
    tokenizer = databin.path / "tokenizer"
    remedy = f"; preprocess the text with --tokenizer {folder}, or choose another {flag}"
    if tokenizer.is_dir():
        check_same_token_ids(find_tokenizer_folder(folder), tokenizer, remedy)


def open_held_out_blocks(data: LmData, held_out: HeldOut, domain: str) -> TokenBlocks:
    """Open the sequences of a domain's text, without the context that precedes each of them.

    Each is shorter than `data.block_size` by the tokens of context.

    Args:
        data: the data-bin as the model reads it.
        held_out: gives the split.
        domain: domain of the text.
    Raises:
        UserError: if the data-bin has no such domain or split, or a file is missing.
    """
    token = data.domain_tokens.get(held_out.force_domain_token or domain)
    length = data.block_size - held_out.context_window
    return data.databin.open_blocks(domain, held_out.split, length, token)


def iterate_held_out_batches(data: LmData, held_out: HeldOut, domain: str) -> Iterator[Batch]:
    """Yield batches of a domain's sequences in order, each with the context that precedes it.

    Batches are those of `iterate_eval_batches`, `held_out.batch_size` sequences each.

    Args:
        data: the data-bin as the model reads it.
        held_out: gives split, batch size and tokens of context.
        domain: domain of the text.
    Raises:
        UserError: as `open_held_out_blocks`.
    """
    blocks = open_held_out_blocks(data, held_out, domain)
    batches = iterate_eval_batches(blocks, held_out.batch_size)
    leading = int(blocks.domain_token is not None)
    return prepend_context(batches, held_out.context_window, blocks.pad_id, leading)
