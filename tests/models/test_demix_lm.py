import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.models.lm.configuration import UNTIE, DemixConfig
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.models.presets import PRESETS
from megamod.states.weights import extract_expert_weights, write_index, write_weights

DOMAINS = ["law", "med", "code"]
PAD, VOCAB = 1, 30


def config_of(untie: str = "none", **changes) -> DemixConfig:
    shape = dict(vocab_size=VOCAB, hidden_size=12, num_attention_heads=3, num_hidden_layers=4)
    arguments = {
        **shape,
        "max_position_embeddings": 16,
        "domains": DOMAINS,
        "untie": untie,
        **changes,
    }
    return DemixConfig(**arguments)


def make(untie: str = "none", spread: bool = True, **changes) -> DemixForCausalLM:
    """A model whose every parameter is random, experts different."""
    model = DemixForCausalLM(config_of(untie, **changes))
    initialise_lm_weights(model, seed=0)
    if spread:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def forward_of_one(state: dict[str, torch.Tensor], ids: list[int], heads: int) -> torch.Tensor:
    """Logits [L, V] of one sequence without padding, by hand: loops over heads and positions."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    table = state["model.embeddings.tokens.weight"]
    width, length = table.shape[1], len(ids)
    x = width**0.5 * table[ids] + state["model.embeddings.positions.weight"][2 : 2 + length]
    layer = 0
    while f"model.layers.{layer}.attention.q_proj.weight" in state:
        at = f"model.layers.{layer}."
        y = norm(x, at + "attention_norm")
        q, k, v = (linear(y, f"{at}attention.{item}_proj") for item in "qkv")
        mixed, size = torch.zeros_like(q), width // heads
        for head in range(heads):
            part = slice(head * size, head * size + size)
            for i in range(length):
                weights = (k[: i + 1, part] @ q[i, part] / size**0.5).softmax(0)
                mixed[i, part] = weights @ v[: i + 1, part]
        x = x + linear(mixed, at + "attention.out_proj")
        y = linear(norm(x, at + "feed_forward_norm"), at + "feed_forward.fc1")
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + linear(y, at + "feed_forward.fc2")
        layer += 1
    return norm(x, "model.final_norm") @ state.get("lm_head.weight", table).T


@pytest.mark.parametrize("untie", UNTIE)
@torch.no_grad()
def test_every_expert_is_the_hand_written_model_of_its_weights(untie):
    model, ids = make(untie).double(), tokens(2, 7)
    state = dict(model.named_parameters())
    for domain in DOMAINS:
        item = state if untie == "none" else extract_expert_weights(state, domain)
        chosen = None if untie == "none" else domain
        logits = model(ids, domain=chosen).logits
        for row in range(2):
            expected = forward_of_one(item, ids[row].tolist(), heads=3)
            torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


HELD = {
    "none": lambda name: False,
    "feedforward": lambda name: ".fc" in name,
    "feedforward_every_other": lambda name: ".fc" in name and name.split(".")[2] in "13",
    "feedforward_top": lambda name: ".fc" in name and name.split(".")[2] == "3",
    "transformer": lambda name: ".layers." in name,
    "transformer_output": lambda name: ".layers." in name or name.startswith("lm_head"),
    "input_output": lambda name: ".embeddings." in name or name.startswith("lm_head"),
}


@pytest.mark.parametrize("untie", UNTIE)
def test_what_each_value_of_untie_holds_per_domain(untie):
    with torch.device("meta"):
        model = DemixForCausalLM(config_of(untie))
        dense = {name for name, _ in DemixForCausalLM(config_of()).named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    owners: dict[str, list[str | None]] = {}
    for name in names:
        owners.setdefault(convert_to_dense_name(name), []).append(parse_expert_domain(name))
    assert owners.keys() - {"lm_head.weight"} == dense
    assert ("lm_head.weight" in owners) == (untie == "transformer_output")
    for name, result in owners.items():
        assert result == (DOMAINS if HELD[untie](name) else [None])


def count(config: DemixConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DemixForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("preset", "total", "with_8_experts"),
    [
        ("125m", 124_446_720, 521_131_008),
        ("350m", 354_832_384, None),
        ("750m", 758_740_992, None),
        ("1.3b", 1_313_644_544, None),
        ("tiny", None, None),
    ],
)
def test_parameters_of_the_presets(preset, total, with_8_experts):
    shape = PRESETS["demix"][preset]
    layers, width, vocab = shape["num_hidden_layers"], shape["hidden_size"], 50264
    formula = vocab * width + 1026 * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert count(DemixConfig(**shape)) == formula and total in (None, formula)
    feed_forward = layers * (8 * width**2 + 5 * width)
    experts = count(DemixConfig(**shape, domains=list("abcdefgh"), untie="feedforward"))
    assert experts == formula + 7 * feed_forward and with_8_experts in (None, experts)


def test_totals_of_the_table_with_eight_experts():
    rounded = {"350m": 1.765, "750m": 3.931, "1.3b": 6.953}
    for preset, billions in rounded.items():
        config = DemixConfig(
            **PRESETS["demix"][preset], domains=list("abcdefgh"), untie="feedforward"
        )
        assert round(count(config) / 1e9, 3) == billions


@pytest.mark.parametrize("untie", ["none", "feedforward"])
def test_sdpa_and_eager_agree(untie):
    ids, results = tokens(2, 9), []
    for implementation in ("sdpa", "eager"):
        model = make(untie, attn_implementation=implementation)
        output = model(ids, labels=ids, domain="med" if untie != "none" else None)
        output.loss.backward()
        results.append([output.loss, *(p.grad for p in model.parameters())])
    for first, other in zip(*results, strict=True):
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_padding_changes_nothing_for_real_tokens():
    model = make()
    rows = [tokens(1, length, seed=length) for length in (3, 5, 8)]
    for side in ("left", "right"):
        batch, mask = torch.full((3, 8), PAD), torch.zeros(3, 8, dtype=torch.long)
        for number, row in enumerate(rows):
            length = row.shape[1]
            folder = slice(8 - length, 8) if side == "left" else slice(0, length)
            batch[number, folder], mask[number, folder] = row[0], 1
        for inputs in (mask, None):  # with a mask, and recognised by the id
            logits = model(batch, attention_mask=inputs).logits
            assert torch.isfinite(logits).all()
            for number, row in enumerate(rows):
                expected = model(row).logits[0]
                torch.testing.assert_close(
                    logits[number, mask[number].bool()], expected, rtol=1e-4, atol=1e-5
                )


@torch.no_grad()
def test_positions_given_without_a_mask_promise_that_nothing_is_padded():
    model, ids = make(), tokens(2, 6)
    torch.testing.assert_close(
        model(ids, position_ids=torch.arange(6).expand(2, 6)).logits, model(ids).logits
    )
    ids[0, 2] = PAD  # then an ordinary token
    shifted = model(ids, position_ids=torch.arange(6).expand(2, 6)).logits
    assert not torch.allclose(shifted[0, 3:], model(ids).logits[0, 3:], atol=1e-4)


@pytest.mark.parametrize("untie", ["none", "feedforward", "transformer", "input_output"])
@torch.no_grad()
def test_generation_with_a_cache_equals_full_passes(untie):
    model = make(untie)
    if untie != "none":
        model.set_domain("code")
    ids = tokens(3, 5)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    ids[1, :1], mask[1, :1] = PAD, 0
    built = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    for number, padding in enumerate((3, 1, 0)):
        row = ids[number, padding:].tolist()
        for _ in range(6):
            scores = model(torch.tensor([row]), use_cache=False).logits[0, -1]
            row.append(int(scores.argmax()))
        assert built[number, padding:].tolist() == row
    sampled = model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False)
    assert sampled.shape == (3, 8)


@torch.no_grad()
def test_a_cache_filled_in_parts_equals_one_pass():
    model, ids = make(), tokens(2, 9)
    cache, logits = None, []
    for part in ids.split([4, 1, 1, 3], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 9
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, model(ids).logits[:, -2:], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients():
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        model = make("feedforward").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, domain="law").loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, other in zip(*gradients, strict=True):
        assert torch.equal(first, other)


def test_hidden_states_are_those_between_the_layers():
    model, ids = make(), tokens(1, 4)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5
    torch.testing.assert_close(states[1], model.model.layers[0](states[0], None))
    normed = model.model.final_norm(model.model.layers[3](states[3], None))
    torch.testing.assert_close(states[4], normed)
    logits = model.lm_head(states[4])
    torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_loss_and_gradients_equal_cross_entropy_on_all_logits(dtype, near):
    ids = tokens(2, 9)
    ids[1, 6:] = PAD
    labels = ids.masked_fill(ids == PAD, -100)
    model, plain = make().to(dtype), make().to(dtype)
    output = model(ids, shift_labels=nn.functional.pad(labels[:, 1:], (0, 1), value=-100))
    output.loss.backward()
    logits = plain(ids).logits.float()[:, :-1]
    scores = logits.log_softmax(-1)
    target = labels[:, 1:]
    picked = scores.gather(2, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
    loss = -picked.sum() / (target != -100).sum()
    loss.backward()
    assert output.logits is None and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, loss, rtol=near, atol=0)
    torch.testing.assert_close(output.token_log_probs[:, :-1], picked, rtol=near, atol=near)
    assert not output.token_log_probs[:, -1].any()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad.float()
        error = (parameter.grad.float() - gradient).norm()
        if "k_proj.bias" not in name:  # zero but for rounding: it shifts all scores alike
            assert error <= near * gradient.norm(), name


def test_labels_shifted_by_the_caller_and_a_count_of_its_own():
    model, ids = make(), tokens(2, 9)
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    inside = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, inside)
    torch.testing.assert_close(
        model(ids, shift_labels=shifted, num_items_in_batch=4).loss, inside * 16 / 4
    )
    nothing = model(ids, shift_labels=torch.full_like(ids, -100)).loss
    assert nothing == 0


@pytest.mark.parametrize("untie", UNTIE)
@torch.no_grad()
def test_a_saved_model_is_the_same_when_loaded(tmp_path, untie):
    model, ids = make(untie), tokens(2, 5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.domains == DOMAINS and loaded.config.untie == untie
    for domain in DOMAINS if untie != "none" else (None,):
        assert torch.equal(loaded(ids, domain=domain).logits, model(ids, domain=domain).logits)
    tied = untie != "transformer_output"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    if tied and untie != "input_output":
        assert loaded.lm_head.weight is loaded.model.embeddings.tokens.weight
    if untie == "input_output":
        for domain in DOMAINS:
            head = loaded.lm_head.experts[domain].weight
            assert head is loaded.model.embeddings.experts[domain].tokens.weight


def test_the_domain_is_chosen_by_name_and_kept():
    model, ids = make("feedforward"), tokens(1, 4)
    with pytest.raises(ValueError, match="choose one of the domains law, med, code"):
        model(ids)
    chosen = model(ids, domain="med").logits
    assert torch.equal(model(ids).logits, chosen)  # from now on
    model.set_domain("law")
    assert not torch.allclose(model(ids).logits, chosen)
    with pytest.raises(ValueError, match="no expert for domain 'news'; there are law, med, code"):
        model.set_domain("news")


def test_a_model_of_some_domains_needs_no_other():
    model = DemixForCausalLM(config_of("feedforward"), local_domains=["med"])
    assert {parse_expert_domain(name) for name, _ in model.named_parameters()} == {None, "med"}
    assert model(tokens(1, 3)).logits.shape == (1, 3, VOCAB)
    with pytest.raises(ValueError, match="there are med"):
        model(tokens(1, 3), domain="law")


@pytest.mark.parametrize("untie", UNTIE)
def test_initial_weights_do_not_depend_on_what_else_is_held(untie):
    whole = dict(make(untie, spread=False).named_parameters())
    for domain in DOMAINS:
        part = DemixForCausalLM(config_of(untie), local_domains=[domain])
        initialise_lm_weights(part, seed=0)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole[name])
    dense = dict(make("none", spread=False).named_parameters())
    for name, parameter in whole.items():  # so experts are equal, and equal to the dense model's
        expected = dense[convert_to_dense_name(name).replace("lm_head", "model.embeddings.tokens")]
        assert torch.equal(parameter, expected)


def test_the_seed_decides():
    model = DemixForCausalLM(config_of())
    tables = []
    for seed in (0, 1, 0, 2**31):
        initialise_lm_weights(model, seed)
        tables.append(model.model.embeddings.tokens.weight.detach().clone())
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[3])


def test_distributions_of_initial_weights():
    model = make(spread=False, hidden_size=96, vocab_size=400, max_position_embeddings=200)
    width, inner = 96, 384
    uniform = lambda bound: bound / 3**0.5  # noqa: E731  (its standard deviation)
    expected = {
        "embeddings.tokens.weight": width**-0.5,
        "embeddings.positions.weight": width**-0.5,
        "attention.q_proj.weight": uniform((6 / (2 * width)) ** 0.5 / 2**0.5),
        "attention.out_proj.weight": uniform((6 / (2 * width)) ** 0.5),
        "feed_forward.fc1.weight": uniform(width**-0.5),
        "feed_forward.fc2.weight": uniform(inner**-0.5),
        "feed_forward.fc1.bias": uniform(width**-0.5),
        "feed_forward.fc2.bias": uniform(inner**-0.5),
        "attention.k_proj.bias": uniform(width**-0.5),
    }
    for suffix, deviation in expected.items():
        result = [p for name, p in model.named_parameters() if name.endswith(suffix)]
        values = torch.cat([p.flatten() for p in result])
        values = values[values != 0]  # rows of padding
        assert abs(values.std() / deviation - 1) < 5 / len(values) ** 0.5, suffix
        assert abs(values.mean()) < 5 * deviation / len(values) ** 0.5, suffix
        if "embeddings" not in suffix:
            assert values.abs().max() <= deviation * 3**0.5 * 1.0001
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        if name.endswith(("norm.bias", "out_proj.bias")):
            assert not parameter.any()
    for table in (model.model.embeddings.tokens, model.model.embeddings.positions):
        assert not table.weight[1].any() and table.weight[0].any()


def test_the_constructor_initialises_alike_with_equal_experts():
    torch.manual_seed(0)
    model = DemixForCausalLM(config_of("feedforward", hidden_size=96, vocab_size=400))
    state = dict(model.named_parameters())
    for name, parameter in state.items():
        if parse_expert_domain(name):
            first = name.replace(f".{parse_expert_domain(name)}.", ".law.")
            assert torch.equal(parameter, state[first])
    tables = model.model.embeddings
    assert not tables.positions.weight[1].any() and not tables.tokens.weight[1].any()
    assert abs(tables.tokens.weight.std() * 96**0.5 - 1) < 0.05
    assert not state["model.layers.0.attention.out_proj.bias"].any()


def test_loading_draws_only_what_the_files_lack(tmp_path):
    model = make("feedforward")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".experts.law." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
    drawn = [loaded[name] for name in weights if ".experts.law.fc1.weight" in name]
    assert len(drawn) == 4 and all(0.2 < tensor.abs().max() < 12**-0.5 for tensor in drawn)


@torch.no_grad()
def test_a_folder_with_an_index_and_a_file_per_expert_is_loaded(tmp_path):
    model, ids = make("feedforward"), tokens(2, 5)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_weights(tmp_path, state, has_experts=True)
    write_index(tmp_path, state, sum(tensor.nbytes for tensor in state.values()))
    model.config.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for domain in DOMAINS:
        assert torch.equal(loaded(ids, domain=domain).logits, model(ids, domain=domain).logits)
