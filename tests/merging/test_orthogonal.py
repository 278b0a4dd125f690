"""Alignment by orthogonal maps: the function stays, known maps come back, records are kept."""

import json

import pytest
import torch
from models.tiny_hosts import tiny_stock
from test_alignment_families import (
    LLAMA,
    MODELS,
    copy_of,
    groups_of,
    outputs,
    random_model,
    texts,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from megamod.errors import UserError
from megamod.merging.alignment.align import align_models, collect_float_shapes
from megamod.merging.alignment.align_orthogonal import rotates_stream
from megamod.merging.alignment.calibration import iterate_whole_batches
from megamod.merging.alignment.folding import find_folding
from megamod.merging.alignment.measure import measure_covariances
from megamod.merging.alignment.options import AlignmentOptions, Calibration
from megamod.merging.alignment.orthogonal import (
    list_observed_parts,
    make_plane_rotations,
    select_head_map_kind,
    solve_head_maps,
    solve_procrustes,
    solve_stream_map,
)
from megamod.merging.alignment.permute import (
    compute_reference_state,
    find_untied_by_alignment,
    merge_states,
    permute_state,
)
from megamod.merging.alignment.record import Alignment, list_aligned_groups, load_alignment
from megamod.merging.alignment.refine import Refinement
from megamod.merging.alignment.symmetry import find_symmetry

OPT = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
    max_position_embeddings=20, word_embed_proj_dim=16,
)  # fmt: skip
MODELS["opt"] = lambda: OPTForCausalLM(OPTConfig(**OPT))
LAYER_NORM = [kind for kind in MODELS if kind.startswith(("gpt2", "dense", "demix", "opt"))]
ALIGNED = ["bert", "gpt2", "opt", "demix", "llama-grouped", "qwen3"]
"""One of each class of maps: alignment is slower than its application, which all are tested for."""
FAMILIES = [*ALIGNED, "dense", "mistral", "qwen2", "mux"]


def batches_of(count: int = 24, seed: int = 0) -> list:
    return list(iterate_whole_batches(texts(count, seed), 8))


def symmetry_of(model):
    return find_symmetry(model.config.to_dict(), collect_float_shapes(model.state_dict()))


def options_of(kind: str, **fields) -> AlignmentOptions:
    return AlignmentOptions(method="orthogonal", groups=groups_of(kind), **fields)


