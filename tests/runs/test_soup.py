"""Greedy soups: which models are kept, and what is written."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel
from twins import twin

from megamod.errors import UserError
from megamod.merging.alignment import align as align_module
from megamod.merging.alignment.measure import load_model
from megamod.merging.recipe_file import read_recipe
from megamod.runs.studies import soup as soup_module
from megamod.runs.studies.soup import select_soup_models, write_greedy_soup
from megamod.states.weights import read_weights

WORDS = [f"w{n}" for n in range(12)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CONFIG = GPT2Config(
    vocab_size=len(VOCAB), n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=2,
    eos_token_id=3,
)  # fmt: skip
COUNT = 5


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    settings = {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


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
        save(model, root / str(number))
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


def mean_model(states: list[dict]) -> GPT2LMHeadModel:
    """The model of the mean of weights."""
    model = GPT2LMHeadModel(CONFIG).eval()
    mean = {k: sum(item[k].double() for item in states) / len(states) for k in states[0]}
    model.load_state_dict({k: v.float() for k, v in mean.items()}, strict=False)
    model.tie_weights()
    return model


def plain_loss(states: list[dict], folder: Path) -> float:
    """Mean cross entropy of the mean of models."""
    return loss_of(mean_model(states), folder)


def read_blocks(folder: Path) -> list[list[int]]:
    """Ten blocks of twelve tokens."""
    lines = (folder / "valid.txt").read_text().split("\n")
    ids = [n for line in lines if line for n in [2, *map(VOCAB.index, line.split()), 3]]
    return [ids[start : start + 12] for start in range(0, 120, 12)]


@torch.no_grad()
def loss_of(model: GPT2LMHeadModel, folder: Path) -> float:
    """Mean cross entropy, block by block and token by token."""
    total, count = 0.0, 0
    for block in read_blocks(folder):
        logits = model(torch.tensor([block])).logits[0].double()
        for place_, word in enumerate(block[1:]):
            total -= float(logits[place_].log_softmax(-1)[word])
            count += 1
    return total / count


def cook_plainly(states: list[dict], folder: Path) -> tuple[list[int], dict[int, float]]:
    """Kept models, and the loss of each in the soup by its number, in the order of the trials."""
    kept: list[int] = []
    best, tried = math.inf, {}
    for number in sorted(range(len(states)), key=lambda n: plain_loss([states[n]], folder)):
        loss = plain_loss([states[n] for n in (*kept, number)], folder)
        tried[number] = loss
        if loss <= best:
            kept, best = [*kept, number], loss
    assert 1 < len(kept) < len(states)  # else there is nothing to see
    return kept, tried


def test_a_soup_is_that_of_the_plain_recipe(folder, tmp_path):
    states = [read_weights(folder / str(number)) for number in range(COUNT)]
    alone = [plain_loss([state], folder) for state in states]
    kept, tried = cook_plainly(states, folder)
    plan, candidates = write_greedy_soup(
        read_recipe(build_recipe_from_flags(folder, tmp_path)), tmp_path / "out"
    )
    assert [item.number for item in candidates] == list(tried)
    for item in candidates:
        assert item.loss == pytest.approx(alone[item.number], abs=1e-5)
        assert item.soup_loss == pytest.approx(tried[item.number], abs=1e-5)
        assert item.kept is (item.number in kept)
    result = read_weights(tmp_path / "out")
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, sum(states[n][name] for n in kept) / len(kept))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["merge_method"] == "greedy_soup" and record["evaluation"]["max_items"] == 10
    assert [item["kept"] for item in record["candidates"]] == [item.kept for item in candidates]
    assert [Path(item["path"]).name for item in record["parents"]] == [str(n) for n in sorted(kept)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A merge (greedy_soup)" in card and card.count("left out") == COUNT - len(kept)
    assert f"{len(kept)} models" in plan.format_summary()
    # A folder of something else is left as it is.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(UserError, match="exists already"):
        write_greedy_soup(
            read_recipe(build_recipe_from_flags(folder, tmp_path)), tmp_path / "other"
        )


def test_ties_keep_the_order_and_do_no_harm(folder, monkeypatch):
    paths = [str(folder / str(number)) for number in (1, 0, 2)]
    device = torch.device("cpu")

    def load(number: int) -> GPT2LMHeadModel:
        return load_model(paths[number])

    equal = select_soup_models(paths, load, lambda model: {"a": 1.0, "b": 3.0}, device)
    assert [(item.number, item.loss, item.kept) for item in equal] == [
        (0, 2.0, True),
        (1, 2.0, True),
        (2, 2.0, True),
    ]
    numbers = iter([math.nan, 2.0, 1.0, 1.5, math.nan])
    candidates = select_soup_models(paths, load, lambda model: {"loss": next(numbers)}, device)
    assert [(item.number, item.kept) for item in candidates] == [(2, True), (1, False), (0, False)]
    with pytest.raises(UserError, match="the loss of every model is inf"):
        select_soup_models(paths, load, lambda model: {"loss": math.nan}, device)


@pytest.fixture(scope="module")
def seeds(folder) -> list[dict]:
    """Weights of a trained model with noise; folder/s0, ...: the same with features reordered.

    The first has the most noise.
    """
    torch.manual_seed(2)
    model = GPT2LMHeadModel(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    blocks = torch.tensor(read_blocks(folder))
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        model(blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = []
    for number, noise in enumerate((0.15, 0.05, 0.05, 0.05)):
        generator = torch.Generator().manual_seed(number)
        noisy = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        states.append(noisy)
        copy = mean_model([noisy])
        save(twin(copy, number) if number else copy, folder / f"s{number}")
    return states


@pytest.mark.parametrize("method", ["weight", "orthogonal"])
def test_models_of_several_seeds_are_aligned_before_they_are_tried(
    folder, seeds, tmp_path, monkeypatch, method
):
    kept, tried = cook_plainly(seeds, folder)
    assert 0 not in kept
    align = {"method": method} | ({} if method == "weight" else {"maps": str(tmp_path / "maps")})
    models = [{"model": str(folder / f"s{number}")} for number in range(len(seeds))]
    recipe = read_recipe(build_recipe_from_flags(folder, tmp_path, models=models, align=align))
    _, candidates = write_greedy_soup(recipe, tmp_path / "out")
    for item in candidates:
        # Aligned models compute what they did.
        assert item.loss == pytest.approx(plain_loss([seeds[item.number]], folder), abs=1e-5)
    result = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    last = [item for item in candidates if item.kept][-1]
    assert last.soup_loss == pytest.approx(loss_of(result, folder), abs=1e-5)
    assert result.config.tie_word_embeddings is (method == "weight")
    if method == "weight":  # which finds the order of the features, so the soup is the plain one
        assert {item.number: item.soup_loss for item in candidates} == pytest.approx(
            tried, abs=1e-5
        )
        ids = torch.arange(12)[None]
        expected = mean_model([seeds[number] for number in kept])(ids).logits
        torch.testing.assert_close(result(ids).logits, expected, rtol=0, atol=1e-4)
    else:  # the maps are stored, and read again
        assert len(list((tmp_path / "maps").iterdir())) == len(seeds) - 1
        monkeypatch.setattr(align_module, "align_weights_by_maps", None)
        write_greedy_soup(recipe, tmp_path / "again")
        for file in ("model.safetensors", "merge.json"):
            assert (tmp_path / "again" / file).read_bytes() == (
                tmp_path / "out" / file
            ).read_bytes()
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["align"] == align and record["merge_method"] == "greedy_soup"
    assert record["unties_output_matrix"] is (method == "orthogonal")
    numbers = sorted(item.number for item in candidates if item.kept)
    weights = {Path(item["path"]).name: item["weight"] for item in record["parents"]}
    share = pytest.approx(1 / len(numbers))
    assert weights == {"s0": 0.0} | {f"s{number}": share for number in numbers}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "aligned to the first one before the merge" in card and method in card


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
        ({"align": {}}, "align.calibration.path is missing"),
        ({"align": {"method": "weight", "refine_steps": 1}}, "align: refine_steps has no effect"),
        ({"parameters": {"weight": 1}}, "does not support parameters"),
        ({"base_model": "0"}, "does not support base_model"),
        ({"evaluation": {"data": "valid.txt", "max_seq_length": 17}}, "has 16 positions; give"),
        ({"merge_method": "linear"}, "evaluation goes with greedy_soup, not linear"),
    ],
)
def test_recipes_that_are_no_soup(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        write_greedy_soup(
            read_recipe(build_recipe_from_flags(folder, tmp_path, **changes)), tmp_path / "out"
        )
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_runs_no_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(soup_module, "load_aligned_model", None)
    recipe = read_recipe(build_recipe_from_flags(folder, tmp_path))
    plan, candidates = write_greedy_soup(recipe, None, dry_run=True)
    assert "5 models" in plan.format_summary() and candidates == []
    assert [path.name for path in tmp_path.iterdir()] == ["soup.yaml"]


def test_models_of_unequal_vocabularies(folder, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**{**CONFIG.to_dict(), "vocab_size": len(VOCAB) + 4}))
    model.save_pretrained(tmp_path / "larger")
    models = [{"model": str(folder / "0")}, {"model": str(tmp_path / "larger")}]
    recipe = read_recipe(build_recipe_from_flags(folder, tmp_path, models=models))
    with pytest.raises(UserError, match=r"vocab_size|embedding|wte"):
        write_greedy_soup(recipe, None, dry_run=True)
