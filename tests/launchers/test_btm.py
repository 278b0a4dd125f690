"""launchers/btm.py with real jobs: two rounds of experts, their average and their mixture."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs.test_host_pretrain import make_place
from safetensors.torch import load_file

from megamod.data.corpus.binarize import binarize

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """
model: tiny
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
seed_share: 0
rounds: [law med, code]
average: true
evaluate: true
prior_sequences: 4
max_steps: 6
per_device_train_batch_size: 2
global_batch_size: 6
logging_steps: 1
save_steps: 0
eval_batches: 2
max_seq_length: 32
learning_rate: 3.0e-3
report_to: none
slots: 2
"""


def start(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", REPOSITORY / "launchers" / "btm.py", *words]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGAMOD_MAX_STEPS": "4"},
        timeout=500,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_two_rounds(tmp_path):
    draw = random.Random(0)
    texts = {
        domain: [
            " ".join(draw.choices([f"{domain}{c}" for c in "abcdefgh"], k=40)) for _ in range(200)
        ]
        for domain in ("law", "med", "code")
    }
    binarize(texts, "sentencepiece:300", tmp_path / "bin")
    (tmp_path / "recipe.yaml").write_text(RECIPE + f"data: {tmp_path / 'bin'}\n")
    out = tmp_path / "out"
    done = start(tmp_path / "recipe.yaml", "--output_dir", out)
    assert done.returncode == 0, done.stdout + done.stderr

    # The environment's --max_steps holds for the driver, which hands it on.
    built = json.loads((out / "forest.json").read_text())["experts"]
    assert [expert["domain"] for expert in built] == ["law", "med", "code"]
    assert [expert["updates"] for expert in built] == [4, 4, 4]
    assert [expert["tokens"] for expert in built] == [4 * 2 * 32] * 3
    assert "all together 768 tokens; a dense run of 4 steps x 6 sequences has 768" in done.stdout

    # The third begins as the average of the first two, weighted by their prior.
    prior = json.loads((out / "priors" / "code.json").read_text())
    share = dict(zip(prior["domains"], prior["prior"], strict=True))
    assert set(share) == {"law", "med"} and sum(share.values()) == pytest.approx(1)
    assert {round(parent["weight"], 6) for parent in built[2]["parents"]} == {
        round(weight, 6) for weight in share.values()
    }
    law, med, code = (weights(out / "experts" / d / "model") for d in ("law", "med", "code"))
    began = weights(out / "experts" / "code" / "checkpoints" / "step-0")
    for name, tensor in began.items():
        mean = share["law"] * law[name].double() + share["med"] * med[name].double()
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
        assert tensor.ndim < 2 or not torch.equal(tensor, code[name])

    for name, tensor in weights(out / "average").items():
        mean = (law[name].double() + med[name].double() + code[name].double()) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    table = done.stdout.partition("\nperplexity")[2].splitlines()
    assert re.fullmatch(r" +own expert, valid +mixture, test +average, test", table[0])
    for line, domain in zip(table[1:4], texts, strict=True):
        scores = [line.split()[0], *map(float, line.split()[1:])]
        saved = json.loads((out / "experts" / domain / "perplexity.json").read_text())
        assert scores[0] == domain and len(scores) == 4
        assert scores[1] == pytest.approx(saved["perplexity"]["dense"][domain], abs=0.01)
    for name in ("mixture", "average"):
        text = (out / "evaluation" / f"{name}.json").read_text()
        assert all(f'"{domain}"' in text for domain in texts)


STOCK = """
model: {folder}
data: {data}
seed_share: 0.5
average: true
max_steps: 4
per_device_train_batch_size: 1
global_batch_size: 4
save_steps: 0
eval_batches: 1
max_seq_length: 16
report_to: none
slots: 1
"""


@pytest.mark.long  # three jobs, each a process of its own
def test_a_campaign_from_a_stock_model(tmp_path):
    make_place(tmp_path)
    recipe = STOCK.format(folder=tmp_path / "llama", data=tmp_path / "bin")
    (tmp_path / "recipe.yaml").write_text(recipe)
    out = tmp_path / "out"
    done = start(tmp_path / "recipe.yaml", "--output_dir", out)
    assert done.returncode == 0, done.stdout + done.stderr
    law, med = (weights(out / "experts" / domain / "model") for domain in ("law", "med"))
    for name, tensor in weights(out / "average").items():
        torch.testing.assert_close(tensor, (law[name] + med[name]) / 2, rtol=0, atol=1e-6)
    assert any(not torch.equal(law[name], tensor) for name, tensor in med.items())
    for folder in (out / "seed" / "model", out / "experts" / "law" / "model", out / "average"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], "domains" in config) == ("llama", False)


@pytest.mark.long  # four jobs, each a process of its own
def test_a_campaign_of_adapters(tmp_path):
    """A seed, two adapters of it, and their average as a whole model."""
    make_place(tmp_path)
    recipe = STOCK.format(folder=tmp_path / "llama", data=tmp_path / "bin")
    (tmp_path / "recipe.yaml").write_text(recipe + "lora_rank: 2\nlearning_rate: 0.02\n")
    out = tmp_path / "out"
    done = start(tmp_path / "recipe.yaml", "--output_dir", out)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [out / "experts" / domain / "model" for domain in ("law", "med")]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for folder in folders:
        fields = json.loads((folder / "adapter_config.json").read_text())
        assert fields["base_model_name_or_path"] == str(out / "seed" / "model")
        assert fields["lora_alpha"] == 4 and not (folder / "model.safetensors").exists()
    built = json.loads((out / "forest.json").read_text())["experts"]
    assert [expert["updates"] for expert in built] == [2, 2]
    seed, changed = weights(out / "seed" / "model"), 0
    for name, tensor in weights(out / "average").items():
        mean, prefix = seed[name].double(), f"base_model.model.{name.removesuffix('.weight')}"
        for adapter in adapters:
            if f"{prefix}.lora_A.weight" in adapter:  # updates are scaled by alpha / rank, so by 2
                down, up = (adapter[f"{prefix}.lora_{part}.weight"].double() for part in "AB")
                mean, changed = mean + 2 * up @ down / 2, changed + 1
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    assert changed == len(adapters[0])
