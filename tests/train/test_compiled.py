"""Compiled blocks train the same model, under the same names."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from saved_models import DOMAINS as SAVED
from saved_models import LENGTH as SAVED_LENGTH
from saved_models import make_data
from torch import nn
from train.test_resume import tensors_of
from train.tiny_runs import DOMAINS, LENGTH, MICRO, make_batch, run_tiny, tiny_config
from transformers import BertConfig, BertForMaskedLM

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.errors import UserError
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.models.mux.bert import MuxBertForMaskedLM
from megamod.models.mux.configuration import MuxBertConfig
from megamod.train.compiled import check_compile_stage, check_compiler, compile_blocks

NO_COMPILER = "inductor needs a C++ compiler"
WITHOUT_CODE = partial(compile_blocks, backend="aot_eager")  # traced and cut as by inductor
CASES = [("none", 2), ("feedforward", 1), ("transformer", 2), ("all", 1)]
SMALL = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=45,
    max_position_embeddings=16,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def recompute(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()
    WITHOUT_CODE(model)


def train_cases(rank: int, root: Path) -> None:
    """Straight runs, compiled or not; and compiled ones that are cut after two steps."""
    logging.disable(logging.WARNING)
    for untie, stage in CASES:
        options = dict(domains=DOMAINS[:2]) if untie == "all" else {}
        for name, prepare in (("plain", lambda model: None), ("compiled", WITHOUT_CODE)):
            folder = root / f"{untie}-{name}"
            run_tiny(folder, untie, stage, 4, prepare=prepare, **options)
    run_tiny(root / "feedforward-recomputed", "feedforward", 1, 4, prepare=recompute)
    for name, then in (("cut", WITHOUT_CODE), ("left", lambda model: None)):
        run_tiny(root / f"feedforward-{name}", "feedforward", 1, 2, prepare=WITHOUT_CODE)
        run_tiny(root / f"feedforward-{name}", "feedforward", 1, 4, prepare=then)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("compiled")
    on_ranks(2, train_cases, root)
    return root


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(folder / "checkpoints" / "step-4")


@pytest.mark.slow
@pytest.mark.parametrize("untie", [untie for untie, _ in CASES])
def test_checkpoints_are_those_of_a_run_without(trained, untie):
    plain, compiled = (checkpoint(trained / f"{untie}-{way}") for way in ("plain", "compiled"))
    assert plain.keys() == compiled.keys() and len(plain) > 20
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recomputed", "cut", "left"])
def test_recomputing_and_resuming(trained, way):
    expected, got = (checkpoint(trained / f"feedforward-{name}") for name in ("compiled", way))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        if way == "cut":
            assert torch.equal(got[name], tensor), name
        else:
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def run(root: Path, output: str, untie: str, compiled: bool, stop: int = 4) -> None:
    """Four steps, as launchers/pretrain.py makes them."""
    from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

    pretrain_causal_lm(
        RunArgs(
            output_dir=str(root / output),
            max_steps=4,
            stop_step=stop,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            eval_batches=1,
            logging_steps=1,
            report_to="none",
        ),
        SafetyArgs(),
        ModelArgs(
            untie=untie,
            torch_compile=compiled,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        LoraArgs(),
        OptimArgs(learning_rate=1e-3, adam_epsilon=1e-4, warmup_ratio=0.0),
        DataArgs(data=str(root / "bin"), domains=list(SAVED[:2]), max_seq_length=SAVED_LENGTH),
    )


def pretrain_all(rank: int, root: Path) -> None:
    logging.disable(logging.WARNING)
    for untie in ("none", "feedforward"):
        run(root, f"{untie}-plain", untie, compiled=False)
        run(root, f"{untie}-compiled", untie, compiled=True)
    run(root, "feedforward-left", "feedforward", compiled=True, stop=2)
    run(root, "feedforward-left", "feedforward", compiled=False)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.long  # compiles eight times
@pytest.mark.skipif(shutil.which("g++") is None, reason=NO_COMPILER)
def test_pretraining(tmp_path):
    make_data(tmp_path / "bin")
    on_ranks(1, pretrain_all, tmp_path)
    for untie in ("none", "feedforward"):
        plain, compiled = (tmp_path / f"{untie}-{way}" for way in ("plain", "compiled"))
        assert len(losses(plain)) == 4
        assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
        assert exported(compiled).keys() == exported(plain).keys()
        assert (compiled / "model" / "config.json").read_text() == (
            plain / "model" / "config.json"
        ).read_text()
    expected = losses(tmp_path / "feedforward-plain")
    assert losses(tmp_path / "feedforward-left") == pytest.approx(expected, abs=1e-5)


def four_losses(model: nn.Module, **fields: torch.Tensor) -> list[float]:
    optimizer, result = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4), []
    for _ in range(4):
        loss = model(**fields).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(float(loss))
    return result


def mux_bert() -> nn.Module:
    torch.manual_seed(3)
    return MuxBertForMaskedLM(MuxBertConfig(**SMALL, num_instances=2, cls_token_id=2))


def bert() -> nn.Module:
    torch.manual_seed(3)
    return BertForMaskedLM(BertConfig(**SMALL))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "backend"),
    [pytest.param(mux_bert, "inductor", marks=pytest.mark.long), (bert, "aot_eager")],
)
def test_encoders(make, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip(NO_COMPILER)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 45, (4, 8), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100)
    plain, compiled = make(), make()
    assert compile_blocks(compiled, backend) == 2
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    expected = four_losses(plain, input_ids=ids, labels=labels)
    assert four_losses(compiled, input_ids=ids, labels=labels) == pytest.approx(expected, abs=1e-5)


def test_domains_share_what_is_compiled():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = DemixForCausalLM(tiny_config("feedforward"))
    initialise_lm_weights(model, seed=5)
    WITHOUT_CODE(model)
    positions, result = torch.arange(LENGTH).expand(MICRO, LENGTH), []
    for domain in DOMAINS:
        batch = make_batch(domain, 0, 0, ragged=False)
        model(
            batch["input_ids"], position_ids=positions, shift_labels=batch["labels"], domain=domain
        ).loss.backward()
        result.append(counters["stats"]["unique_graphs"])
    assert result == [result[0]] * len(DOMAINS)  # attention, expert, sum: once for all of them
    assert result[0] == 3


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match=r"--torch_compile with ZeRO stage 3: .* stage 1 or 2"):
        check_compile_stage({"zero_optimization": {"stage": 3}})
    check_compile_stage({"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="compiler no-such-compiler is not on this machine"):
        check_compiler("cpu")
    check_compiler("cuda")
