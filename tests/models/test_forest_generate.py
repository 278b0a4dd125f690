"""Generation by a forest: one posterior through prompt, cache, beams and padding."""

import pytest
import torch
from saved_models import VOCAB, make_model
from torch.nn import functional as F

from megamod.models.lm.configuration import ForestConfig
from megamod.models.lm.forest import ForestForCausalLM
from megamod.states.forest import Expert, Forest

PAD, NEW = 1, 8
FIELDS = [{}, {"rule": "last_token", "prior": [0.2, 0.5, 0.3]}, {"forgetting": 0.7}]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Forest:
    folder = tmp_path_factory.mktemp("forest")
    make_model(folder / "law", max_position_embeddings=32, eos_token_id=None)
    make_model(folder / "mix", "feedforward", max_position_embeddings=32, eos_token_id=None)
    trees = (("law", "law", None), ("sql", "mix", "code"), ("art", "mix", "art"))
    return Forest(
        folder,
        tuple(Expert(domain=d, path=folder / part, member=member) for d, part, member in trees),
    )


@pytest.fixture(scope="module", params=FIELDS, ids=["history", "last_token", "forgetting"])
def model(request, experts) -> ForestForCausalLM:
    return ForestForCausalLM.from_experts(experts, ForestConfig(**request.param))


def prompts(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_greedy_is_the_best_token_of_the_mixture_each_time(model):
    ids = prompts(2, 5)
    expected = ids
    for _ in range(NEW):
        best = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    for cached in (True, False):
        written = model.generate(ids, max_new_tokens=NEW, use_cache=cached)
        assert torch.equal(written, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0, "temperature": 1.3, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 3},
        {"num_beams": 2, "repetition_penalty": 1.4},
    ],
    ids=["beams", "samples", "sampled beams", "penalty"],
)
def test_the_cache_changes_no_token(model, how):
    ids = prompts(2, 4, seed=1)
    written = []
    for cached in (True, False):
        torch.manual_seed(5)
        written.append(model.generate(ids, max_new_tokens=NEW, use_cache=cached, **how))
    assert torch.equal(*written)
    assert len(written[0]) == 2 * how.get("num_return_sequences", 1)


def test_beams_score_as_the_mixture_does(model):
    """The log-probability a beam was chosen for is what the mixture gives its tokens."""
    ids = prompts(1, 4, seed=2)
    best = model.generate(
        ids, max_new_tokens=NEW, num_beams=5, output_scores=True, return_dict_in_generate=True
    )
    labels = best.sequences.clone()
    labels[:, :4] = -100
    scored = model(best.sequences, labels=labels).token_log_probs.sum() / NEW
    torch.testing.assert_close(best.sequences_scores[0], scored, rtol=0, atol=1e-5)


def test_a_padded_batch_writes_what_each_prompt_writes_alone(model):
    short, long = prompts(1, 3, seed=3), prompts(1, 7, seed=4)
    batch = torch.cat([F.pad(short, (4, 0), value=PAD), long])
    for how in ({}, {"num_beams": 3}):
        alone = [model.generate(ids, max_new_tokens=NEW, **how) for ids in (short, long)]
        written = model.generate(
            batch, attention_mask=(batch != PAD).long(), max_new_tokens=NEW, **how
        )
        assert torch.equal(written[0, 4:], alone[0][0])
        assert torch.equal(written[1], alone[1][0])


def test_guesses_that_are_taken_back_leave_no_trace(model):
    """Prompt lookup guesses several tokens, then crops the cache to those that were right."""
    ids = prompts(1, 3, seed=5).repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, prompt_lookup_num_tokens=3), plain)


def test_a_conversation_goes_on_from_its_cache(model):
    ids = prompts(1, 6, seed=6)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    further = torch.cat([first.sequences, prompts(1, 2, seed=7)], dim=1)
    went_on = model.generate(further, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(went_on, model.generate(further, max_new_tokens=4))


def test_the_prior_steers_what_is_written(experts):
    model = ForestForCausalLM.from_experts(experts)
    ids = prompts(1, 3, seed=8)
    for domain, part in (("law", 0), ("art", 1)):
        model.set_prior({domain: 1.0})
        alone = model.parts[part]
        if part == 1:
            alone.set_domain(domain)
        expected = alone.generate(ids, max_new_tokens=NEW)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW), expected)
