"""A forest as one model, against mixtures written out by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from saved_models import VOCAB, make_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from megamod.errors import UserError
from megamod.mixture.posterior import compute_token_weights, mix_log_probs
from megamod.models.lm.configuration import ForestConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.models.lm.forest import ForestForCausalLM
from megamod.models.lm.forest_experts import ModelReader, load_experts
from megamod.states.forest import Expert, Forest, edit_forest

PAD, LONGEST = 1, 24
# Domain, folder, member: two whole models, and two experts of a model whose third is left out.
TREES = (("law", "law", None), ("prose", "mix", "art"), ("sql", "sql", None), ("py", "mix", "code"))
PRIOR = [0.4, 0.3, 0.2, 0.1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forest")
    make_model(folder / "law", max_position_embeddings=LONGEST)
    make_model(folder / "sql", max_position_embeddings=LONGEST, intermediate_size=24)
    make_model(folder / "mix", "feedforward", max_position_embeddings=LONGEST)
    return folder


def forest_of(folder: Path, *domains: str) -> Forest:
    experts = (
        Expert(domain=d, path=folder / part, member=m)
        for d, part, m in TREES
        if d in domains or not domains
    )
    return Forest(folder / "forest.json", tuple(experts))


def forest_model(folder: Path, *domains: str, **fields) -> ForestForCausalLM:
    return ForestForCausalLM.from_experts(forest_of(folder, *domains), ForestConfig(**fields))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def each_alone(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """log-probabilities [B, L, V] of every expert, from its own folder."""
    models = [DemixForCausalLM.from_pretrained(folder / part) for _, part, _ in TREES]
    return [
        model(ids, domain=member).logits.float().log_softmax(-1)
        for model, (_, _, member) in zip(models, TREES, strict=True)
    ]


def by_hand(alone: list[torch.Tensor], row: torch.Tensor, at: int, rule: str) -> torch.Tensor:
    """The mixture's probabilities [V] after the tokens row[: at + 1], by Bayes' rule."""
    belief = PRIOR if rule == "history" or at > 0 else [1 / len(PRIOR)] * len(PRIOR)
    belief = [float(share) for share in belief]
    for position in range(at) if rule == "history" else range(max(0, at - 1), at):
        for expert, log_probs in enumerate(alone):
            belief[expert] *= math.exp(log_probs[position, row[position + 1]])
    return sum(
        share / sum(belief) * log_probs[at].double().exp()
        for share, log_probs in zip(belief, alone, strict=True)
    )


@pytest.mark.parametrize("rule", ["history", "last_token"])
def test_logits_are_the_mixture_by_bayes_rule(folder, rule):
    ids = tokens(2, 7)
    logits = forest_model(folder, rule=rule, prior=PRIOR)(ids).logits
    assert logits.dtype == torch.float32 and logits.shape == (2, 7, VOCAB)
    alone = each_alone(folder, ids)
    for row in range(2):
        for at in range(7):
            hand = by_hand([log_probs[row] for log_probs in alone], ids[row], at, rule)
            torch.testing.assert_close(logits[row, at].double().exp(), hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"prior": PRIOR, "temperature": 2.0, "forgetting": 0.8},
        {"prior": PRIOR, "rule": "last_token"},
        {},
    ],
)
def test_scores_are_those_of_the_posterior_on_the_same_log_probabilities(folder, fields):
    ids = tokens(2, 8, seed=1)
    alone = each_alone(folder, ids)
    following = ids[:, 1:, None]
    scores = torch.stack([log_probs[:, :-1].gather(2, following)[..., 0] for log_probs in alone])
    prior = torch.tensor(fields.get("prior", [0.25] * 4))
    weights = compute_token_weights(
        scores,
        prior,
        rule=fields.get("rule", "history"),
        temperature=fields.get("temperature", 1.0),
        forgetting=fields.get("forgetting", 1.0),
    )
    expected = mix_log_probs(weights, scores)

    labels = ids.clone()
    labels[0, :4] = -100
    model = forest_model(folder, **fields)
    output = model(ids, labels=labels)
    counted = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    expected = F.pad(expected, (0, 1)).where(counted, 0.0)
    torch.testing.assert_close(output.token_log_probs, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(output.loss, -expected.sum() / counted.sum())
    assert torch.equal(output.logits, model(ids).logits) and output.past_key_values is None
    shares = output.log_weights[..., :-1].exp()
    torch.testing.assert_close(shares, weights.exp(), rtol=0, atol=1e-6)
    # The prediction of what follows the last token is scored from the same weights.
    last = torch.tensor([[-100] * 7 + [5], [-100] * 7 + [9]])
    scored = model(ids, shift_labels=last).token_log_probs[:, -1]
    logits = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(scored, torch.stack([logits[0, 0, 5], logits[1, 0, 9]]))


def test_one_expert_is_that_model(folder):
    ids = tokens(2, 6)
    for domain, part, member in TREES:
        model = DemixForCausalLM.from_pretrained(folder / part)
        forest = forest_model(folder, domain)
        alone = model(ids, domain=member).logits.log_softmax(-1)
        assert torch.equal(forest(ids).logits, alone)
        alone = model(ids, labels=ids, domain=member)
        mixed = forest(ids, labels=ids)
        torch.testing.assert_close(mixed.token_log_probs, alone.token_log_probs)
        torch.testing.assert_close(mixed.loss, alone.loss.detach())


@pytest.mark.parametrize("rule", ["history", "last_token"])
def test_padding_on_either_side_changes_nothing(folder, rule):
    model = forest_model(folder, rule=rule, prior=PRIOR, forgetting=0.9)
    short, long = tokens(1, 4), tokens(1, 9, seed=1)
    apart = [model(ids).logits for ids in (short, long)]
    for side, real in (((5, 0), slice(5, 9)), ((0, 5), slice(0, 4))):
        batch = torch.cat([F.pad(short, side, value=PAD), long])
        for mask in (None, (batch != PAD).long()):
            mixed = model(batch, attention_mask=mask).logits
            torch.testing.assert_close(mixed[:1, real], apart[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(mixed[1:], apart[1], rtol=0, atol=1e-5)


def test_a_cache_in_pieces_selected_repeated_and_cropped(folder):
    model = forest_model(folder, prior=PRIOR)
    ids = tokens(3, 9)
    whole = model(ids).logits
    scores = model(ids, labels=ids).token_log_probs
    cache = DynamicCache()
    pieces = [model(ids[:, s], past_key_values=cache).logits for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    cache.crop(-5)
    assert cache.get_seq_length() == 4
    scored = model(ids[:, 4:], labels=ids[:, 4:], past_key_values=cache).token_log_probs
    torch.testing.assert_close(scored, scores[:, 4:], rtol=0, atol=1e-5)
    cache.crop(-3)
    order = torch.tensor([2, 0])
    cache.batch_select_indices(order)
    cache.batch_repeat_interleave(2)
    turned = ids[order].repeat_interleave(2, 0)
    step = model(turned[:, 6:], past_key_values=cache).logits
    expected = whole[order].repeat_interleave(2, 0)[:, 6:]
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-5)


def test_caches_that_do_not_fit_are_refused(folder):
    model = forest_model(folder, "law", "sql")
    with pytest.raises(ValueError, match=r"a cache that grows: DynamicCache\(\)"):
        model(tokens(1, 3), past_key_values=StaticCache(model.parts[0].config, max_cache_len=8))
    cache = model(tokens(1, 3)).past_key_values
    model.set_prior({"law": 1.0})
    with pytest.raises(ValueError, match="has 6 layers, the experts in use need 3"):
        model(tokens(1, 1), past_key_values=cache)


def test_experts_without_weight_do_not_run(folder, monkeypatch):
    ids, ran = tokens(1, 5), []
    model = forest_model(folder, prior=PRIOR, topk=2)
    for number, part in enumerate(model.parts):
        forward = part.model.forward
        monkeypatch.setattr(
            part.model, "forward", lambda *a, n=number, f=forward: ran.append(n) or f(*a)
        )
    two = forest_model(folder, "law", "prose", prior=[4 / 7, 3 / 7])(ids).logits
    torch.testing.assert_close(model(ids).logits, two)
    assert ran == [0, 1]
    model.config.topk = 0
    model.set_prior({"py": 0.25, "sql": 0.75})
    ran.clear()
    swapped = forest_model(folder, "sql", "py", prior=[0.75, 0.25])(ids).logits
    torch.testing.assert_close(model(ids).logits, swapped)
    assert ran == [2, 1]
    model.set_prior(None)
    model.config.topk = 1
    with pytest.raises(ValueError, match="topk 1 needs a prior"):
        model(ids)


def test_one_folder_holds_everything_once(folder, tmp_path):
    model = forest_model(folder, prior=PRIOR, rule="last_token", topk=3)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    weights = sum(
        parameter.numel()
        for part in ("law", "sql", "mix")
        for parameter in DemixForCausalLM.from_pretrained(folder / part).parameters()
    )
    assert weights * 4 < (tmp_path / "model.safetensors").stat().st_size < weights * 4 + 20_000
    again = ForestForCausalLM.from_pretrained(tmp_path)
    fields = {name: value for name, value in model.config.to_dict().items() if name[0] != "_"}
    assert fields.items() <= again.config.to_dict().items()
    assert again.domains == ("law", "prose", "sql", "py")
    ids = tokens(2, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, again(ids).logits
    )


def test_the_folder_of_a_forest_is_a_model(folder, tmp_path):
    with edit_forest(tmp_path) as experts:
        experts += forest_of(folder).experts
    uniform = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert uniform.domains == ("law", "prose", "sql", "py") and uniform.config.prior is None
    settings = {"model_type": "demix_forest", "prior": PRIOR}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ids = tokens(2, 5)
    expected = forest_model(folder, prior=PRIOR, rule="last_token")(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, rule="last_token")
    assert isinstance(model, ForestForCausalLM) and not model.training
    assert torch.equal(model(ids).logits, expected)
    for loader in (ForestForCausalLM, AutoModelForCausalLM):
        half = loader.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation="eager", prior=None
        )
        assert half.dtype == half.config.dtype == torch.bfloat16
        assert half.parts[0].config._attn_implementation == "eager"
        assert half(ids).logits.dtype == torch.float32


def test_experts_one_by_one(folder):
    ids = tokens(1, 5)
    seen = {}
    for loaded in load_experts(forest_of(folder), "cpu"):
        seen[loaded.domain] = (loaded.model, loaded.model(ids).logits)  # the member is chosen
    assert list(seen) == ["law", "prose", "sql", "py"]
    assert seen["prose"][0] is seen["py"][0]
    for (_, logits), alone in zip(seen.values(), each_alone(folder, ids), strict=True):
        torch.testing.assert_close(logits.log_softmax(-1), alone)
    some = list(load_experts(forest_of(folder), "cpu", only_domains=["py", "law"]))
    assert [loaded.domain for loaded in some] == ["law", "py"]
    assert [loaded.member for loaded in some] == [None, "code"]
    with pytest.raises(UserError, match="no expert of domain 'tax'; there are law, prose, sql, py"):
        next(load_experts(forest_of(folder), "cpu", only_domains=["tax"]))


@pytest.mark.parametrize(
    ("part", "member", "message"),
    [
        ("mix", "tax", "no expert of domain 'tax'; available: law, code, art"),
        ("law", "law", "no expert of domain 'law'; available: none, the model is dense"),
        ("mix", None, "`member` must name one of law, code, art"),
        ("nowhere", None, "nowhere: config.json cannot be used"),
    ],
)
def test_experts_that_are_not_there(folder, part, member, message):
    forest = Forest(
        folder / "forest.json", (Expert(domain="x", path=folder / part, member=member),)
    )
    with pytest.raises(UserError, match=message):
        list(load_experts(forest, "cpu"))
    with pytest.raises(UserError, match=message):
        ForestForCausalLM.from_experts(forest)


def test_a_folder_of_another_kind_or_half_a_model_is_refused(folder, tmp_path):
    forest = Forest(tmp_path, (Expert(domain="x", path=tmp_path),))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type 'bert'; a causal language model is needed"):
        ForestForCausalLM.from_experts(forest)
    (tmp_path / "config.json").write_bytes((folder / "mix" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "law/model.safetensors").read_bytes())
    forest = Forest(tmp_path, (Expert(domain="x", path=tmp_path, member="law"),))
    with pytest.raises(UserError, match=r"the weights lack .*feed_forward"):
        ForestForCausalLM.from_experts(forest)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "needs 4 weights"),
        ([0.5, 0.5, 0.5, -0.5], "none negative"),
        ([0.5, 0.5, 0.5, 0.5], "sum to 1"),
        ([0.5, 0.5, 0.0, math.nan], "sum to 1"),
        ({"law": 0.5, "tax": 0.5}, "no expert of domain 'tax'"),
    ],
)
def test_a_prior_must_fit_the_experts(folder, prior, message):
    with pytest.raises(ValueError, match=message):
        forest_model(folder).set_prior(prior)


def test_configurations_that_cannot_be(folder, tmp_path):
    for fields, message in (
        ({"rule": "newest"}, "rule 'newest' is unknown; choose one of last_token, history"),
        ({"temperature": 0}, "temperature 0 must be positive"),
        ({"forgetting": 1.5}, "forgetting 1.5"),
        ({"topk": -1}, "topk -1 is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            ForestConfig(**fields)
    with pytest.raises(ValueError, match="names no experts"):
        ForestForCausalLM(ForestConfig())
    make_model(tmp_path / "big", vocab_size=VOCAB + 1)
    forest = Forest(
        tmp_path, (*forest_of(folder, "law").experts, Expert(domain="x", path=tmp_path / "big"))
    )
    with pytest.raises(ValueError, match=r"vocab_size is one of \[23, 24\]"):
        ForestForCausalLM.from_experts(forest)


def test_a_reader_holds_the_experts_of_its_last_call(folder):
    reader, ids = ModelReader(torch.device("cpu")), tokens(1, 5)

    def domains_of(*members: str) -> set[str]:
        names = dict(reader.read(folder / "mix", members).named_parameters())
        return {name.split(".experts.")[1].split(".")[0] for name in names if ".experts." in name}

    assert domains_of("art") == {"art"} and domains_of() == {"law", "code", "art"}
    assert domains_of("law", "code") == {"law", "code"} and domains_of("art") == {"art"}
    whole = reader.read(folder / "mix")
    assert reader.read(folder / "mix") is whole  # not read again
    expected = DemixForCausalLM.from_pretrained(folder / "mix")(ids, domain="code").logits
    assert torch.equal(whole(ids, domain="code").logits, expected)
