"""Mixtures on saved models: against a plain loop, and the ways of scoring against each other."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from saved_models import LENGTH, TOKENS, VOCAB, make_data, make_model

from megamod.data.corpus.indexed import IndexedDataset, format_split_prefix
from megamod.errors import UserError
from megamod.evaluation import expert_scores
from megamod.evaluation.ensemble import MixingProtocol, estimate_priors, score_mixtures
from megamod.evaluation.expert_scores import (
    Experts,
    ParallelScores,
    SequentialScores,
    TextSelection,
    list_expert_files,
)
from megamod.evaluation.held_out_data import HeldOut, find_document_end_id
from megamod.evaluation.model_folders import find_saved_models, score_models
from megamod.mixture.ensemble import PosteriorRule
from megamod.mixture.prior import Prior
from megamod.models.lm.demix import DemixForCausalLM
from megamod.states.forest import Expert, open_forest
from megamod.states.weights import read_weights, write_index, write_weights

CPU = torch.device("cpu")
# Domain, folder, member: two whole models and one expert of a DEMix model.
TREES = (("law", "whole/law", None), ("art", "demix", "art"), ("code", "whole/code", None))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    make_data(folder / "bin")
    make_model(folder / "demix", untie="feedforward")
    make_model(folder / "whole/law")
    make_model(folder / "whole/code", max_position_embeddings=LENGTH + 3)
    entries = [{"domain": d, "path": path, "member": m} for d, path, m in TREES]
    (folder / "forest.json").write_text(json.dumps({"format": 1, "experts": entries}))
    return folder


def held_out(root: Path, **fields) -> HeldOut:
    output = HeldOut(str(root / "bin"), ("law", "code"), "test", None, 4, "auto", False)
    return replace(output, **fields)


def experts_of(root: Path, forest: str = "forest.json", only=None, **fields) -> Experts:
    return Experts(open_forest(root / forest), held_out(root, **fields), CPU, only)


def numbers(results) -> dict[str, object]:
    """Everything that a way of scoring must agree on."""
    return {
        domain: {
            "prior": result.prior.weights if result.prior else (),
            "single": {name: score.nll for name, score in result.single.items()},
            "modes": {name: score.nll for name, score in result.modes.items()},
            "without": {name: score.nll for name, score in result.without.items()},
            "tokens": [score.tokens for score in result.modes.values()],
            "posterior": result.posterior,
            "last": result.lines[-1]["posterior"],
            "lines": len(result.lines),
        }
        for domain, result in results.items()
    }


def agree(ours: object, theirs: object) -> None:
    """Nested numbers are equal to 1e-6."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            agree(ours[key], theirs[key])
    else:
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


PROTOCOLS = [
    MixingProtocol(prior_sequences=5, removal_test=True),
    MixingProtocol(rule=PosteriorRule("history", 1.5, 0.9), topk=2, prior_sequences=3),
    MixingProtocol("updating_prior", rule=PosteriorRule("history"), batch=1),
    MixingProtocol(topk=1, prior_sequences=3),
    MixingProtocol(topk=2, rule=PosteriorRule(first_over_all=True), prior_sequences=3),
]


def score_on_a_rank(rank: int, root: Path) -> list[dict[str, object]]:
    experts = experts_of(root)
    source, domains = ParallelScores(experts), ("law", "code")
    return [numbers(score_mixtures(experts, source, domains, protocol)) for protocol in PROTOCOLS]


def test_two_ranks_one_process_and_one_expert_at_a_time_agree(root):
    ranks = on_ranks(2, score_on_a_rank, root)
    for number, protocol in enumerate(PROTOCOLS):
        experts = experts_of(root)
        alone = numbers(
            score_mixtures(experts, SequentialScores(experts), ("law", "code"), protocol)
        )
        agree(ranks[0][number], alone)
        agree(ranks[1][number], alone)


def test_all_in_memory_is_one_expert_at_a_time(root):
    for protocol in PROTOCOLS:
        experts = experts_of(root)
        apart = numbers(
            score_mixtures(experts, SequentialScores(experts), ("law", "code"), protocol)
        )
        agree(
            numbers(score_mixtures(experts, ParallelScores(experts), ("law", "code"), protocol)),
            apart,
        )


