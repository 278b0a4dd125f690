"""Soft assignments and orders of grouped heads, and their effect on weights."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from test_alignment_families import copy_of, random_model, texts
from twins import twin

from megamod.errors import UserError
from megamod.merging.alignment import folder as folder_module
from megamod.merging.alignment import matching
from megamod.merging.alignment.align import align_models, collect_float_shapes
from megamod.merging.alignment.calibration import iterate_whole_batches
from megamod.merging.alignment.folder import PermutedFolder
from megamod.merging.alignment.groups import PermutationGroup, TensorAxis
from megamod.merging.alignment.matching import (
    assign_features,
    assign_query_heads,
    transport_features,
)
from megamod.merging.alignment.options import AlignmentOptions, CompatOptions
from megamod.merging.alignment.permute import AxisChange, apply_changes, permute_state
from megamod.merging.alignment.record import load_alignment
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.schemas import check_against_schema
from megamod.states.stream import ModelFolder


def similarity_of(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(size, size, generator=generator, dtype=torch.float64) - 1


def test_transport_is_what_plain_sinkhorn_gives():
    similarity = similarity_of(7)
    kernel = (similarity / 0.3).exp()
    rows, columns = torch.ones(7).double(), torch.ones(7).double()
    for _ in range(5000):
        rows = 1 / (kernel @ columns)
        columns = 1 / (kernel.T @ rows)
    plain = rows[:, None] * kernel * columns
    match = transport_features(similarity, 0.3)
    torch.testing.assert_close(match.permutation, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(match.permutation.sum(1), torch.ones(7).double())
    torch.testing.assert_close(match.permutation.sum(0), torch.ones(7).double(), rtol=0, atol=1e-5)
    assert match.value == pytest.approx(float((plain * similarity).sum()), abs=1e-5)


def test_transport_goes_from_the_mean_to_the_assignment():
    pairs = torch.randperm(9, generator=torch.Generator().manual_seed(6))
    similarity = 0.4 * similarity_of(9, seed=1) + torch.eye(9).double()[pairs]
    hard = torch.eye(9).double()[assign_features(similarity).permutation]
    assert torch.equal(hard.argmax(1), pairs)
    torch.testing.assert_close(
        transport_features(similarity, 5e-3).permutation, hard, rtol=0, atol=1e-3
    )
    even = transport_features(similarity, 1e4).permutation
    torch.testing.assert_close(even, torch.full((9, 9), 1 / 9).double(), rtol=0, atol=1e-4)


def test_what_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(matching, "_ROUNDS", 3)
    with pytest.raises(UserError, match=r"align.regularisation: with 0.01 the sums are off by"):
        transport_features(similarity_of(8), 0.01)


def test_a_permutation_as_a_matrix_does_the_same():
    tensor, index = torch.randn(8, 6), torch.randperm(5)
    matrix = torch.eye(5).double()[index]
    for axis, start in ((0, 2), (1, 1)):
        hard, soft = (
            apply_changes(tensor, [AxisChange(axis, start, entry)]) for entry in (index, matrix)
        )
        assert torch.equal(hard, soft)
    weights = torch.rand(6, 6).double()
    built, read = torch.randn(6, 4), torch.randn(3, 6)
    torch.testing.assert_close(
        apply_changes(built, [AxisChange(0, 0, weights)]), (weights @ built.double()).float()
    )
    torch.testing.assert_close(
        apply_changes(read, [AxisChange(1, 0, weights)]), (read.double() @ weights.T).float()
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_little_soft_is_nearly_hard(kind, tmp_path, monkeypatch):
    first = random_model(kind, seed=2)
    second = twin(first, 4)
    options = AlignmentOptions(method="ot", regularisation=0.08)
    batches = list(iterate_whole_batches(texts(24), 8))
    hard = align_models(first, second, batches, options.model_copy(update={"method": "activation"}))
    soft = align_models(first, second, batches, options)
    for name, matrix in soft.permutations.items():
        assert matrix.shape == (len(matrix), len(matrix))
        assert torch.equal(matrix.argmax(1), hard.permutations[name]), name
        assert soft.costs[name] == pytest.approx(hard.costs[name], abs=0.1)
    heads = soft.permutations["layer.0.attn"].view(4, 4, 4, 4).sum((1, 3))
    assert sorted(heads.flatten().tolist())[:12] == [0] * 12  # whole heads stay together

    state = second.state_dict()
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(state))
    result = permute_state(state, symmetry, soft)
    names = {"bert": "bert.encoder.layer.0.output.dense.weight"}
    name = names.get(kind, "transformer.h.0.mlp.c_proj.weight")
    ffn, res = (soft.permutations[n].float() for n in ("layer.0.ffn", "res.0.final_ln"))
    expected = res @ state[name] @ ffn.T if kind == "bert" else ffn @ state[name] @ res.T
    torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-5)
    near = permute_state(state, symmetry, hard)
    assert all(
        (result[n] - near[n]).abs().mean() < 0.2 for n in result if result[n].is_floating_point()
    )

    soft.save(tmp_path / "alignment")
    again = load_alignment(tmp_path / "alignment")
    assert all(torch.equal(again.permutations[n], m) for n, m in soft.permutations.items())
    # Read from a folder, piece by piece.
    monkeypatch.setattr(folder_module, "PIECE", 64)
    tied = {alias for alias in symmetry.tied if alias in state}
    stored = {n: t.clone().contiguous() for n, t in state.items() if n not in tied}
    second.config.save_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    with ModelFolder(tmp_path) as folder:
        read = PermutedFolder(folder, soft)
        for name in stored:
            assert torch.equal(read.read(name), result[name]), name
            part = torch.empty(min(5, stored[name].numel()), dtype=stored[name].dtype)
            start = stored[name].numel() - len(part)
            read.read_into(name, start, part)
            assert torch.equal(part, result[name].reshape(-1)[start:])


def test_what_cannot_be_soft():
    for options, message in (
        ({"regularisation": 0.0}, "align.regularisation: 0.0 is not more than 0"),
        ({"compat": CompatOptions(unmerge=True)}, "not with method ot"),
    ):
        with pytest.raises(UserError, match=message):
            check_against_schema({"method": "ot", **options}, AlignmentOptions, "r.yaml", "align")
    model = random_model("llama-grouped", 1)
    for options, message in (
        (AlignmentOptions(method="ot"), "align.method: ot: queries and keys of a llama"),
        (
            AlignmentOptions(attention="ignore_heads"),
            "align.attention: ignore_heads: queries and keys",
        ),
        (AlignmentOptions(qk=True), "align.qk: features of queries and keys of a llama"),
    ):
        with pytest.raises(UserError, match=message):
            align_models(model, model, [], options)


GROUP = PermutationGroup(
    "g", "attn", 24, 2, (), (), (), queries_per_key=3
)  # heads of keys, of queries, features


@pytest.mark.parametrize("part", ["features", "queries", "keys", "values"])
def test_parts_of_grouped_heads(part):
    axis = TensorAxis("w", 0, part=part)
    generator = torch.Generator().manual_seed(3)
    order = []
    for key in (1, 0):
        within = torch.randperm(4, generator=generator)
        for query in torch.randperm(3, generator=generator).tolist():
            order += [(key * 3 + query) * 4 + within]
    permutation = torch.cat(order)
    index = GROUP.make_entry_index(axis, permutation)
    assert sorted(index.tolist()) == list(range(GROUP.count_entries(axis)))
    if part == "queries":
        assert (
            torch.equal(index // 4, permutation // 4) and (index % 4).tolist() == [0, 1, 2, 3] * 6
        )
    elif part == "keys":
        assert index.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    elif part == "values":
        assert torch.equal(index, torch.cat([4 + order[0] % 4, order[3] % 4]))
    products = torch.rand(len(index), len(index), generator=generator, dtype=torch.float64)
    pairs = products[torch.arange(len(index)), index].sum()
    spread = GROUP.expand_products_to_features(axis, products)[torch.arange(24), permutation].sum()
    assert float(spread) == pytest.approx(float(pairs))


def test_heads_that_share_keys_are_matched_together():
    similarity = similarity_of(9, seed=5)
    blocks = similarity.view(3, 3, 3, 3).transpose(1, 2)
    every = list(itertools.permutations(range(3)))
    values = {
        (heads, within): sum(float(blocks[a, heads[a], range(3), within].sum()) for a in range(3))
        for heads in every
        for within in every
    }
    match = assign_query_heads(similarity, 3, "head_perm")
    heads = tuple(match.heads.tolist())
    within = tuple((match.permutation[:3] % 3).tolist())
    assert match.value == pytest.approx(values[heads, within])
    assert match.value == pytest.approx(float(similarity[range(9), match.permutation].sum()))
    # No change of either alone is better.
    assert match.value >= max(values[heads, other] for other in every) - 1e-12
    assert match.value >= max(values[other, within] for other in every) - 1e-12
    still = assign_query_heads(similarity, 3, "monotonic")
    assert still.heads.tolist() == [0, 1, 2]
    assert still.value == pytest.approx(max(values[(0, 1, 2), other] for other in every))


@pytest.mark.parametrize("method", ["activation", "weight"])
def test_heads_in_order_stay_so(method):
    first = random_model("llama-grouped", 2)
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(first.state_dict()))
    second = copy_of(first, first.state_dict())
    batches = iterate_whole_batches(texts(12), 6)
    result = align_models(
        first, second, batches, AlignmentOptions(method=method, attention="monotonic")
    )
    for group in symmetry.select_groups("attn"):
        assert result.permutations[group.name].tolist() == list(range(group.size))
