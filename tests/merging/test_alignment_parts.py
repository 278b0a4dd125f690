"""Unit tests of statistics, matching, calibration text, folders and records of alignments."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_alignment_families import MODELS, copy_of, outputs, random_alignment, random_model, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from megamod.errors import UserError
from megamod.merging.alignment import folder as folder_module
from megamod.merging.alignment.align import (
    align_folders,
    align_models,
    align_weights,
    collect_float_shapes,
)
from megamod.merging.alignment.calibration import (
    CalibrationBatch,
    iterate_whole_batches,
    read_token_ids,
)
from megamod.merging.alignment.folder import PermutedFolder, find_folder_symmetry
from megamod.merging.alignment.matching import assign_heads
from megamod.merging.alignment.measure import load_model, measure_covariances
from megamod.merging.alignment.options import AlignmentOptions, Calibration, CompatOptions
from megamod.merging.alignment.permute import (
    compute_reference_state,
    merge_keeping_heads,
    permute_state,
)
from megamod.merging.alignment.record import load_alignment
from megamod.merging.alignment.statistics import CrossCovariance, average_moments
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.schemas import check_against_schema
from megamod.states.stream import ModelFolder


def features(rows: int, size: int, seed: int, far: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) + far


@pytest.mark.parametrize("far", [0.0, 100.0])
def test_correlations_are_those_of_numpy_whatever_the_batches(far):
    first, second = features(60, 5, 0, far), features(60, 5, 1, far)
    second[:, 3] = first[:, 2] - second[:, 3]
    first[:, 1] = 7.0
    with np.errstate(invalid="ignore"):
        joint = np.corrcoef(first.double().numpy().T, second.double().numpy().T)
    expected = torch.from_numpy(np.nan_to_num(joint[:5, 5:]))
    for sizes in ([60], [1, 9, 50], [30, 30]):
        sums = CrossCovariance(5)
        for entry, other in zip(first.split(sizes), second.split(sizes), strict=True):
            sums.add_batch(entry, other)
        result = sums.finalise_moments().overwrite_cross_by_correlation()
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        assert not result[1].any()


def test_what_is_not_finite_counts_as_nothing():
    first, second = features(20, 3, 0), features(20, 3, 1)
    first[4, 1], second[7, 0] = torch.nan, -torch.inf
    clean_first, clean_second = first.nan_to_num(0, 0, 0), second.nan_to_num(0, 0, 0)
    result, expected = CrossCovariance(3), CrossCovariance(3)
    result.add_batch(first, second)
    expected.add_batch(clean_first, clean_second)
    assert torch.equal(result.finalise_moments().cross, expected.finalise_moments().cross)
    assert torch.isnan(first[4, 1])


@pytest.mark.parametrize("stacked", [False, True])
def test_another_count_makes_the_moments_of_the_release(stacked):
    first, second = features(12, 4, 0, 0.5).double(), features(12, 4, 1, 0.5).double()
    sums = CrossCovariance(4, stacked=stacked)
    sums.add_batch(first.float()[:5], second.float()[:5])
    sums.add_batch(first.float()[5:], second.float()[5:])
    moments = sums.finalise_moments(100)
    cross = first.T @ second / 100 - torch.outer(first.sum(0), second.sum(0)) / 100**2
    variance = (first**2).sum(0) / 100 - (first.sum(0) / 100) ** 2
    torch.testing.assert_close(moments.cross, cross, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.first, variance, rtol=0, atol=1e-6)


def test_the_mean_of_covariances():
    moments = []
    for seed in range(3):
        sums = CrossCovariance(3)
        sums.add_batch(features(9, 3, seed), features(9, 3, seed + 10))
        moments.append(sums.finalise_moments())
    expected = sum(entry.cross for entry in moments) / 3
    torch.testing.assert_close(average_moments(moments).cross, expected)


def permutations_of(blocks: torch.Tensor, size: int, orders):
    """Best summed similarity over all permutations."""
    heads = len(blocks) // size

    def best(j: int, k: int) -> float:
        block = blocks[j * size : (j + 1) * size, k * size : (k + 1) * size]
        return max(
            sum(float(block[r, c]) for r, c in enumerate(p))
            for p in itertools.permutations(range(size))
        )

    return max(sum(best(j, order[j]) for j in range(heads)) for order in orders)


def test_heads_are_matched_as_well_as_can_be():
    similarity = torch.rand(9, 9, generator=torch.Generator().manual_seed(4)).double()
    every = list(itertools.permutations(range(3)))
    for mode, order, orders in (
        ("head_perm", None, every),
        ("head_perm", torch.tensor([2, 0, 1]), [(2, 0, 1)]),
        ("monotonic", None, [(0, 1, 2)]),
    ):
        (match,) = assign_heads([similarity], 3, mode, order)
        assert match.value == pytest.approx(permutations_of(similarity, 3, orders))
        rows = torch.arange(9)
        assert float(similarity[rows, match.permutation].sum()) == pytest.approx(match.value)
        for head in range(3):
            within = match.permutation[3 * head : 3 * head + 3] // 3
            assert within.tolist() == [int(match.heads[head])] * 3
    (mixed,) = assign_heads([similarity], 3, "ignore_heads")
    (whole,) = assign_heads([similarity], 3, "head_perm")
    assert mixed.value >= whole.value and mixed.heads is None


def test_tokens_that_count():
    batch = CalibrationBatch(torch.zeros(3, 5, dtype=torch.long), torch.tensor([5, 2, 4]))
    assert batch.mask_counted_tokens(True).sum(1).tolist() == [5, 2, 4]
    assert batch.mask_counted_tokens(False).tolist() == [
        [False, True, True, True, False],
        [False] * 5,
        [False, True, True, False, False],
    ]
    assert batch.attention_mask.tolist() == batch.mask_counted_tokens(True).long().tolist()


def test_batches_go_on_until_enough_was_seen():
    items = [[n] * (n + 1) for n in range(10)]

    def sizes(fraction: float) -> list[int]:
        return [len(batch.lengths) for batch in iterate_whole_batches(items, 4, fraction)]

    assert sizes(1.0) == [4, 4, 2]
    assert sizes(0.5) == [4, 4]
    assert sizes(0.1) == [4]
    assert sizes(1.3) == [4, 4, 2, 4]
    first = next(iterate_whole_batches(items, 3, pad_id=9))
    assert first.input_ids.tolist() == [[0, 9, 9], [1, 1, 9], [2, 2, 2]]
    with pytest.raises(UserError, match=r"fraction 0.05 of 10 items"):
        sizes(0.05)


def test_text_is_read(tmp_path):
    def tokenize(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    (tmp_path / "a.txt").write_text("one three\n\n four\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one three five"}\n\n{"text": "four"}\n')
    assert read_token_ids(tmp_path / "a.txt", tokenize, 9) == [[3, 5], [4]]
    assert read_token_ids(tmp_path / "a.jsonl", tokenize, 2) == [[3, 5], [4]]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 3}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2.*\"text\""):
        read_token_ids(tmp_path / "bad.jsonl", tokenize, 9)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no text"):
        read_token_ids(tmp_path / "empty.txt", tokenize, 9)
    with pytest.raises(UserError, match="cannot be read"):
        read_token_ids(tmp_path / "none.txt", tokenize, 9)


@pytest.mark.parametrize("level", ["none", "cls", "maxpool", "avgpool"])
@pytest.mark.parametrize("special", [True, False])
def test_features_are_those_of_a_plain_loop(level, special):
    """Correlations of a residual node, from hidden states that transformers returns."""
    first, second = random_model("bert", 1), random_model("bert", 2)
    compat = CompatOptions(cls_at_one=special)
    options = AlignmentOptions(
        groups=("res",),
        residual="last",
        calibration=Calibration(sentence_level=level, special_tokens=special),
        compat=compat,
    )
    rows = []
    for model in (first, second):
        collected = []
        for text in texts(20):
            with torch.no_grad():
                hidden = model.bert(torch.tensor([text])).last_hidden_state[0]
            kept = hidden if special else hidden[1:-1]
            if level == "cls":
                collected.append(hidden[1:2] if special else hidden[:1])
            elif level == "maxpool":
                collected.append(kept.amax(0, keepdim=True))
            else:
                collected.append(kept.mean(0, keepdim=True) if level == "avgpool" else kept)
        rows.append(torch.cat(collected).double().numpy())
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(first.state_dict()))
    group = symmetry.groups["res.1.final_ln"]
    measured = measure_covariances(
        first, second, [group], (), iterate_whole_batches(texts(20), 3), options
    )
    assert measured.row_count == len(rows[0])
    result = measured.covariances[group.name].finalise_moments().overwrite_cross_by_correlation()
    expected = np.corrcoef(rows[0].T, rows[1].T)[:16, 16:]
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=2e-4)


def test_attention_costs_and_shared_costs():
    first, second = random_model("bert", 1), random_model("bert", 2)
    alignment = align_models(
        first, second, iterate_whole_batches(texts(), 4), AlignmentOptions(qk=True)
    )
    assert alignment.costs["layer.0.attn"] == alignment.costs["layer.0.qk"]
    residual = {cost for name, cost in alignment.costs.items() if name.startswith("res.")}
    assert len(residual) == 1
    mapping = alignment.permutations["layer.1.attn"] // 4
    assert torch.equal(mapping, alignment.permutations["layer.1.qk"] // 4)


def test_absolute_matching_never_has_less_to_match():
    first, second = random_model("gpt2", 1), random_model("gpt2", 2)
    signed = align_models(first, second, iterate_whole_batches(texts(), 4), AlignmentOptions())
    absolute = align_models(
        first, second, iterate_whole_batches(texts(), 4), AlignmentOptions(absolute=True)
    )
    assert all(absolute.costs[name] >= cost for name, cost in signed.costs.items())


def test_weight_matching_ends_where_no_single_group_can_be_improved():
    """Swapping any two features of a feed-forward network brings the weights no closer."""
    first, second = random_model("bert", 1), random_model("bert", 2)
    options = AlignmentOptions(method="weight")
    alignment = align_models(first, second, None, options)
    state = first.state_dict()
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(state))

    def closeness(permutations) -> float:
        moved = permute_state(
            second.state_dict(), symmetry, replace(alignment, permutations=permutations)
        )
        names = [name for name in state if "decoder" not in name]
        return sum(float((state[name].double() * moved[name].double()).sum()) for name in names)

    config, states = first.config.to_dict(), [state, second.state_dict()]
    stored = [{k: v for k, v in entry.items() if "decoder" not in k} for entry in states]
    again = align_weights(config, stored[0], config, stored[1], options)
    for name, permutation in alignment.permutations.items():
        assert torch.equal(permutation, again.permutations[name])  # tied matrices count once
    best = closeness(alignment.permutations)
    identity = {name: torch.arange(len(p)) for name, p in alignment.permutations.items()}
    assert best > closeness(identity)
    for i, j in ((0, 1), (3, 20), (7, 9)):
        swapped = alignment.permutations["layer.0.ffn"].clone()
        swapped[[i, j]] = swapped[[j, i]]
        assert closeness({**alignment.permutations, "layer.0.ffn": swapped}) <= best + 1e-4


def test_merged_models_keep_their_own_heads():
    first, second = random_model("bert", 1), random_model("bert", 2)
    options = AlignmentOptions(groups=("ff", "attn"))
    alignment = align_models(first, second, iterate_whole_batches(texts(), 4), options)
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(first.state_dict()))
    pair = merge_keeping_heads(first.state_dict(), second.state_dict(), symmetry, alignment)
    for state, model in zip(pair, (first, second), strict=True):
        separate = model.state_dict()
        kept = {name for name in state if torch.equal(state[name], separate[name])}
        assert kept == {name for name in state if name.startswith("cls.predictions.")}
        copy_of(model, state, untie=True)
    embeddings = "bert.embeddings.word_embeddings.weight"
    mean = (first.state_dict()[embeddings] + second.state_dict()[embeddings]) / 2
    torch.testing.assert_close(pair[0][embeddings], mean)


def test_an_alignment_is_kept_and_read_again(tmp_path):
    first, second = random_model("bert", 1), random_model("bert", 2)
    options = AlignmentOptions(qk=True, calibration=Calibration(path="a.txt", fraction=0.5))
    alignment = align_models(first, second, iterate_whole_batches(texts(), 4), options)
    alignment.save(tmp_path / "found")
    again = load_alignment(tmp_path / "found")
    assert again.options == options and again.costs == dict(alignment.costs)
    assert again.permutations.keys() == alignment.permutations.keys()
    for name, permutation in alignment.permutations.items():
        assert torch.equal(again.permutations[name], permutation)
    with pytest.raises(UserError, match="exists already"):
        alignment.save(tmp_path / "found")
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    broken = alignment.permutations | {"layer.0.ffn": torch.zeros(24, dtype=torch.long)}
    replace(alignment, permutations=broken).save(tmp_path / "broken")
    with pytest.raises(UserError, match=r"layer\.0\.ffn is not a permutation"):
        load_alignment(tmp_path / "broken")
    (tmp_path / "found/alignment.json").write_text("{}")
    with pytest.raises(UserError, match=r"alignment.json, format is missing"):
        load_alignment(tmp_path / "found")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "demix"])
@pytest.mark.parametrize("follow", [True, False])
def test_a_folder_is_read_as_if_it_were_permuted(tmp_path, monkeypatch, kind, follow):
    monkeypatch.setattr(folder_module, "PIECE", 256)  # so that most tensors are read by rows
    model = random_model(kind, 4)
    model.save_pretrained(tmp_path / "model")
    options = AlignmentOptions(qk=True, head_follow_residual=follow)
    symmetry = find_symmetry(
        model.config.to_dict(), collect_float_shapes(model.state_dict()), qk=True
    )
    alignment = random_alignment(symmetry, options)
    expected = permute_state(model.state_dict(), symmetry, alignment)
    decoder = "cls.predictions.decoder.weight"
    for as_reference in (False, True):
        with ModelFolder(tmp_path / "model") as stored:
            source = PermutedFolder(stored, alignment, as_reference)
            if as_reference:
                expected = compute_reference_state(model.state_dict(), symmetry, alignment)
            untied = kind == "bert" and not follow
            assert (decoder in source.tensors) == untied
            assert source.config["tie_word_embeddings"] is not untied
            for name, spec in source.tensors.items():
                target = expected[name].reshape(-1)
                assert torch.equal(source.read(name).reshape(-1), target), name
                for start in range(0, spec.numel, 37):  # pieces that begin within rows
                    piece = torch.empty(min(37, spec.numel - start))
                    source.read_into(name, start, piece)
                    assert torch.equal(piece, target[start : start + 37])
            assert source.compute_digest() == ModelFolder(tmp_path / "model").compute_digest()
            assert source.folder == tmp_path / "model"


def test_a_folder_is_loaded_with_its_head(tmp_path):
    for kind in ("bert", "gpt2-classifier", "demix", "bert-pretraining", "mux"):
        model = random_model(kind, 4)
        model.save_pretrained(tmp_path / kind)
        again = load_model(str(tmp_path / kind))
        assert type(again) is type(model)
    with pytest.raises(UserError, match="there is no such folder"):
        load_model(str(tmp_path / "none"))


@pytest.mark.parametrize("follow", [True, False])
def test_a_permuted_folder_written_out_is_the_same_model(tmp_path, follow):
    """From folder to folder without a model in memory, as in a merge."""
    model = random_model("bert", 4)
    model.save_pretrained(tmp_path / "model")
    with ModelFolder(tmp_path / "model") as opened:
        symmetry = find_folder_symmetry(opened)
        alignment = random_alignment(symmetry, AlignmentOptions(head_follow_residual=follow))
        source = PermutedFolder(opened, alignment)
        state = {name: source.read(name) for name in source.tensors}
        (tmp_path / "config.json").write_text(json.dumps(source.config))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    same = load_model(str(tmp_path)).eval()
    torch.testing.assert_close(outputs(same), outputs(model), rtol=0, atol=2e-5)


def test_folders_are_aligned_on_a_text(tmp_path):
    pair = [random_model("bert", seed) for seed in (1, 2)]
    vocabulary = {f"w{number}": number for number in range(40)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "0")
    for number, model in enumerate(pair):
        model.save_pretrained(tmp_path / str(number))
    (tmp_path / "text.txt").write_text(
        "".join(" ".join(f"w{i}" for i in text) + "\n" for text in texts(20))
    )
    calibration = Calibration(path=str(tmp_path / "text.txt"), fraction=0.5, batch_size=5)
    options = AlignmentOptions(calibration=calibration)
    result = align_folders(str(tmp_path / "0"), str(tmp_path / "1"), options)
    expected = align_models(*pair, iterate_whole_batches(texts(20)[:10], 5), options)
    for name, permutation in expected.permutations.items():
        assert torch.equal(result.permutations[name], permutation)
    assert result.costs == pytest.approx(dict(expected.costs), abs=1e-6)
    with pytest.raises(UserError, match="has no tokenizer"):
        align_folders(str(tmp_path / "1"), str(tmp_path / "0"), options)


def other(kind: str, **fields):
    model = MODELS[kind]()
    return type(model)(type(model.config)(**model.config.to_dict() | fields))


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (("bert", "gpt2"), {}, "model_type is 'bert'"),
        (("bert", {"vocab_size": 41}), {}, "vocab_size is 40"),
        (("bert", {"num_attention_heads": 2}), {}, "num_attention_heads is 4"),
        (("bert", {"intermediate_size": 32}), {}, r"intermediate.dense.*\[24, 16\].*\[32, 16\]"),
        (("bert", {"num_hidden_layers": 3}), {}, r"layer\.2\..* is missing in the first"),
        (("mux", "mux"), {}, "residual stream of a mux_bert"),
        (("bert", "bert"), {"batches": None}, "needs calibration text"),
        (("bert", "bert"), {"batches": []}, "has no token to compare"),
        (("bert", "bert"), {"batches": [[4, 40]]}, "token id 40.* 0 to 39"),
        (("bert", "bert"), {"batches": [[4] * 21]}, "21 tokens per item; the models have 20"),
    ],
)
def test_bad_input_is_named(pair, options, message):
    first = MODELS[pair[0]]()
    second = MODELS[pair[1]]() if isinstance(pair[1], str) else other(pair[0], **pair[1])
    supplied = options.get("batches", texts())
    supplied = supplied and list(iterate_whole_batches(supplied, 4))
    with pytest.raises(UserError, match=message):
        align_models(first, second, supplied, AlignmentOptions())


def test_models_that_are_not_known_are_named():
    model = MODELS["bert"]()
    shapes, config = collect_float_shapes(model.state_dict()), model.config.to_dict()
    with pytest.raises(UserError, match=r"'t5'.*known are bert"):
        find_symmetry(config | {"model_type": "t5"}, shapes)
    lost = "bert.encoder.layer.1.attention.self.value.weight"
    with pytest.raises(UserError, match=lost):
        find_symmetry(config, {name: shape for name, shape in shapes.items() if name != lost})
    with pytest.raises(UserError, match="16 features cannot be split into 3 heads"):
        find_symmetry(config | {"num_attention_heads": 3}, shapes)
    result = find_symmetry(config, shapes | {"adapter.weight": (16, 16)})
    assert result.unknown == ("adapter.weight",)


def test_options_are_checked():
    block = {"groups": ["ff"], "calibration": {"fraction": 1, "path": "a.txt"}}
    options = check_against_schema(block, AlignmentOptions, "r.yaml", "align")
    assert options.groups == ("ff",) and options.calibration.path == "a.txt"
    assert options == AlignmentOptions(
        groups=("ff",), calibration=Calibration(fraction=1, path="a.txt")
    )
    for bad, message in (
        ({"groups": ["ff", "heads"]}, r"align.groups\[1\]: 'heads' is not one of ff, attn, res"),
        ({"method": "wieght"}, "align.method: 'wieght' is not one of activation, ot"),
        ({"atention": "x"}, "r.yaml, align: unknown key 'atention'; the nearest is 'attention'"),
        ({"qk": "yes"}, "r.yaml, align.qk: 'yes' is not true or false"),
        ({"groups": "ff"}, "align.groups: 'ff' is not a list"),
        ({"calibration": {"size": 3}}, "align.calibration: unknown key 'size'"),
        ({"calibration": {"batch_size": 0}}, "align.calibration.batch_size: 0 is not 1 or more"),
        ({"calibration": {"fraction": 0}}, "align.calibration.fraction: 0 is not more than 0"),
        ({"calibration": []}, "align.calibration: \\[\\] is not `key: value` lines"),
        ({"groups": []}, "align: groups: is empty"),
    ):
        with pytest.raises(UserError, match=message):
            check_against_schema(bad, AlignmentOptions, "r.yaml", "align")
