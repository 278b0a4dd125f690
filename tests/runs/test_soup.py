"""Greedy soups: which models are kept, and what is written."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from megamod.errors import UserError
from megamod.merging.recipe_file import read_recipe
from megamod.runs.studies import soup as soup_module
from megamod.runs.studies.soup import greedy_soup, select_models
from megamod.states.weights import read_weights

WORDS = [f"w{n}" for n in range(12)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CONFIG = GPT2Config(
    vocab_size=len(VOCAB), n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=2,
    eos_token_id=3,
)  # fmt: skip
COUNT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models near each other, one of them far away, and text."""
    root = tmp_path_factory.mktemp("soup")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(CONFIG)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(COUNT):
        torch.manual_seed(10 + number)
        far = 3.0 if number == 2 else 0.4
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(base[name] + far * torch.randn(tensor.shape))
        model.tie_weights()
        model.save_pretrained(root / str(number))
        (root / str(number) / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
        settings = {"tokenizer_class": "BertTokenizer"}
        (root / str(number) / "tokenizer_config.json").write_text(json.dumps(settings))
    random_ = random.Random(3)
    lines = [" ".join(random_.choices(WORDS[:4], k=9)) for _ in range(30)]
    (root / "valid.txt").write_text("\n".join(lines) + "\n")
    return root


def build_recipe_from_flags(folder: Path, tmp_path: Path, **changes: object) -> Path:
    content = {
        "merge_method": "greedy_soup",
        "models": [{"model": str(folder / str(number))} for number in range(COUNT)],
        "evaluation": {"data": str(folder / "valid.txt"), "max_seq_length": 12, "max_items": 10},
    } | changes
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


@torch.no_grad()
def plain_loss(states: list[dict], folder: Path) -> float:
    """Mean cross entropy of the mean of models, block by block and token by token."""
    model = GPT2LMHeadModel(CONFIG).eval()
    mean = {k: sum(item[k].double() for item in states) / len(states) for k in states[0]}
    model.load_state_dict({k: v.float() for k, v in mean.items()}, strict=False)
    model.tie_weights()
    lines = (folder / "valid.txt").read_text().split("\n")
    ids = [n for line in lines if line for n in [2, *map(VOCAB.index, line.split()), 3]]
    total, count = 0.0, 0
    for start in range(0, 120, 12):
        block = ids[start : start + 12]
        logits = model(torch.tensor([block])).logits[0].double()
        for place_, word in enumerate(block[1:]):
            total -= float(logits[place_].log_softmax(-1)[word])
            count += 1
    return total / count


def test_a_soup_is_that_of_the_plain_recipe(folder, tmp_path):
    states = [read_weights(folder / str(number)) for number in range(COUNT)]
    alone = [plain_loss([state], folder) for state in states]
    kept: list[int] = []
    best, tried = math.inf, {}
    for number in sorted(range(COUNT), key=lambda n: alone[n]):
        loss = plain_loss([states[n] for n in (*kept, number)], folder)
        tried[number] = loss
        if loss <= best:
            kept, best = [*kept, number], loss
    assert 1 < len(kept) < COUNT  # else there is nothing to see

    plan, tasted = greedy_soup(
        read_recipe(build_recipe_from_flags(folder, tmp_path)), tmp_path / "out"
    )
    assert [item.number for item in tasted] == list(tried)
    for item in tasted:
        assert item.loss == pytest.approx(alone[item.number], abs=1e-5)
        assert item.soup_loss == pytest.approx(tried[item.number], abs=1e-5)
        assert item.kept is (item.number in kept)
    result = read_weights(tmp_path / "out")
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, sum(states[n][name] for n in kept) / len(kept))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["merge_method"] == "greedy_soup" and record["evaluation"]["max_items"] == 10
    assert [item["kept"] for item in record["tasted"]] == [item.kept for item in tasted]
    assert [Path(item["path"]).name for item in record["parents"]] == [str(n) for n in sorted(kept)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A merge (greedy_soup)" in card and card.count("left out") == COUNT - len(kept)
    assert f"{len(kept)} models" in plan.describe()
    # A folder of something else is left as it is.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(UserError, match="exists already"):
        greedy_soup(read_recipe(build_recipe_from_flags(folder, tmp_path)), tmp_path / "other")


def test_ties_keep_the_order_and_do_no_harm(folder, monkeypatch):
    paths = [str(folder / str(number)) for number in (1, 0, 2)]
    equal = select_models(paths, lambda model: {"a": 1.0, "b": 3.0}, torch.device("cpu"))
    assert [(item.number, item.loss, item.kept) for item in equal] == [
        (0, 2.0, True),
        (1, 2.0, True),
        (2, 2.0, True),
    ]
    numbers = iter([math.nan, 2.0, 1.0, 1.5, math.nan])
    tasted = select_models(paths, lambda model: {"loss": next(numbers)}, torch.device("cpu"))
    assert [(item.number, item.kept) for item in tasted] == [(2, True), (1, False), (0, False)]
    with pytest.raises(UserError, match="the loss of every model is inf"):
        select_models(paths, lambda model: {"loss": math.nan}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": None}, "evaluation: is missing; give"),
        ({"evaluation": {"dta": "x"}}, "evaluation: unknown key 'dta'"),
        (
            {"evaluation": {"data": "x", "batch_size": 0}},
            "evaluation.batch_size: 0 is not 1",
        ),
        ({"evaluation": {"task": 3}}, "evaluation.task: 3 is not text"),
        ({"evaluation": {"task": "mlm"}}, "data: None is not a file"),
        ({"evaluation": {"task": "nosuch", "data": "x"}}, "nosuch"),
        ({"align": {"method": "weight"}}, "greedy_soup does not support align"),
        ({"parameters": {"weight": 1}}, "does not support parameters"),
        ({"base_model": "0"}, "does not support base_model"),
        ({"evaluation": {"data": "valid.txt", "max_seq_length": 17}}, "has 16 positions; give"),
        ({"merge_method": "linear"}, "evaluation goes with greedy_soup, not linear"),
    ],
)
def test_recipes_that_are_no_soup(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        greedy_soup(
            read_recipe(build_recipe_from_flags(folder, tmp_path, **changes)), tmp_path / "out"
        )
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_runs_no_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(soup_module, "load_model", None)
    recipe = read_recipe(build_recipe_from_flags(folder, tmp_path))
    plan, tasted = greedy_soup(recipe, None, dry_run=True)
    assert "5 models" in plan.describe() and tasted == []
    assert [path.name for path in tmp_path.iterdir()] == ["soup.yaml"]


def test_models_of_unequal_vocabularies(folder, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**{**CONFIG.to_dict(), "vocab_size": len(VOCAB) + 4}))
    model.save_pretrained(tmp_path / "larger")
    models = [{"model": str(folder / "0")}, {"model": str(tmp_path / "larger")}]
    recipe = read_recipe(build_recipe_from_flags(folder, tmp_path, models=models))
    with pytest.raises(UserError, match=r"vocab_size|embedding|wte"):
        greedy_soup(recipe, None, dry_run=True)
