"""A checkpoint of an earlier version goes on as if nothing had changed, bit for bit.

`old_checkpoint/` holds the first two steps of the run made here, written before the batches, the
settings and the checkpoint's code were rearranged.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix
from megamod.flags import parse_args

OLD = Path(__file__).parent / "old_checkpoint"
FLAGS = """
--model tiny --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --untie feedforward
--max_steps 4 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2
--global_batch_size 16 --max_seq_length 12 --learning_rate 0.01 --warmup_ratio 0.25
--max_grad_norm 1.0 --seed 7 --report_to none --data bin --eval_batches 1
"""


def write_data(folder: Path) -> None:
    """A data-bin of two domains that no later version of preprocessing can change."""
    header = {"format": 1, "vocab_size": 40, "items": "document", "domains": {}}
    header |= {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    for number, domain in enumerate(("law", "med")):
        (folder / domain).mkdir(parents=True)
        header["domains"][domain] = {}
        for split, items in (("train", 30), ("valid", 4)):
            tokens = 4 + (np.arange(items * 9) * (number + 3)) ** 2 % 36
            tokens[8::9] = 2
            with IndexedWriter(folder / format_split_prefix(domain, split), np.uint16) as writer:
                for item in np.split(tokens, items):
                    writer.add_item(item)
            counts = {"items": items, "tokens": items * 9, "bytes": items * 40, "max_id": 39}
            header["domains"][domain][split] = counts
    (folder / "databin.json").write_text(json.dumps(header))


def run(output: str) -> None:
    from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

    classes = (RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs)
    pretrain_causal_lm(*parse_args(*classes, argv=[*FLAGS.split(), "--output_dir", output]))


def both(rank: int, root: Path) -> None:
    """The run without a pause, and the one that begins at the old checkpoint."""
    logging.disable(logging.WARNING)
    os.chdir(root)  # run.yaml names the folders
    write_data(root / "bin")
    run("whole")
    shutil.copytree(OLD, root / "resumed" / "checkpoints" / "step-2")
    run("resumed")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("old")
    on_ranks(1, both, root)
    return root


def test_files_and_records_are_as_they_were(root):
    new = root / "whole" / "checkpoints" / "step-2"
    assert sorted(p.name for p in new.iterdir()) == sorted(p.name for p in OLD.iterdir())
    ours, theirs = (json.loads((folder / "state.json").read_text()) for folder in (new, OLD))
    assert theirs.pop("settings").items() <= ours.pop("settings").items()
    assert ours == theirs
    for file in OLD.glob("*.safetensors"):
        with safe_open(file, "pt") as theirs, safe_open(new / file.name, "pt") as ours:
            assert ours.metadata() == theirs.metadata()
            assert list(ours.keys()) == list(theirs.keys())


def assert_close(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare in units of each tensor's largest element.

    The gradient of a bias of keys is rounding alone: softmax is invariant to it.
    """
    assert expected and values.keys() == expected.keys()
    for name, tensor in values.items():
        if name.endswith("k_proj.bias"):
            continue
        atol = 1e-2 * float(expected[name].abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol)


def test_an_old_checkpoint_goes_on_bit_for_bit(root):
    """Bit for bit where this machine rounds as the one that wrote the old checkpoint."""
    new, old = tensors(root / "whole" / "checkpoints" / "step-2"), tensors(OLD)
    assert_close(new, old)
    rounds_alike = all(torch.equal(tensor, old[name]) for name, tensor in new.items())
    for folder in ("checkpoints/step-4", "model"):
        whole, resumed = (tensors(root / name / folder) for name in ("whole", "resumed"))
        assert_close(resumed, whole)
        if rounds_alike:
            assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
