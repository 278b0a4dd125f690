"""Merges of models from different seeds that are aligned first, with several methods."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from twins import twin

from megamod.errors import UserError
from megamod.merging.merge import merge
from megamod.merging.methods.table import METHODS
from megamod.merging.recipe_file import read_recipe
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.runs.studies.barrier import run_barrier_study
from megamod.runs.studies.barrier_recipe import read_barrier_study
from megamod.runs.studies.soup import write_greedy_soup
from megamod.runs.to_moe import MoeArgs, run_to_moe

WORDS = [f"w{n}" for n in range(25)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
IDS = torch.randint(5, 30, (4, 12), generator=torch.Generator().manual_seed(0))
BERT = BertConfig(
    vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=32, initializer_range=0.3,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=30, n_embd=24, n_layer=2, n_head=3, n_positions=32, initializer_range=0.3,
    bos_token_id=2, eos_token_id=3,
)  # fmt: skip
OURS = DemixConfig(
    vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=32,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=32, bos_token_id=2,
    eos_token_id=3,
)  # fmt: skip
KINDS = {"bert": (BertForMaskedLM, BERT), "gpt2": (GPT2LMHeadModel, GPT2)}
KINDS |= {"ours": (DemixForCausalLM, OURS)}


def save(model, folder: Path) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    tokenizer = {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def models_root(tmp_path_factory) -> Path:
    """For each kind a model, and two copies with permuted features."""
    root = tmp_path_factory.mktemp("aligned")
    for name, (kind, config) in KINDS.items():
        torch.manual_seed(1)
        first = kind(config)
        for parameter in first.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for number, model in enumerate((first, twin(first, 2), twin(first, 3))):
            save(model, root / f"{name}-{number}")
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(25, (60, 9), generator=generator).tolist()
    (root / "text.txt").write_text("\n".join(" ".join(WORDS[n] for n in row) for row in rows))
    return root


def recipe(
    models_root: Path, name: str, align: str, method: str = "linear", count: int = 3
) -> Path:
    """Write a recipe that merges the models of a kind."""
    weights = {"linear": "parameters: {weight: 1.0}", "slerp": "parameters: {t: 0.4}"}[method]
    lines = [f"  - model: {models_root / f'{name}-{number}'}" for number in range(count)]
    path = models_root / "recipe.yaml"
    base = f"base_model: {models_root / f'{name}-0'}\n" if method == "slerp" else ""
    text = f"merge_method: {method}\n{base}models:\n" + "\n".join(lines)
    path.write_text(f"{text}\n{weights}\ndtype: float32\n{align}\n")
    return path


def answers(folder: Path, kind: type) -> torch.Tensor:
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("how", ["weight", "activation", "orthogonal"])
@pytest.mark.parametrize("name", KINDS)
def test_models_that_compute_the_same_still_do_when_merged(
    models_root, tmp_path, name, how, method
):
    kind = KINDS[name][0]
    text = f", calibration: {{path: {models_root / 'text.txt'}}}" if how != "weight" else ""
    align = f"align: {{method: {how}{text}}}"
    file = recipe(models_root, name, align, method, 2 if method == "slerp" else 3)
    merge(read_recipe(file), tmp_path / "out")
    expected = answers(models_root / f"{name}-0", kind)
    torch.testing.assert_close(answers(tmp_path / "out", kind), expected, atol=2e-4, rtol=1e-3)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["align"]["method"] == how
    merge(read_recipe(recipe(models_root, name, "", method, 2)), tmp_path / "plain")
    assert (answers(tmp_path / "plain", kind) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ("align: {methods: weight}", "align: unknown key 'methods'; the nearest is 'method'"),
        ("align: {method: activation}", "align.calibration.path is missing"),
        ("align: {method: weight, head_follow_residual: false}", "is no longer tied"),
        ("align: {calibration: {path: nowhere.txt}}", "nowhere.txt: cannot be read"),
        ("align: 3", "align: 3 is not `key: value` lines"),
    ],
)
def test_alignments_that_cannot_be(models_root, tmp_path, align, message):
    with pytest.raises(UserError, match=message):
        merge(read_recipe(recipe(models_root, "bert", align)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_different_shapes(models_root, tmp_path):
    other = BertForMaskedLM(BertConfig(**BERT.to_dict() | {"intermediate_size": 48}))
    other.save_pretrained(tmp_path / "other")
    file = recipe(models_root, "bert", "align: {method: weight}", count=1)
    text = file.read_text().replace("parameters:", f"  - model: {tmp_path / 'other'}\nparameters:")
    file.write_text(text)
    with pytest.raises(UserError, match=r"intermediate"):
        merge(read_recipe(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def llamas(models_root) -> list[str]:
    """Folders of a Llama with gains of its own, and of two with its features in another order."""
    torch.manual_seed(1)
    first = LlamaForCausalLM(LLAMA)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    folders = [models_root / f"llama-{number}" for number in range(3)]
    for folder, model in zip(folders, (first, twin(first, 2), twin(first, 3)), strict=True):
        save(model, folder)
    return [*map(str, folders)]


def write_merge_recipe(file: Path, method: str, models: list[str], **blocks: object) -> None:
    """Write a recipe for a method, with values for those of its parameters that have no default."""
    content = {"merge_method": method, **blocks}
    if method in METHODS:
        entry = METHODS[method]
        models = models[: entry.models[1] + (entry.base == "needed")]
        required = [n for n, value in {**entry.per_model, **entry.overall}.items() if value is None]
        content["parameters"] = {name: 0.4 if name == "t" else 1.0 for name in required}
        if entry.base == "needed":
            content["base_model"] = models[0]
    content["models"] = [{"model": model} for model in models]
    file.write_text(yaml.safe_dump(content))


RECIPES = [*METHODS, "greedy_soup", "barrier study", "to_moe"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_orthogonal_maps(models_root, llamas, tmp_path, name):
    text, file, out = str(models_root / "text.txt"), tmp_path / "recipe.yaml", tmp_path / "out"
    align = {"method": "orthogonal", "calibration": {"path": text}}
    held_out = {"data": text, "max_seq_length": 16, "max_items": 4}
    write_merge_recipe(file, name, llamas, align=align)
    if name in ("fisher", "regmean"):
        with pytest.raises(UserError, match=f"{name} weights by statistics of the models as they"):
            merge(read_recipe(file), out)
        assert not out.exists()
        return
    if name == "barrier study":
        study = {"models": llamas, "task": "clm", "points": 3, "variants": {"maps": align}}
        file.write_text(yaml.safe_dump(study | held_out))
        run_barrier_study(read_barrier_study(file), out, torch.device("cpu"))
        for curve in (out / "curves/clm/maps").glob("*.json"):
            (losses,) = json.loads(curve.read_text())["losses"].values()
            assert max(losses) - min(losses) < 1e-4  # the same function all along
        return
    if name == "to_moe":
        run_to_moe(
            MoeArgs(models=llamas, output_dir=str(out), align=True, align_method="orthogonal")
        )
    elif name == "greedy_soup":
        write_merge_recipe(file, name, llamas, align=align, evaluation={"task": "clm", **held_out})
        write_greedy_soup(read_recipe(file), out)
    else:
        merge(read_recipe(file), out)
    # Of a single model nothing is aligned; the norms of several are folded.
    gains = [
        t for n, t in load_file(out / "model.safetensors").items() if n.endswith("norm.weight")
    ]
    assert all(bool((gain == 1).all()) for gain in gains) is (name != "passthrough") and gains
    if name != "to_moe":  # maps from weights alone find another function of the two
        expected = answers(llamas[0], AutoModelForCausalLM)
        merged = answers(out, AutoModelForCausalLM)
        torch.testing.assert_close(merged, expected, atol=2e-4, rtol=1e-3)
