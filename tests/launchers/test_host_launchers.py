"""`megamod pretrain` on a stock Llama, as a module under the two launchers that people use."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port
from runs.test_host_pretrain import LENGTH, make_place
from transformers import AutoModelForCausalLM

import megamod  # noqa: F401  (registers the models)
from megamod.data.lm.pretraining import LmData

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STARTED = {
    "deepspeed": ("--module", "--num_accelerators", "--untie", "feedforward"),
    "torchrun": ("-m", "--nproc_per_node", "--untie", "none"),
}


@torch.no_grad()
def compute_perplexity(model, data: LmData, domain: str) -> float:
    """exp of the mean nll over a split, from the logits."""
    total, count = 0.0, 0
    for batch in data.iterate_eval_batches(domain, "valid", 8, 0):
        logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        labels = batch["labels"]
        scores = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total, count = total - float(scores[labels != -100].sum()), count + int((labels >= 0).sum())
    return math.exp(total / count)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a stock Llama, and data of two domains made with its tokenizer."""
    return make_place(tmp_path_factory.mktemp("stock"))


@pytest.mark.slow  # each launcher imports the libraries several times
@pytest.mark.parametrize("launcher", STARTED)
def test_launchers_train_a_stock_model(launcher, root):
    """With experts under the one, and dense under the other."""
    module, ranks, *untie = STARTED[launcher]
    out, demix = root / launcher, untie[1] != "none"
    flags = dict(model=root / "llama", data=root / "bin", output_dir=out, max_seq_length=LENGTH)
    flags |= dict(max_steps=2, per_device_train_batch_size=1, global_batch_size=2)
    flags |= dict(report_to="none")
    if demix:
        flags |= dict(deepspeed=REPOSITORY / "ds_configs" / "cpu_smoke.json")
    command = [BIN / launcher, ranks, 2, "--master_port", free_port()]
    command += [module, "megamod", "pretrain", *untie]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # where deepspeed looks for python
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((out / "perplexity.json").read_text())["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    assert model.config.model_type == ("demix_host" if demix else "llama")
    data = LmData(str(root / "bin"), domains=None, block_size=LENGTH, domain_token=False)
    for domain in ("law", "med"):
        if demix:
            model.set_domain(domain)
        score = scores[domain if demix else "dense"][domain]
        assert compute_perplexity(model, data, domain) == pytest.approx(score, rel=1e-5)