def random_maps(symmetry, options: AlignmentOptions, seed: int = 5) -> Alignment:
    """A random map of every class that keeps the function of the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind, family = select_head_map_kind(symmetry.family), symmetry.family
    permutations, maps = {}, {}
    shared = None
    for group in list_aligned_groups(symmetry, options):
        if group.family in ("res", "head"):
            if rotates_stream(symmetry, options):
                permutations[group.name] = torch.arange(group.size)
                if "res.emb" not in maps:
                    matrix = solve_stream_map(draw(group.size, group.size), not family.rms)[0]
                    maps["res.emb"] = {"stream": matrix[None]}
            else:
                if shared is None:
                    shared = torch.randperm(group.size, generator=generator)
                permutations[group.name] = shared
        elif group.family == "ff":
            permutations[group.name] = torch.randperm(group.size, generator=generator)
            if family.gate:
                signs = torch.where(draw(group.size) < 0, -1.0, 1.0).double()
                maps[group.name] = {"sign": signs[:, None, None]}
        else:
            width, times = group.head_width, group.queries_per_key
            heads = torch.cat([
                k * times + torch.randperm(times, generator=generator)
                for k in torch.randperm(group.heads, generator=generator)
            ])  # fmt: skip
            permutations[group.name] = (heads[:, None] * width + torch.arange(width)).flatten()
            products = draw(group.heads, width, width)
            maps[group.name] = {
                "qk": solve_head_maps(products, kind)[0],
                "values": solve_procrustes(draw(group.heads, width, width))[0],
            }
    return Alignment(permutations, {}, options, maps)


def assert_same_function(model, state, untied: bool) -> None:
    other = copy_of(model, state, untied)
    expected = outputs(model)
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    assert (outputs(other) - expected).abs().max() <= bound


@pytest.mark.parametrize("kind", MODELS)
def test_folded_and_mapped_models_compute_the_same(kind):
    model = random_model(kind, seed=1)
    gains = [n for n in model.state_dict() if n.endswith("norm.weight") or "ln_1.weight" in n]
    with torch.no_grad():
        for name in gains[:1]:
            model.get_parameter(name)[0] = 0
    symmetry, options = symmetry_of(model), options_of(kind)
    built = random_maps(symmetry, options)
    untied = bool(find_untied_by_alignment(symmetry, built))
    for state in (
        compute_reference_state(model.state_dict(), symmetry, built),
        permute_state(model.state_dict(), symmetry, built),
    ):
        assert_same_function(model, state, untied)
    if kind not in LAYER_NORM:  # RMSNorms compute in float32
        return
    model = model.double()
    for function in (compute_reference_state, permute_state):
        other = copy_of(random_model(kind, 1), model.state_dict(), untied).double()
        other.load_state_dict(function(model.state_dict(), symmetry, built))
        expected = outputs(model)
        error = (outputs(other) - expected).abs().max()
        assert error <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_seeds_are_aligned(kind, text):
    first, second = random_model(kind, 1), random_model(kind, 2)
    symmetry = symmetry_of(first)
    alignment = align_models(
        first, second, batches_of() if text else None, options_of(kind, seed=0)
    )
    untied = bool(find_untied_by_alignment(symmetry, alignment))
    state = permute_state(second.state_dict(), symmetry, alignment)
    assert_same_function(second, state, untied)
    for maps in alignment.maps.values():
        for blocks in maps.values():
            error = blocks @ blocks.mT - torch.eye(blocks.shape[1], dtype=torch.float64)
            assert error.abs().max() < 1e-12
    if kind in LAYER_NORM:
        ones = alignment.maps["res.emb"]["stream"].sum(-1) - 1
        assert ones.abs().max() < 1e-12


@pytest.mark.parametrize("kind", [*ALIGNED, "bert-classifier", "llama"])
def test_known_maps_are_found(kind):
    first = random_model(kind, seed=2)
    symmetry, options = symmetry_of(first), options_of(kind)
    built = random_maps(symmetry, options)
    untied = bool(find_untied_by_alignment(symmetry, built))
    second = copy_of(first, permute_state(first.state_dict(), symmetry, built), untied)
    if untied:  # both are untied, so that their shapes agree
        plain = dict(first.state_dict())
        first = copy_of(first, plain, untie=True)
        symmetry = symmetry_of(first)
    alignment = align_models(first, second, batches_of(40), options)
    for name, permutation in built.permutations.items():
        if name != "mlm_head":
            assert torch.equal(alignment.permutations[name], torch.argsort(permutation)), name
    if "res.emb" in built.maps:
        stream = alignment.maps["res.emb"]["stream"][0]
        assert (stream - built.maps["res.emb"]["stream"][0].T).abs().max() < 1e-4
    merged = merge_states(first.state_dict(), second.state_dict(), symmetry, alignment)
    mean = copy_of(first, merged, bool(find_untied_by_alignment(symmetry, alignment)))
    torch.testing.assert_close(outputs(mean), outputs(first), rtol=0, atol=2e-4)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama-grouped"])
def test_a_model_is_mapped_to_itself(kind, text):
    model = random_model(kind, seed=3)
    alignment = align_models(model, model, batches_of() if text else None, options_of(kind))
    for permutation in alignment.permutations.values():
        assert torch.equal(permutation, torch.arange(len(permutation)))
    for maps in alignment.maps.values():
        for blocks in maps.values():
            assert (blocks - torch.eye(blocks.shape[1])).abs().max() < 1e-6


def with_map(built: Alignment, name: str, role: str, blocks: torch.Tensor) -> Alignment:
    maps = {key: dict(value) for key, value in built.maps.items()}
    maps.setdefault(name, {})[role] = blocks
    return Alignment(built.permutations, {}, built.options, maps)


def test_maps_of_other_classes_change_the_function():
    def change(kind: str, name: str, role: str, blocks: torch.Tensor) -> float:
        model = random_model(kind, seed=1)
        symmetry, options = symmetry_of(model), options_of(kind)
        built = with_map(random_maps(symmetry, options), name, role, blocks)
        state = permute_state(model.state_dict(), symmetry, built)
        untied = bool(find_untied_by_alignment(symmetry, built))
        return float((outputs(copy_of(model, state, untied)) - outputs(model)).abs().max())

    generator = torch.Generator().manual_seed(1)
    free = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    # Within heads of a rotary model any matrix; with norms within heads any angle.
    assert change("llama-grouped", "layer.0.attn", "qk", solve_procrustes(free)[0]) > 1e-3
    angles = torch.full((2, 3), 0.7, dtype=torch.float64)
    rotated = make_plane_rotations(angles.cos(), angles.sin())
    assert change("qwen3", "layer.0.attn", "qk", rotated) > 1e-3
    assert change("llama-grouped", "layer.0.attn", "qk", rotated) < 1e-4
    # A map of a stream with LayerNorms that moves ones is refused.
    stream = solve_procrustes(torch.randn(16, 16, generator=generator).double())[0][None]
    with pytest.raises(UserError, match="does not keep the vector of ones"):
        change("gpt2", "res.emb", "stream", stream)
    with pytest.raises(UserError, match="a map qk of 8"):
        change("gpt2", "layer.0.attn", "qk", torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_procrustes_is_the_best_rotation_and_leaves_dead_directions():
    generator = torch.Generator().manual_seed(2)
    products = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    best, value = solve_procrustes(products)
    assert float((best * products).sum()) == pytest.approx(float(value))
    for _ in range(20):
        other = solve_procrustes(torch.randn(7, 7, generator=generator, dtype=torch.float64))[0]
        assert float((other * products).sum()) < float(value)
    flat = products.clone()
    flat[3:], flat[:, 3:] = 0, 0
    flat[:3, :3] = flat[:3, :3] @ flat[:3, :3].T
    assert (solve_procrustes(flat)[0] - torch.eye(7)).abs().max() < 1e-6
    assert torch.equal(solve_procrustes(torch.zeros(3, 3).double())[0], torch.eye(3).double())
    turned, _ = solve_stream_map(products, keeps_ones=True)
    assert (turned.sum(1) - 1).abs().max() < 1e-12


def test_products_of_the_stream_are_those_of_the_folded_model():
    first, second = random_model("gpt2", 1), random_model("gpt2", 2)
    symmetry, options = symmetry_of(first), options_of("gpt2")
    stream = symmetry.select_groups("res")
    observed = [part for group in stream for part in list_observed_parts(group, True)]
    measured = measure_covariances(first, second, observed, (), batches_of(), options)
    folding = find_folding(symmetry)
    folded = []
    for model in (first, second):
        state = model.state_dict()
        new = {n: folding.compute_folded_tensor(n, state.__getitem__) for n in state}
        folded.append(copy_of(model, new, untie=True))
    again = measure_covariances(*folded, stream, (), batches_of(), options)
    for group in stream:
        left = measured.covariances[group.name].finalise_products()
        right = again.covariances[group.name].finalise_products()
        scale = float(left.cross.abs().max())
        assert (left.cross - right.cross).abs().max() < 1e-6 * scale
        torch.testing.assert_close(left.first, right.first, rtol=1e-5, atol=1e-6)


def test_descent_never_falls(monkeypatch):
    import megamod.merging.alignment.weight_descent as descent

    values, real = [], descent._compute_inner_product
    monkeypatch.setattr(
        descent, "_compute_inner_product", lambda *a: values.append(real(*a)) or values[-1]
    )
    align_models(random_model("dense", 1), random_model("dense", 2), None, options_of("dense"))
    pairs = list(zip(values[::2], values[1::2], strict=True))
    # The best match of a unit is never below the present one.
    assert len(pairs) > 20 and all(after >= before - 1e-9 for before, after in pairs)


def test_refinement_lowers_the_loss_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    first, second = random_model("llama-grouped", 1), random_model("llama-grouped", 2)
    plain = align_models(first, second, batches_of(32), options_of("llama-grouped"))
    symmetry = symmetry_of(first)

    def refinement(file=None) -> Refinement:
        return Refinement(first, second, symmetry, plain, batches_of(32), 3, file)

    whole = refinement()
    before = whole._make_initial_state().best_loss
    expected = whole.refine_maps(22)
    file = tmp_path / "progress.safetensors"
    killed, step = refinement(file), Refinement._take_adam_step

    def kill(self, state):
        if state.step == 21:
            raise KeyboardInterrupt
        step(self, state)

    monkeypatch.setattr(Refinement, "_take_adam_step", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.refine_maps(22)
    monkeypatch.setattr(Refinement, "_take_adam_step", step)
    resumed = refinement(file)
    state = resumed._make_initial_state()
    assert state.step == 20 and state.best_loss < before
    again = resumed.refine_maps(22)
    for name, maps in expected.maps.items():
        for role, blocks in maps.items():
            assert torch.equal(blocks, again.maps[name][role])
            error = blocks @ blocks.mT - torch.eye(blocks.shape[1], dtype=torch.float64)
            assert error.abs().max() < 1e-12
    assert not torch.equal(expected.maps["res.emb"]["stream"], plain.maps["res.emb"]["stream"])
    state = permute_state(second.state_dict(), symmetry, again)
    assert_same_function(second, state, untied=True)
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged, remove it to start again"):
        refinement(file).refine_maps(1)


def test_maps_are_kept_and_used_again(tmp_path, monkeypatch):
    first, second = random_model("dense", 1), random_model("dense", 2)
    options = options_of("dense", maps=str(tmp_path / "maps"), refine_steps=1)
    first_time = align_models(first, second, batches_of(), options)
    (folder,) = (tmp_path / "maps").iterdir()
    record = json.loads((folder / "alignment.json").read_text())
    assert (record["format"], record["residual"]) == (2, "rotation")
    monkeypatch.setattr(Refinement, "refine_maps", None)
    again = align_models(first, second, batches_of(), options)
    for name, maps in first_time.maps.items():
        assert all(torch.equal(blocks, again.maps[name][role]) for role, blocks in maps.items())
    more = options_of("dense", maps=str(tmp_path / "maps"))
    align_models(first, second, batches_of(), more)
    align_models(first, second, batches_of(seed=1), more)
    align_models(first, random_model("dense", 4), batches_of(), more)
    align_models(first, second, None, more)
    assert len(list((tmp_path / "maps").iterdir())) == 5
    maps = {"res.emb": {"stream": 2 * first_time.maps["res.emb"]["stream"]}}
    Alignment(first_time.permutations, {}, first_time.options, maps).save(tmp_path / "wrong")
    with pytest.raises(UserError, match=r"res\.emb:stream is not made of orthogonal matrices"):
        load_alignment(tmp_path / "wrong")


def other_llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**LLAMA | fields))


@pytest.mark.parametrize(
    ("models", "fields", "message"),
    [
        (("dense", "dense"), {"refine_steps": 1}, "refine_steps: 1 steps need calibration text"),
        (("bert", "bert"), {"refine_steps": 1, "text": 8}, "predicts no next token"),
        (("dense", "dense"), {"text": 1}, "give more text: [0-9]+ tokens, width 16"),
        ((other_llama(rms_norm_eps=1e-3), other_llama()), {}, "rms_norm_eps is 0.001 in the"),
    ],
)
def test_bad_input_is_named(models, fields, message):
    fields = dict(fields)
    text = fields.pop("text", 0)
    first, second = (
        random_model(m, seed) if isinstance(m, str) else m for seed, m in enumerate(models)
    )
    batches = batches_of(text) if text else None
    with pytest.raises(UserError, match=message):
        align_models(first, second, batches, AlignmentOptions(method="orthogonal", **fields))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_streams_between_post_norms_are_permuted(kind, tmp_path):
    first, second = random_model(kind, 1), random_model(kind, 2)
    symmetry, plain = symmetry_of(first), AlignmentOptions(groups=groups_of(kind))
    alignment = align_models(first, second, batches_of(), options_of(kind), descent_rounds=0)
    by_activation = align_models(first, second, batches_of(), plain)
    applied = alignment.find_applied_permutations(symmetry)
    for name, expected in by_activation.find_applied_permutations(symmetry).items():
        assert name.endswith("attn") or torch.equal(applied[name], expected), name
    assert alignment.maps.keys() == {f"layer.{layer}.attn" for layer in range(2)}
    for maps in alignment.maps.values():
        assert maps.keys() == {"qk", "values"}
        assert all((blocks - torch.eye(4)).abs().max() > 0.1 for blocks in maps.values())
    assert not find_untied_by_alignment(symmetry, alignment)  # the output matrix stays tied
    state = first.state_dict()  # and no norm is folded
    reference = compute_reference_state(state, symmetry, alignment)
    assert all(torch.equal(tensor, reference[name]) for name, tensor in state.items())
    alignment.save(tmp_path / "maps")
    record = json.loads((tmp_path / "maps" / "alignment.json").read_text())
    assert record["residual"] == "permutation"


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "phi"])
def test_other_families_are_refused(kind):
    model = tiny_stock(kind)
    with pytest.raises(UserError, match=f"model_type '{kind}': cannot be aligned; known are bert"):
        align_models(model, model, None, AlignmentOptions(method="orthogonal"))


def test_models_that_are_not_described_are_refused():
    mux = random_model("mux", 1)
    with pytest.raises(UserError, match="residual stream of a mux_bert cannot be permuted; leave"):
        align_models(mux, mux, None, AlignmentOptions(method="orthogonal"))
    model = OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False))
    with pytest.raises(UserError, match="do_layer_norm_before is False; only True can be"):
        align_models(model, model, None, options_of("opt"))
    llama = other_llama()
    llama.config.partial_rotary_factor = 0.5
    with pytest.raises(UserError, match=r"partial_rotary_factor is 0\.5"):
        align_models(llama, llama, None, options_of("llama"))
    spoilt = random_model("dense", 1)
    spoilt.model.final_norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"final_norm\.weight: holds values that are not finite"):
        align_models(random_model("dense", 2), spoilt, None, options_of("dense"))
    with pytest.raises(ValueError, match="ignore_heads mixes heads"):
        AlignmentOptions(method="orthogonal", attention="ignore_heads", calibration=Calibration())