@torch.no_grad()
def by_logits(root: Path, domain: str, split: str) -> list[list[list[float]]]:
    """Log-probabilities by sequence, token and expert, from logits, one sequence at a time."""
    dataset = IndexedDataset(root / "bin" / format_split_prefix(domain, split))
    tokens = [int(t) for item in range(len(dataset)) for t in dataset[item]]
    starts = {int(offset) for offset in dataset.offsets}
    models = [(DemixForCausalLM.from_pretrained(root / path), m) for _, path, m in TREES]
    sequences = []
    for start in range(0, len(tokens), LENGTH):
        targets = tokens[start : start + LENGTH]
        first = 2 if start in starts else tokens[start - 1]
        inputs = torch.tensor([[first, *targets[:-1]]])
        every = [m(inputs, domain=d).logits[0].double().log_softmax(-1) for m, d in models]
        sequences.append(
            [[float(entry[t, target]) for entry in every] for t, target in enumerate(targets)]
        )
    return sequences


def mixed_by_hand(sequences, prior, rule: str) -> tuple[float, list[list[float]]]:
    """Summed nll of the mixture, and the posterior at the last token of each sequence."""
    nll, finals = 0.0, []
    for tokens in sequences:
        belief = list(prior)
        for t, log_probs in enumerate(tokens):
            if rule == "last_token" and t == 0:
                weights = [1 / len(prior)] * len(prior)
            else:
                weights = [share / sum(belief) for share in belief]
            nll -= math.log(sum(w * math.exp(p) for w, p in zip(weights, log_probs, strict=True)))
            before = prior if rule == "last_token" else weights
            belief = [b * math.exp(p) for b, p in zip(before, log_probs, strict=True)]
        finals.append(weights)
    return nll, finals


@pytest.mark.parametrize("rule", ["last_token", "history"])
def test_the_whole_protocol_by_hand(root, rule):
    prior, average = [1 / 3] * 3, None
    sequences = by_logits(root, "law", "valid")[:5]
    for pair in (sequences[:2], sequences[2:4], sequences[4:]):
        _, finals = mixed_by_hand(pair, prior, rule)
        posterior = [sum(column) / len(finals) for column in zip(*finals, strict=True)]
        old = average or posterior
        average = [0.7 * a + 0.3 * m for a, m in zip(old, posterior, strict=True)]
        prior = average
    expected, _ = mixed_by_hand(by_logits(root, "law", "test"), prior, rule)

    experts = experts_of(root)
    protocol = MixingProtocol(rule=PosteriorRule(rule), prior_sequences=5)
    result = score_mixtures(experts, SequentialScores(experts), ("law",), protocol)["law"]
    assert result.prior.weights == pytest.approx(prior, abs=1e-6)
    assert result.prior.text["sequences"] == 5 and result.prior.text["split"] == "valid"
    assert result.modes["cached_prior"].nll == pytest.approx(expected, rel=1e-6)
    assert result.modes["cached_prior"].tokens == TOKENS["law"]
    uniform, _ = mixed_by_hand(by_logits(root, "law", "test"), [1 / 3] * 3, rule)
    assert result.modes["uniform_prior"].nll == pytest.approx(uniform, rel=1e-6)
    # 3 batches of the estimate and 3 of the test split, the second with running perplexity.
    assert [line["split"] for line in result.lines] == ["valid"] * 3 + ["test"] * 3
    assert result.lines[-1]["ppl"] == result.modes["cached_prior"].perplexity
    assert result.lines[2]["exp_avg_posterior"] == pytest.approx(prior, abs=1e-6)


ALONE = (
    {},
    {"context_window": 3},
    {"block_size": 5, "batch_size": 3},
    {"mask_documents": "true"},
)


@pytest.mark.parametrize("fields", ALONE)
def test_experts_alone_score_as_they_do_without_a_forest(root, fields):
    experts = experts_of(root, **fields)
    protocol = MixingProtocol("simple_average", batch=1)
    results = score_mixtures(experts, SequentialScores(experts), ("law", "code"), protocol)
    output = held_out(root, **fields)
    if "block_size" not in fields:
        output = replace(output, block_size=LENGTH)
    matrix = score_models(find_saved_models(root / "forest.json", output), output, CPU)
    for domain, result in results.items():
        assert result.prior is None and "cached_prior" not in result.modes
        for expert, score in result.single.items():
            theirs = matrix[expert][domain]
            assert score.nll == pytest.approx(theirs.nll, rel=1e-6)
            assert (score.tokens, score.bytes) == (theirs.tokens, theirs.bytes)


