"""Time of scoring a mixture: the whole evaluation against the sum of its experts' own.

    python tests/bench/ensemble.py

Both score the same text with the same models in memory, in turns, on one thread; minima of the
rounds are compared, three times over.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

COST = "mixture / its experts alone"
ROUNDS, REPEATS = 10, 3
EXPERTS = ("law", "med", "code")
BATCH, LENGTH, VOCAB = 4, 256, 16000
SEQUENCES = 4
CPU = torch.device("cpu")


def make_data(folder: Path) -> Path:
    """A data-bin with one domain of random tokens."""
    from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix

    tokens = np.random.default_rng(1).integers(4, VOCAB, SEQUENCES * LENGTH)
    (folder / "text").mkdir(parents=True)
    splits = {}
    for split in ("train", "valid", "test"):
        with IndexedWriter(folder / format_split_prefix("text", split), np.uint16) as writer:
            writer.add_item(tokens)
        splits[split] = {"items": 1, "tokens": len(tokens), "bytes": 9, "max_id": VOCAB - 1}
    header = {"format": 1, "vocab_size": VOCAB, "items": "document", "domains": {"text": splits}}
    header |= {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    (folder / "databin.json").write_text(json.dumps(header))
    return folder


def make_forest(folder: Path) -> Path:
    """A folder of whole models: small ones, with the vocabulary of a real tokenizer."""
    from megamod.models.lm.configuration import DemixConfig
    from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights

    for seed, domain in enumerate(EXPERTS):
        config = DemixConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            domains=list(EXPERTS),
        )
        model = DemixForCausalLM(config)
        initialise_lm_weights(model, seed)
        model.save_pretrained(folder / domain)
    return folder


def measure() -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    from megamod.evaluation.ensemble import MixingProtocol, score_mixtures
    from megamod.evaluation.expert_scores import Experts, ParallelScores
    from megamod.evaluation.held_out_data import HeldOut, iterate_held_out_batches
    from megamod.evaluation.perplexity import sum_batch_nll
    from megamod.mixture.prior import make_uniform_prior
    from megamod.states.forest import open_forest

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, forest = make_data(Path(folder, "bin")), make_forest(Path(folder, "forest"))
        held_out = HeldOut(str(data), ("text",), "test", None, BATCH, "auto", False)
        experts = Experts(open_forest(forest), held_out, CPU)
        source, priors = ParallelScores(experts), {"text": make_uniform_prior(experts.domains)}
        models = list(experts.iterate_loaded_experts(experts.domains))
        any_data = next(iter(experts.data.values()))

        def mixture() -> None:
            score_mixtures(experts, source, ("text",), MixingProtocol(removal_test=True), priors)

        def alone() -> None:
            for expert in models:
                batches = iterate_held_out_batches(any_data, experts.held_out, "text")
                sum_batch_nll(expert.model, batches, expert.member, CPU)

        times: dict[str, list[float]] = {"mixture": [], "alone": []}
        for _ in range(ROUNDS * REPEATS + 1):
            for name, work in (("mixture", mixture), ("alone", alone)):
                started = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - started)
    ours, theirs = times["mixture"][1:], times["alone"][1:]
    pieces = range(0, ROUNDS * REPEATS, ROUNDS)
    ratios = sorted(min(ours[i : i + ROUNDS]) / min(theirs[i : i + ROUNDS]) for i in pieces)
    return {COST: ratios}


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, ratios in measure().items():
        print(f"{name}: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")


if __name__ == "__main__":
    main()
