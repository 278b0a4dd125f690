"""Studies of barriers: what alignment can undo is undone, and nothing is made twice."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from twins import twin

from megamod.data.lm.text_blocks import read_text_blocks
from megamod.errors import UserError
from megamod.evaluation.barrier import (
    compute_barrier,
    compute_barrier_over_mean,
    compute_losses_along_line,
    list_even_weights,
)
from megamod.runs.studies.barrier import run_barrier_study
from megamod.runs.studies.barrier_recipe import read_barrier_study

WORDS = [f"w{n}" for n in range(30)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BERT = dict(vocab_size=len(VOCAB), hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
BERT |= dict(intermediate_size=40, max_position_embeddings=32, initializer_range=0.3)
GPT2 = dict(vocab_size=len(VOCAB), n_embd=24, n_layer=2, n_head=3, n_positions=32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Pairs of models that differ in the order of their features, text, and a task."""
    root = tmp_path_factory.mktemp("barrier")
    random_ = random.Random(1)
    for name, kind, config in (
        ("bert", BertForMaskedLM, BertConfig(**BERT)),
        ("cola", BertForSequenceClassification, BertConfig(**BERT, num_labels=2)),
        ("gpt2", GPT2LMHeadModel, GPT2Config(**GPT2, initializer_range=0.3)),
    ):
        torch.manual_seed(3)
        first = kind(config)
        for number, model in enumerate((first, twin(first, 5), twin(first, 6)), start=1):
            folder = root / f"{name}-{number}"
            model.save_pretrained(folder)
            (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    for file in ("train.txt", "valid.txt"):
        lines = [" ".join(random_.choices(WORDS, k=9)) for _ in range(40)]
        (root / file).write_text("\n".join(lines) + "\n")
    (root / "CoLA").mkdir()
    for split in ("train", "dev"):
        rows = [f"x\t{n % 2}\t*\t{' '.join(random_.choices(WORDS, k=6))}" for n in range(20)]
        (root / "CoLA" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return root


def study(root: Path, name: str, task: str, **more: object) -> Path:
    """A file that compares the models of that name."""
    calibration = {} if task == "cola" else {"calibration": {"path": str(root / "train.txt")}}
    content = {
        "models": [str(root / f"{name}-{number}") for number in (1, 2, 3)],
        "pairs": [[1, 2], [1, 3]],
        "task": task,
        "data": str(root if task == "cola" else root / "valid.txt"),
        "tokenizer": str(root / "bert-1"),
        "max_seq_length": 16,
        "points": 5,
        "variants": {
            "vanilla": {"method": "identity"},
            "ff+attn": {"groups": ["ff", "attn"], **calibration},
            "all": calibration,
        },
        **more,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(("name", "task"), [("bert", "mlm"), ("cola", "cola"), ("gpt2", "clm")])
def test_alignment_takes_the_barrier_away(workspace, name, task):
    path = study(workspace, name, task)
    if name == "gpt2":  # its residual stream
        content = yaml.safe_load(path.read_text())
        content["variants"]["all"] = content["variants"]["ff+attn"] | {
            "groups": ["ff", "attn", "res"]
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    out = workspace / f"out-{name}"
    table = run_barrier_study(read_barrier_study(path), out, torch.device("cpu"))
    record = json.loads((out / "results.json").read_text())[task]

    def losses(variant: str, pair: str) -> list[float]:
        curve = json.loads((out / "curves" / task / variant / f"{pair}.json").read_text())
        (result,) = curve["losses"].values()
        return result

    for pair in ("1-2", "1-3"):
        assert np.ptp(losses("all", pair)) < 1e-4  # the same function all along
        assert np.ptp(losses("vanilla", pair)) > 0.02
        assert losses("vanilla", pair)[0] == pytest.approx(losses("all", pair)[0], abs=1e-4)
        assert abs(record["all"]["pairs"][pair]["barrier"]) < 1e-4
    assert "ff+attn" in table and "over the mean" in table and " ± 0." in table
    for plot in (f"{task}.png", "barriers.png"):
        assert (out / plot).read_bytes()[:4] == b"\x89PNG"


def test_only_what_is_missing_is_made(workspace, caplog):
    caplog.set_level("INFO", "megamod")
    out, path = workspace / "again", study(workspace, "bert", "mlm", pairs=[["1", "2"]])
    content = yaml.safe_load(path.read_text())
    content["variants"].pop("all")
    path.write_text(yaml.safe_dump(content))
    table = run_barrier_study(read_barrier_study(path), out, torch.device("cpu"))
    assert "1 pair " in table and "±" not in table  # the error of one pair is not 0 but unknown
    files = sorted((out / "curves").rglob("*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    content["variants"]["monotonic"] = content["variants"]["ff+attn"] | {"attention": "monotonic"}
    path.write_text(yaml.safe_dump(content))
    run_barrier_study(read_barrier_study(path), out, torch.device("cpu"))
    assert [file.stat().st_mtime_ns for file in files] == times
    assert len(sorted((out / "curves").rglob("*.json"))) == len(files) + 1
    lines = [message for message in caplog.messages if message.startswith("curve ")]
    assert lines == [
        "curve 1 of 2: mlm, ff+attn, 1-2",
        "curve 2 of 2: mlm, vanilla, 1-2",
        "curve 2 of 3: mlm, monotonic, 1-2",
    ]
    path.write_text(yaml.safe_dump(content | {"points": 3}))
    with pytest.raises(UserError, match="holds a study with another points"):
        run_barrier_study(read_barrier_study(path), out, torch.device("cpu"))


def test_mistakes_are_found_before_the_first_curve(workspace, tmp_path):
    path = study(workspace, "bert", "mlm", pairs=[[1, 2]])
    content = yaml.safe_load(path.read_text())
    for calibration, message in (
        ({}, "variants, late: align.calibration.path is missing"),
        ({"path": str(tmp_path / "no.txt")}, r"variants, late: .*no\.txt"),
        ({"path": str(workspace / "train.txt"), "fraction": 0.001}, "variants, late: .* fraction"),
    ):
        changed = content["variants"] | {"late": {"calibration": calibration}}
        path.write_text(yaml.safe_dump(content | {"variants": changed}, sort_keys=False))
        with pytest.raises(UserError, match=message):
            run_barrier_study(read_barrier_study(path), tmp_path / "out", torch.device("cpu"))
    models = [*content["models"][:2], str(tmp_path / "gone")]
    path.write_text(yaml.safe_dump(content | {"models": models, "pairs": [[1, 2], [1, 3]]}))
    with pytest.raises(UserError, match="gone"):
        run_barrier_study(read_barrier_study(path), tmp_path / "out", torch.device("cpu"))
    assert not (tmp_path / "out").exists()


def test_models_of_other_settings_are_reported(workspace, tmp_path, caplog):
    torch.manual_seed(3)
    other = BertForMaskedLM(BertConfig(**BERT, layer_norm_eps=1e-5))
    other.save_pretrained(tmp_path / "other")
    models = [str(workspace / "bert-1"), str(tmp_path / "other")]
    path = study(workspace, "bert", "mlm", models=models, pairs=[[1, 2]], points=2, max_items=1)
    content = yaml.safe_load(path.read_text())
    content["variants"] = {"vanilla": {"method": "identity"}}
    path.write_text(yaml.safe_dump(content))
    run_barrier_study(read_barrier_study(path), tmp_path / "out", torch.device("cpu"))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "models 1 and 2 differ in layer_norm_eps 1e-12 / 1e-05" in warning.getMessage()


def test_a_study_that_cannot_be_leaves_nothing(workspace, tmp_path):
    path = study(
        workspace, "bert", "mlm", models=[str(workspace / "bert-1"), str(tmp_path / "gone")]
    )
    content = yaml.safe_load(path.read_text()) | {"pairs": [[1, 2]]}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="gone"):
        run_barrier_study(read_barrier_study(path), tmp_path / "out", torch.device("cpu"))
    assert not (tmp_path / "out").exists()


def test_both_definitions_of_the_barrier():
    weights = list_even_weights(5)
    assert weights == [0, 0.25, 0.5, 0.75, 1]
    losses = [1.0, 2.0, 4.0, 3.0, 3.0]
    assert compute_barrier(weights, losses) == pytest.approx(4.0 - 2.0)
    assert compute_barrier_over_mean(losses) == pytest.approx(4.0 - 2.0)
    assert compute_barrier(weights, [1.0, 1.2, 1.4, 3.2, 3.0]) == pytest.approx(3.2 - 2.5)
    assert compute_barrier(weights, [2.0, 1.0, 0.5, 1.0, 2.0]) == 0


def test_the_line_runs_from_the_second_to_the_first():
    model = torch.nn.Linear(2, 1, bias=False)
    first, second = {"weight": torch.tensor([[4.0, 0.0]])}, {"weight": torch.tensor([[0.0, 8.0]])}
    result = compute_losses_along_line(
        model,
        first,
        second,
        [0, 0.25, 1],
        lambda m: {"loss": float((m.weight @ torch.ones(2)).sum())},
    )
    assert result == {"loss": [8.0, 7.0, 4.0]}


def test_blocks_of_text(tmp_path):
    (tmp_path / "t.txt").write_text("ab c\n\nde\nfgh\n")
    result = read_text_blocks(tmp_path / "t.txt", lambda line: [ord(item) for item in line], 4)
    assert ["".join(map(chr, row)) for row in result] == ["ab c", "defg"]
    spaced = read_text_blocks(
        tmp_path / "t.txt", lambda line: [*map(ord, line)], 4, max_blocks=1, space_characters=True
    )
    assert ["".join(map(chr, row)) for row in spaced] == ["a b "]
    with pytest.raises(UserError, match="fewer tokens than one block of 40"):
        read_text_blocks(tmp_path / "t.txt", lambda line: [1], 40)


def test_a_study_without_pairs_compares_all(tmp_path):
    for pairs in ("", "pairs: , "):
        (tmp_path / "s.yaml").write_text(f"{{models: [a, b, c], {pairs}variants: {{x: {{}}}}}}")
        study = read_barrier_study(tmp_path / "s.yaml")
        assert study.pairs == (("1", "2"), ("1", "3"), ("2", "3"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not `key: value` lines"),
        ("{models: [a], variants: {x: {}}}", "has fewer than 2 items"),
        (
            "{models: [a, b], variants: {x: {}}, pair: 1}",
            "unknown key 'pair'; the nearest is 'pairs'",
        ),
        ("{models: [a, b], pairs: [[1, 3]], variants: {x: {}}}", "is not two of 1, 2"),
        ("{models: [a, b], pairs: [], variants: {x: {}}}", r"pairs: \[\] has fewer than 1 items"),
        ("{models: {a: b, ../c: d}, variants: {x: {}}}", "models: '../c' is not made of letters"),
        ("{models: [a, b], variants: {../x: {}}}", "variants: '../x' is not made of letters"),
        (
            "{models: [a, b], variants: {x: {seed: 3}}}",
            "x: seed has no effect, it needs method",
        ),
        ("{models: [a, b], task: clm, seed: 1, variants: {x: {}}}", "seed: has no effect without"),
        ("{models: [a, b], task: ../x, variants: {x: {}}}", r"task\[0\]: '../x' is not made of"),
        ("{models: [a, b]}", "variants is missing"),
        ("{models: [a, b], variants: {x: {method: magic}}}", "'magic' is not one of activation"),
        (
            "{models: [a, b], variants: {x: {}}, points: 1}",
            "points: 1 is not 2 or more",
        ),
        (
            "{models: [a, b], variants: {x: {}}, mlm_probability: 1.5}",
            "1.5 is not less than 1",
        ),
    ],
)
def test_mistakes_in_a_study(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_barrier_study(tmp_path / "s.yaml")


RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"


@pytest.mark.parametrize(
    ("name", "variants"),
    [("components", 4), ("heads", 4), ("residual", 5), ("data", 8), ("glue", 2)],
)
def test_recipes_are_studies(name, variants):
    result = read_barrier_study(RECIPES / f"barrier_{name}.yaml")
    assert len(result.models) == 5 and len(result.pairs) == 10 and result.points == 21
    assert len(result.variants) == variants
    amounts = [item.calibration.fraction for item in result.variants.values()]
    assert name != "data" or amounts[1:] == [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0]


RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("barrier_*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_runs(workspace, tmp_path, recipe):
    """At tiny size, on models as the recipes name them: BertForPreTraining with vocab.txt."""
    content = yaml.safe_load(recipe.read_text())
    glue = "{task}" in content["models"][1]
    models = {}
    for number in (1, 2):
        torch.manual_seed(number)
        config = BertConfig(**BERT)
        model = BertForSequenceClassification(config) if glue else BertForPreTraining(config)
        models[number] = str(tmp_path / ("{task}" if glue else "mlm") / str(number))
        folder = Path(models[number].replace("{task}", "cola"))
        model.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    content |= {"models": models, "points": 2, "max_items": 4, "batch_size": 2}
    content |= {"max_seq_length": 16, "data": str(workspace if glue else workspace / "valid.txt")}
    if glue:
        content["task"] = ["cola"]
    for block in content["variants"].values():
        if "calibration" in block:
            block["calibration"] |= {"path": str(workspace / "train.txt"), "fraction": 1.0}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    run_barrier_study(read_barrier_study(path), tmp_path / "out", torch.device("cpu"))
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert record.keys() == content["variants"].keys()
    curves = (tmp_path / "out" / "curves").rglob("*.json")
    losses = [
        loss
        for c in curves
        for item in json.loads(c.read_text())["losses"].values()
        for loss in item
    ]
    assert all(0 < loss < 20 for loss in losses)
