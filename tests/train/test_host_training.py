"""Stock families on ranks: the steps of one process, and the folder that transformers reads."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from torch.nn import functional
from train.test_sharing import relative
from train.tiny_runs import DOMAINS, PEAK, RECIPE, WARMUP, make_batch, reference, run_tiny
from transformers import AutoModelForCausalLM

from megamod.states.weights import read_weights
from megamod.train.optim import make_adamw, make_linear_schedule, set_learning_rate

STEPS, CLIP, TWO = 3, 0.5, DOMAINS[:2]
# One family of each shape: transposed products, two attributes, softcap and tied head, two
# arguments, additions in place, persistent buffers.
SHAPES = ("llama", "gpt2", "opt", "gemma2", "bloom", "falcon", "apertus")
CASES = [
    *(("llama", "none", stage) for stage in (0, 1, 2, 3)),
    *(("gemma2", "none", stage) for stage in (3,)),
    *(("mixtral", "none", stage) for stage in (1,)),
    *((family, "feedforward", 2) for family in SHAPES),
    ("llama", "feedforward", 1),
    ("llama", "all", 1),
    ("gpt2", "all", 3),
]


def name_of(family: str, untie: str, stage: int) -> str:
    return f"{family}-{untie}-{stage}"


def train_cases(rank: int, root: Path) -> None:
    for family, untie, stage in CASES:
        run_tiny(
            root / name_of(family, untie, stage),
            untie,
            stage,
            STEPS,
            clip=CLIP,
            domains=TWO,
            family=family,
            save_steps=2 if (family, untie, stage) == RESUMED else 0,
        )
    for stage in (0, 1, 2, 3):
        untie = "feedforward" if stage in (1, 2) else "none"
        run_tiny(root / f"bare-{stage}", untie, stage, STEPS, clip=CLIP, decay_vectors=False)
    # Cut after two steps: once as it was, once on other stages.
    family, untie, stage = RESUMED
    root = root / "resumed"
    run_tiny(root, untie, stage, 2, clip=CLIP, domains=TWO, family=family)
    run_tiny(root, untie, stage, STEPS, clip=CLIP, domains=TWO, family=family)


RESUMED = ("gemma2", "feedforward", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hosts")
    on_ranks(2, train_cases, root)
    return root


expected = cache(reference)


def folder_of(root: Path, *case: object) -> Path:
    return root / name_of(*case) / "checkpoints" / f"step-{STEPS}"


def dense_loop(family: str) -> dict[str, torch.Tensor]:
    """Weights after the steps of the stock class alone, its logits and torch's cross entropy."""
    model = tiny_stock(family, seed=5).train()
    optimizer, schedule = (
        make_adamw(list(model.parameters()), **RECIPE),
        make_linear_schedule(PEAK, WARMUP, 10),
    )
    for step in range(STEPS):
        batches = [make_batch(domain, step, index) for domain in TWO for index in range(2)]
        items = sum(batch["tokens"] for batch in batches)
        for batch in batches:
            mask = batch["attention_mask"].long()
            logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
            labels = batch["labels"].flatten()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            (loss / items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        set_learning_rate(optimizer, schedule(step))
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_steps_are_those_of_one_process(trained, case):
    family, untie, _ = case
    folder = folder_of(trained, *case)
    if untie == "none":
        assert relative(read_weights(folder), dense_loop(family)) <= 1e-6
        return
    reference_weights = expected(untie, STEPS, 2, CLIP, TWO, family)
    if untie == "all":
        for domain, (weights, _) in reference_weights.items():
            assert relative(read_weights(folder / domain), weights) <= 1e-6
        return
    saved = read_weights(folder)
    trained_names = reference_weights[0].keys()
    assert relative({n: saved[n] for n in trained_names}, reference_weights[0]) <= 1e-6
    # Apertus alone has buffers that belong to the state.
    buffers = {name.rsplit(".", 1)[1] for name in saved.keys() - trained_names}
    assert buffers == ({"beta", "eps"} if family == "apertus" else set())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_and_biases_without_weight_decay(trained, stage):
    untie = "feedforward" if stage in (1, 2) else "none"
    weights, _ = reference(untie, STEPS, 2, CLIP, decay_vectors=False)
    assert relative(read_weights(trained / f"bare-{stage}/checkpoints/step-3"), weights) <= 1e-6
    decayed, _ = expected(untie, STEPS, 2, CLIP)
    assert relative(weights, decayed) > 1e-5


def test_folders_load_where_they_should(trained):
    dense = folder_of(trained, "llama", "none", 3)
    fields = json.loads((dense / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["model_type"] == "llama"
    assert not {"domains", "untie", "host"} & fields.keys()
    stock = type(tiny_stock("llama"))
    for folder in (dense, folder_of(trained, "llama", "all", 1) / "law"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(model) is stock
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert "library_name: transformers" in (folder / "README.md").read_text()
    for family in SHAPES:
        folder = folder_of(trained, family, "feedforward", 2)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert type(model).__name__.startswith("Demix") and model.config.domains == list(TWO)
        state = read_weights(folder)
        for name, tensor in model.state_dict().items():
            assert name not in state or torch.equal(tensor, state[name])
        names = {path.name for path in folder.glob("*.safetensors")}
        assert {"shared.safetensors", "expert_law.safetensors", "expert_med.safetensors"} <= names


def test_a_resumed_run_is_bitwise_that_which_was_not_cut(trained):
    whole = read_weights(folder_of(trained, *RESUMED))
    cut = read_weights(trained / "resumed" / "checkpoints" / f"step-{STEPS}")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
