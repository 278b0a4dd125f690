import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from megamod.errors import UserError
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe
from megamod.merging.statistics import (
    compute_diagonal_fisher,
    compute_input_grams,
    write_statistics,
)


class Conv1D(nn.Module):
    """A linear layer with its weight as [in, out]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


class Toy(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, 4)
        self.up = nn.Linear(4, 4)
        self.turned = Conv1D(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, attention_mask=None, labels=None):
        hidden = self.turned(self.up(self.embed(ids)).tanh())
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def batches(seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(0, 9, (2, 5), generator=generator)
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        result.append({"ids": ids, "attention_mask": mask, "labels": ids.flip(1)})
    return result


def folders(root: Path, statistics: list[dict] | None, models: list[Toy]) -> None:
    for number, model in enumerate(models):
        folder = root / str(number)
        folder.mkdir()
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
        if statistics is not None:
            write_statistics(folder / "statistics.safetensors", statistics[number])


def run(root: Path, method: str, weights: list[float], parameters: str = "{}") -> dict:
    models = "".join(
        f"- {{model: '{n}', statistics: {n}/statistics.safetensors, parameters: {{weight: {w}}}}}\n"
        for n, w in enumerate(weights)
    )
    (root / "merge.yml").write_text(
        f"merge_method: {method}\nparameters: {parameters}\nmodels:\n{models}"
    )
    merge(read_recipe(root / "merge.yml"), root / "out")
    return load_file(root / "out" / "model.safetensors")


def test_gram_matrices_are_those_of_the_inputs():
    model, data = Toy(0), batches(1)
    result = compute_input_grams(model, data)
    assert result.keys() == {"up.weight", "turned.weight.T"}
    inputs = torch.cat([model.embed(b["ids"][b["attention_mask"].bool()]) for b in data]).double()
    expected = sum(x[:, None] * x for x in inputs)
    torch.testing.assert_close(result["up.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    hidden = model.up(inputs.float()).tanh()
    torch.testing.assert_close(result["turned.weight.T"], hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no batch"):
        compute_input_grams(model, [])


def test_fisher_of_given_labels_is_the_mean_of_squared_gradients():
    model, data = Toy(0), batches(1)
    result = compute_diagonal_fisher(model, data, labelled=True)
    squares: dict[str, list] = {}
    for batch in data:
        for row in range(2):
            entry = {name: value[row : row + 1] for name, value in batch.items()}
            names, parameters = zip(*model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(model(**entry).loss, parameters)
            for name, gradient in zip(names, gradients, strict=True):
                squares.setdefault(name, []).append(gradient**2)
    assert result.keys() == squares.keys()
    for name, each in squares.items():
        torch.testing.assert_close(result[name], torch.stack(each).mean(0))
    with pytest.raises(UserError, match="no batch"):
        compute_diagonal_fisher(model, [])


def test_fisher_of_drawn_labels_is_that_of_softmax_regression():
    layer = nn.Linear(3, 4, bias=False)
    model = nn.Module()
    model.layer, model.forward = layer, lambda x: SimpleNamespace(logits=layer(x))
    x = torch.tensor([1.0, -2.0, 0.5])
    result = compute_diagonal_fisher(model, [{"x": x.expand(3000, 3)}])["layer.weight"]
    p = layer(x).softmax(-1)
    # E over y of (p - onehot(y))^2 x^2 = p (1 - p) x^2
    expected = (p * (1 - p))[:, None] * x**2
    torch.testing.assert_close(result, expected.detach(), rtol=0.15, atol=1e-3)


def test_fisher_weighs_entry_by_entry(tmp_path):
    models = [Toy(n) for n in range(3)]
    statistics = [compute_diagonal_fisher(m, batches(n)) for n, m in enumerate(models)]
    for entry in statistics:
        entry["up.bias"][0] = 0  # no model knows anything of it
        del entry["turned.weight"]  # nor of this
    folders(tmp_path, statistics, models)
    weights = [1.0, 2.0, 0.5]
    result = run(tmp_path, "fisher", weights)
    states = [dict(model.named_parameters()) for model in models]
    for name, tensor in result.items():
        parts = [
            w * s.get(name, torch.ones(())).double().clamp(min=1e-8)
            for w, s in zip(weights, statistics, strict=True)
        ]
        expected = sum(p * s[name].double() for p, s in zip(parts, states, strict=True)) / sum(
            parts
        )
        torch.testing.assert_close(tensor.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    plain = sum(w * s["up.bias"][0] for w, s in zip(weights, states, strict=True)) / 3.5
    torch.testing.assert_close(result["up.bias"][0], plain.detach())


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
def test_regmean_has_the_least_error_on_all_inputs(tmp_path, alpha):
    models = [Toy(n) for n in range(2)]
    grams = [compute_input_grams(m, batches(n, 8)) for n, m in enumerate(models)]
    folders(tmp_path, grams, models)
    result = run(tmp_path, "regmean", [1.0, 3.0], f"{{alpha: {alpha}}}")
    states = [dict(model.named_parameters()) for model in models]
    for name, turned in (("up.weight", False), ("turned.weight", True)):
        # Rows of weighted square roots of the Gram matrices: X^T X = G.
        left, right = [], []
        for weight, gram, state in zip((1.0, 3.0), grams, states, strict=True):
            g = gram[name + (".T" if turned else "")].double()
            g = alpha * g + (1 - alpha) * torch.diag(g.diagonal())
            values, vectors = torch.linalg.eigh(g * weight)
            root = (vectors * values.clamp(min=0).sqrt()).T
            w = state[name].detach().double()
            left.append(root)
            right.append(root @ (w if turned else w.T))
        expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution
        expected = expected if turned else expected.T
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-4, atol=1e-5)
    mean = (states[0]["embed.weight"] + 3 * states[1]["embed.weight"]) / 4
    torch.testing.assert_close(result["embed.weight"], mean.detach())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_that_are_missing_or_of_another_shape(tmp_path, method):
    models = [Toy(n) for n in range(2)]
    measure = compute_diagonal_fisher if method == "fisher" else compute_input_grams
    good = [measure(model, batches(0)) for model in models]
    folders(tmp_path, good, models)
    second = tmp_path / "1" / "statistics.safetensors"
    for change, message in (
        ({"up.weight": None}, "has no up.weight"),
        ({"up.weight": torch.ones(3, 3)}, "up.weight has shape [3, 3], not [4, 4]"),
    ):
        changed = {k: v for k, v in (good[1] | change).items() if v is not None}
        write_statistics(second, changed)
        with pytest.raises(UserError) as error:
            run(tmp_path, method, [1, 1])
        assert message in str(error.value) and not (tmp_path / "out").exists()
    second.unlink()
    with pytest.raises(UserError, match=r"1/statistics\.safetensors"):
        run(tmp_path, method, [1, 1])
    recipe = (tmp_path / "merge.yml").read_text()
    recipe = recipe.replace(", statistics: 1/statistics.safetensors", "")
    (tmp_path / "merge.yml").write_text(recipe)
    with pytest.raises(UserError, match="give `statistics: FILE`"):
        merge(read_recipe(tmp_path / "merge.yml"), tmp_path / "out")


WORDS = [f"w{n}" for n in range(12)]
GPT2 = GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Two models with tokenizers, and a text for each."""
    root = tmp_path_factory.mktemp("texts")
    for number in range(2):
        torch.manual_seed(number)
        model = GPT2LMHeadModel(GPT2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / str(number))
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (root / str(number) / "vocab.txt").write_text("\n".join(vocabulary))
        settings = json.dumps({"tokenizer_class": "BertTokenizer"})
        (root / str(number) / "tokenizer_config.json").write_text(settings)
        rows = torch.randint(12, (9, 6), generator=torch.Generator().manual_seed(number)).tolist()
        lines = [
            " ".join(WORDS[n] for n in row[: 3 + models_root % 4])
            for models_root, row in enumerate(rows)
        ]
        (root / f"{number}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_are_measured_on_text_of_the_recipe(texts, tmp_path, method):
    # Once with files that were made from Python, once with text of the recipe.
    measure = compute_diagonal_fisher if method == "fisher" else compute_input_grams
    lines = ["", ""]
    for number in range(2):
        model = GPT2LMHeadModel.from_pretrained(texts / str(number))
        items = [
            [2, *(5 + WORDS.index(word) for word in line.split()), 3]
            for line in (texts / f"{number}.txt").read_text().split("\n")
        ]
        result = []
        for part in (items[:4], items[4:8]):
            width = max(map(len, part))
            ids = torch.tensor([entry + [0] * (width - len(entry)) for entry in part])
            mask = torch.tensor([[1] * len(entry) + [0] * (width - len(entry)) for entry in part])
            result.append({"input_ids": ids, "attention_mask": mask})
        file = tmp_path / f"{number}.safetensors"
        write_statistics(file, measure(model, result))
        stored = f"{{path: {texts}/{number}.txt, fraction: 0.8, batch_size: 4}}"
        for models_root, key in enumerate((f"statistics: {file}", f"calibration: {stored}")):
            lines[models_root] += f"- {{model: {texts}/{number}, {key}}}\n"
    head = f"merge_method: {method}\nmodels:\n"
    for name, text in zip(("files", "text"), lines, strict=True):
        (tmp_path / f"{name}.yml").write_text(head + text)
        merge(read_recipe(tmp_path / f"{name}.yml"), tmp_path / name)
    files, text = (load_file(tmp_path / n / "model.safetensors") for n in ("files", "text"))
    for name, tensor in files.items():
        torch.testing.assert_close(text[name], tensor, msg=name)
    plain = [load_file(texts / str(n) / "model.safetensors") for n in range(2)]
    name = "transformer.h.0.mlp.c_fc.weight"
    assert (text[name] - (plain[0][name] + plain[1][name]) / 2).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{path: nowhere.txt}", "calibration: path is 'nowhere.txt'; give a file with text"),
        ("{fraction: 1}", "calibration: path is None"),
        ("{path: 0.txt, special_tokens: true}", "unknown key 'special_tokens'"),
        ("3", "calibration: 3 is not `key: value` lines"),
    ],
)
def test_text_that_cannot_be_measured_on(texts, tmp_path, monkeypatch, block, message):
    monkeypatch.chdir(texts)
    models = "models: [{model: '0'}, {model: '1'}]\n"
    (tmp_path / "merge.yml").write_text(f"merge_method: fisher\n{models}calibration: {block}\n")
    with pytest.raises(UserError) as error:
        merge(read_recipe(tmp_path / "merge.yml"), tmp_path / "out", dry_run=True)
    assert message in str(error.value)
    text = f"merge_method: linear\n{models}calibration: {{path: 0.txt}}\n"
    (tmp_path / "merge.yml").write_text(text)
    with pytest.raises(UserError, match="calibration goes with fisher, regmean, not linear"):
        read_recipe(tmp_path / "merge.yml")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("regmean", "align: {method: weight}", "align reorders features"),
        ("fisher", "align: {method: weight}", "align reorders features"),
        ("fisher", "tokenizer_source: union", "statistics of each model's own words"),
    ],
)
def test_statistics_are_of_models_as_they_are_stored(
    texts, tmp_path, monkeypatch, method, more, message
):
    monkeypatch.chdir(texts)
    models = "models: [{model: '0'}, {model: '1'}]\ncalibration: {path: 0.txt}\n"
    (tmp_path / "merge.yml").write_text(f"merge_method: {method}\n{models}{more}\n")
    with pytest.raises(UserError) as error:
        merge(read_recipe(tmp_path / "merge.yml"), tmp_path / "out", dry_run=True)
    assert message in str(error.value)


def test_text_of_one_model_that_nobody_measures(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(texts)
    models = "models: [{model: '0', calibration: {path: 0.txt}}, {model: '1'}]\n"
    (tmp_path / "merge.yml").write_text(f"merge_method: linear\n{models}")
    with pytest.raises(UserError, match="calibration goes with fisher, regmean, not linear"):
        read_recipe(tmp_path / "merge.yml")