def test_each_expert_reads_documents_as_it_was_trained(root, tmp_path):
    """One that was trained with --mask_documents beside one that was not."""
    shutil.copytree(root / "whole", tmp_path / "whole")
    (tmp_path / "whole" / "law" / "run.yaml").write_text("mask_documents: true\n")
    text, nll = TextSelection("law", "test"), {}
    for choice in ("auto", "true", "false"):
        fields = held_out(root, mask_documents=choice)
        experts = Experts(open_forest(tmp_path / "whole"), fields, CPU)
        for source in (SequentialScores(experts, tmp_path), ParallelScores(experts)):
            batches = list(source.iterate_batches(text, experts.domains, 4))
            scores = torch.cat([log_probs for log_probs, _ in batches], 1).sum((1, 2))
            nll[choice] = dict(zip(experts.domains, scores.tolist(), strict=True))
    for domain, trained in (("law", "true"), ("code", "false")):
        assert nll["auto"][domain] == pytest.approx(nll[trained][domain], rel=1e-6)
        assert abs(nll["true"][domain] - nll["false"][domain]) > 1e-2
    with pytest.raises(UserError, match="attention of a mamba cannot stop"):
        config = type("Config", (), {"model_type": "mamba"})()
        path = experts.forest.experts[0].path
        find_document_end_id(
            path, config, experts.data[path], held_out(root, mask_documents="true")
        )


def test_an_expert_left_out_is_a_forest_without_it(root):
    priors = {"law": Prior(("law", "art", "code"), (0.5, 0.2, 0.3))}
    experts = experts_of(root)
    protocol = MixingProtocol(removal_test=True)
    result = score_mixtures(experts, SequentialScores(experts), ("law",), protocol, priors)["law"]
    assert list(result.without) == ["law", "art", "code"] and result.estimate is None
    fewer = experts_of(root, only=("law", "code"))
    rest = {"law": Prior(("law", "code"), (0.625, 0.375))}
    other = score_mixtures(fewer, SequentialScores(fewer), ("law",), MixingProtocol(), rest)["law"]
    assert result.without["art"].nll == pytest.approx(other.modes["cached_prior"].nll, rel=1e-6)


def test_experts_without_a_prior_are_never_loaded(root, monkeypatch):
    loaded = []

    def watch(forest, device, only):
        loaded.append(tuple(only))
        return plain(forest, device, only)

    plain = expert_scores.load_experts
    monkeypatch.setattr(expert_scores, "load_experts", watch)
    priors = {"law": Prior(("law", "art", "code"), (0.5, 0.1, 0.4))}
    experts = experts_of(root)
    for source in (SequentialScores(experts), ParallelScores(experts)):
        loaded.clear()
        result = score_mixtures(experts, source, ("law",), MixingProtocol(topk=2), priors)["law"]
        assert loaded == [("law", "code")] and list(result.single) == ["law", "code"]
        assert result.prior.weights == pytest.approx((5 / 9, 0, 4 / 9))
        assert result.lines[-1]["posterior"][1] == 0 and len(result.lines[-1]["posterior"]) == 3
    # Without top-k both splits of all domains are scored in one go.
    loaded.clear()
    score_mixtures(experts, SequentialScores(experts), ("law", "code"), MixingProtocol())
    assert loaded == [("law", "art", "code")]
    demix = next(plain(open_forest(root / "demix"), CPU, ["art"])).model
    assert not [name for name, _ in demix.named_parameters() if ".law." in name]


