"""Every key of a merge recipe changes something in the result, or is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from megamod.errors import UserError
from megamod.merging.alignment.options import METHODS as ALIGNMENTS
from megamod.merging.alignment.options import AlignmentOptions, Calibration, CompatOptions
from megamod.merging.alignment.permute import merge_states
from megamod.merging.alignment.record import make_identity_alignment
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe
from megamod.states.weights import read_weights

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(15))]
SIZES = dict(vocab_size=20, hidden_size=12, intermediate_size=10, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=3, max_position_embeddings=16)


@pytest.fixture(scope="module")
def models_root(tmp_path_factory) -> Path:
    """Two classifiers of different seeds with a tokenizer, and some text."""
    root = tmp_path_factory.mktemp("keys")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.5))
        model.save_pretrained(root / name)
        BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / name)
    lines = [" ".join(WORDS[5 + (n * k) % 15] for k in range(1, 4 + n % 6)) for n in range(30)]
    (root / "text.txt").write_text("\n".join(lines))
    (root / "short.txt").write_text("\n".join(lines[:7]))
    return root


def outcome(root: Path, tmp_path: Path, name: str, align: dict | None, **more) -> dict | str:
    """Merged tensors of a recipe, or the message of its error."""
    models = [{"model": str(root / n), "parameters": {"weight": 1.0}} for n in "ab"]
    recipe = {"merge_method": "linear", "models": models} | more
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe | ({} if align is None else {"align": align})))
    try:
        merge(read_recipe(file), tmp_path / name)
    except UserError as error:
        assert len(str(error).splitlines()) <= 3
        return str(error)
    return read_weights(tmp_path / name)


def same(entry: dict | str, other: dict | str) -> bool:
    if isinstance(entry, str) or isinstance(other, str):
        return entry is other
    return entry.keys() == other.keys() and all(torch.equal(entry[n], other[n]) for n in entry)


CHANGES = {
    "groups": ["ff"],
    "attention": "monotonic",
    "residual": "last",
    "qk": True,
    "absolute": True,
    "covariance": True,
    "head": True,
    "head_follow_residual": False,
    "seed": 3,
    "regularisation": 1.0,
    "refine_steps": 1,
    "maps": "maps",
    "calibration.path": "short.txt",
    "calibration.fraction": 0.3,
    "calibration.special_tokens": False,
    "calibration.sentence_level": "maxpool",
    **{f"compat.{key}": True for key in vars(CompatOptions())},
}
# What a change of these keys depends on: rounding, the order of a search, a tied matrix, or another
# key; they are refused where they cannot have an effect (see below). Kept maps are those that would
# be computed.
_MAY_BE_EQUAL = {"seed", "compat.stacked", "head_follow_residual", "compat.unmerge", "maps"}


def test_every_key_is_tried():
    keys = {
        key for key in vars(AlignmentOptions()) if key not in ("method", "calibration", "compat")
    }
    keys |= {f"calibration.{key}" for key in vars(Calibration()) if key != "batch_size"}
    keys |= {f"compat.{key}" for key in vars(CompatOptions())}
    assert keys == CHANGES.keys()


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_every_key_of_align_changes_the_result_or_is_refused(models_root, tmp_path, method):
    block: dict = {"method": method}
    if method in ("activation", "ot", "orthogonal"):
        block["calibration"] = {"path": str(models_root / "text.txt")}
    plain = outcome(models_root, tmp_path, "plain", block)
    assert isinstance(plain, dict)
    ignored = []
    for key, value in CHANGES.items():
        value = str(models_root / value) if key in ("calibration.path", "maps") else value
        outer, _, inner = key.partition(".")
        changed = dict(block)
        changed[outer] = {**block.get(outer, {}), inner: value} if inner else value
        if same(plain, outcome(models_root, tmp_path, key, changed)):
            ignored.append(key)
    assert set(ignored) <= _MAY_BE_EQUAL, ignored


def test_scale_is_that_of_the_library(models_root, tmp_path):
    for method in ("weight", "identity"):
        block = {"method": method, "compat": {"scale": True}}
        scaled = outcome(models_root, tmp_path, f"scaled-{method}", block)
        plain = outcome(models_root, tmp_path, f"plain-{method}", {"method": method})
        states = [read_weights(models_root / name) for name in "ab"]
        config = json.loads((models_root / "a/config.json").read_text())
        symmetry = find_symmetry(config, {n: t.shape for n, t in states[0].items()})
        options = AlignmentOptions(method="identity", compat=CompatOptions(scale=True))
        if method == "identity":
            expected = merge_states(*states, symmetry, make_identity_alignment(symmetry, options))
            for name, tensor in expected.items():
                torch.testing.assert_close(scaled[name], tensor, rtol=1e-6, atol=1e-7)
        # Features are made at 2 / (2 + 1e-5) of their size, in both models.
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        torch.testing.assert_close(
            scaled[name], plain[name] * (2 / (2 + 1e-5)), rtol=1e-6, atol=1e-8
        )
        assert not torch.equal(scaled[name], plain[name])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"calibration": {"path": "x"}}, "calibration goes with fisher, regmean"),
        ({"evaluation": {"data": "x"}}, "evaluation goes with greedy_soup"),
        ({"models": [{"model": "a", "statistics": "x"}]}, "statistics goes with fisher"),
        ({"out_dtype": "bfloat16"}, None),
        ({"dtype": "bfloat16"}, None),
        ({"parameters": {"normalize": False}}, None),
    ],
)
def test_other_keys(models_root, tmp_path, more, message):
    result = outcome(models_root, tmp_path, "found", None, **more)
    if message is None:
        assert not same(result, outcome(models_root, tmp_path, "plain", None))
    else:
        assert message in result


def test_parameters_of_other_methods_are_reported(models_root, tmp_path, caplog):
    outcome(models_root, tmp_path, "found", None, parameters={"density": 0.5, "int8_mask": True})
    assert "density: has no effect with linear" in caplog.text
    assert "int8_mask" not in caplog.text
