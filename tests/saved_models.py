"""Small data-bins and model folders, and the scores a plain loop gives them."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from megamod.data.corpus.indexed import IndexedDataset, IndexedWriter, format_split_prefix
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM

VOCAB, LENGTH = 23, 8
DOMAINS = ("law", "code", "art")  # not sorted: domain tokens are numbered in sorted order
TOKENS = {"law": 45, "code": 37, "art": 24}  # of the test split
BYTES = {"law": 200, "code": 150, "art": 99}


def make_data(folder: Path) -> Path:
    """A data-bin of random tokens in items of up to seven, each ended by eos (2)."""
    generator = np.random.default_rng(3)
    header = {"format": 1, "vocab_size": VOCAB, "items": "document", "domains": {}}
    header |= {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    for domain in DOMAINS:
        header["domains"][domain] = {}
        for split in ("train", "valid", "test"):
            (folder / domain).mkdir(parents=True, exist_ok=True)
            tokens = generator.integers(4, VOCAB, TOKENS[domain])
            tokens[6::7], tokens[-1] = 2, 2
            items = np.split(tokens, range(7, len(tokens), 7))
            with IndexedWriter(folder / format_split_prefix(domain, split), np.uint16) as writer:
                for item in items:
                    writer.add_item(item)
            header["domains"][domain][split] = {
                "items": len(items),
                "tokens": len(tokens),
                "bytes": BYTES[domain],
                "max_id": VOCAB - 1,
            }
    (folder / "databin.json").write_text(json.dumps(header))
    return folder


def make_model(folder: Path, untie: str = "none", vocab_size: int = VOCAB, **fields) -> Path:
    """A model folder with random weights that differ between experts."""
    settings = dict(domains=list(DOMAINS), max_position_embeddings=LENGTH) | fields
    config = DemixConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        untie=untie,
        **settings,
    )
    model = DemixForCausalLM(config)
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def plain_nll(
    model: DemixForCausalLM, data: Path, domain: str, expert: str | None, token: int | None = None
) -> float:
    """Summed negative log-likelihood (nats) of a test split, one sequence at a time, by logits.

    Args:
        token: domain token in front of every sequence.
    """
    dataset = IndexedDataset(data / format_split_prefix(domain, "test"))
    tokens = [int(t) for item in range(len(dataset)) for t in dataset[item]]
    starts = {int(offset) for offset in dataset.offsets}
    span, total = LENGTH - (token is not None), 0.0
    model.eval()
    for start in range(0, len(tokens), span):
        targets = tokens[start : start + span]
        first = 2 if start in starts else tokens[start - 1]
        inputs = [first, *targets[:-1]]
        if token is not None:
            inputs = [token, *inputs]
        with torch.no_grad():
            logits = model(torch.tensor([inputs]), domain=expert).logits[0, -len(targets) :]
        for row, target in zip(logits.double(), targets, strict=True):
            total -= float(row[target] - row.exp().sum().log())
    return total


def plain_perplexity(model, data: Path, domain: str, expert: str | None, token=None) -> float:
    """exp of the mean of `plain_nll`."""
    return math.exp(plain_nll(model, data, domain, expert, token) / TOKENS[domain])