def test_scores_are_found_again(root, tmp_path, monkeypatch):
    experts = experts_of(root)
    fresh = numbers(
        score_mixtures(experts, SequentialScores(experts, tmp_path), ("law",), MixingProtocol())
    )
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6 and all(".tmp" not in file.name for file in files)
    files[0].write_bytes(files[0].read_bytes()[:100])
    other = experts_of(root)
    loaded = []
    plain = expert_scores.load_experts
    monkeypatch.setattr(
        expert_scores, "load_experts", lambda f, d, only: loaded.append(only) or plain(f, d, only)
    )
    again = numbers(
        score_mixtures(other, SequentialScores(other, tmp_path), ("law",), MixingProtocol())
    )
    assert again == fresh and loaded == [["art"]]
    # Another window, another number of sequences: other files.
    score_mixtures(
        other, SequentialScores(other, tmp_path), ("law",), MixingProtocol(prior_sequences=2)
    )
    windowed = experts_of(root, context_window=2)
    score_mixtures(windowed, SequentialScores(windowed, tmp_path), ("law",), MixingProtocol())
    assert len(list(tmp_path.iterdir())) == 6 + 3 + 6


def test_what_decides_an_expert(root):
    names = [file.name for file in list_expert_files(Expert(domain="law", path=root / "whole/law"))]
    assert names == ["config.json", "model.safetensors"]
    folder = root / "split"
    folder.mkdir()
    state = read_weights(root / "demix")
    write_weights(folder, state, has_experts=True)
    write_index(folder, state, sum(tensor.nbytes for tensor in state.values()))
    names = [file.name for file in list_expert_files(Expert(domain="x", path=folder, member="law"))]
    assert names == ["config.json", "expert_law.safetensors", "shared.safetensors"]
    (folder / "expert_law.safetensors").unlink()
    with pytest.raises(UserError, match=r"expert_law\.safetensors is missing"):
        list_expert_files(Expert(domain="x", path=folder, member="law"))


def test_an_expert_whose_logits_are_no_numbers_is_named(root, tmp_path):
    shutil.copytree(root / "whole", tmp_path / "whole")
    state = read_weights(root / "whole" / "code")
    name = next(iter(state))
    state[name] = torch.full_like(state[name], 3e38)  # finite, so it loads; the logits are not
    write_weights(tmp_path / "whole" / "code", state, has_experts=False)
    experts = Experts(open_forest(tmp_path / "whole"), held_out(root), CPU)
    for source in (SequentialScores(experts), ParallelScores(experts)):
        with pytest.raises(UserError, match="expert code gives probabilities that are not numbers"):
            score_mixtures(experts, source, ("law",), MixingProtocol())


def test_domain_tokens_must_be_there_for_all_or_none(root, tmp_path):
    make_model(tmp_path / "law", vocab_size=VOCAB + 3)
    make_model(tmp_path / "code", vocab_size=VOCAB + 3)
    experts = Experts(open_forest(tmp_path), held_out(root), CPU)
    assert experts.load_target_masks(TextSelection("law", "test")).shape == (7, LENGTH - 1)
    scored = list(
        SequentialScores(experts).iterate_batches(TextSelection("law", "test", 3), ("code",), 2)
    )
    assert [item[0].shape for item in scored] == [(1, 2, 7), (1, 1, 7)]
    result = score_mixtures(
        experts, SequentialScores(experts), ("law",), MixingProtocol("uniform_prior")
    )["law"]
    assert result.modes["uniform_prior"].tokens == TOKENS["law"]
    output = replace(held_out(root), block_size=LENGTH)
    matrix = score_models(find_saved_models(tmp_path, output), output, CPU)
    assert result.single["code"].nll == pytest.approx(matrix["code"]["law"].nll, rel=1e-6)


def test_what_does_not_fit_is_told(root):
    with pytest.raises(UserError, match=r"no expert 'novel'; its experts are law, art"):
        experts_of(root, only=("law", "novel"))
    with pytest.raises(UserError, match=r"--domain: .* has no text of 'novel'"):
        experts_of(root, domains=("novel",))
    experts = experts_of(root)
    with pytest.raises(UserError, match="--topk 4: there are 3 experts"):
        priors = {"law": Prior(("law", "art", "code"), (0.5, 0.1, 0.4))}
        score_mixtures(experts, SequentialScores(experts), ("law",), MixingProtocol(topk=4), priors)
    priors = estimate_priors(experts, ParallelScores(experts), ("code",), MixingProtocol())
    assert priors["code"].prior is priors["code"].estimate
