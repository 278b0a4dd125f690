"""Finetuning from the layout of the MUX-PLM release, whose config.json calls itself a BERT."""

from pathlib import Path

import pytest
import torch
from test_finetune import sentence

from megamod.convert.datamux import export
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.models.mux.bert import MuxBertForMaskedLM, MuxBertForSequenceClassification
from megamod.models.mux.configuration import MuxBertConfig
from megamod.runs.finetune import many_tasks, one_task
from megamod.runs.finetune.args import ManyTasksArgs, OneTaskArgs, TaskArgs, TaskListArgs

VOCAB = ["[PAD]", "[UNK]", *(f"x{n}" for n in range(2, 101)), "[CLS]", "[SEP]", "[MASK]"]
SIZE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A released folder with a tokenizer, and a small SST-2."""
    import random

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [*VOCAB, *(f"w{n}" for n in range(12)), *(f"y{n}" for n in range(700))]
    torch.manual_seed(0)
    model = MuxBertForMaskedLM(MuxBertConfig(**SIZE, vocab_size=len(words), num_instances=2))
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "released").mkdir()
    export(tmp_path / "ours", tmp_path / "released")
    (tmp_path / "released" / "vocab.txt").write_text("\n".join(words) + "\n")
    source = random.Random(1)
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "dev"):
        rows = [f"{sentence(n % 2, source)}\t{n % 2}" for n in range(8)]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return tmp_path


def flags(folder: Path) -> list[str]:
    return ["--model", str(folder / "released"), "--do_train", "--data_dir", str(folder)]


def test_the_multiplexer_is_kept(folder):
    argv = [*flags(folder), "--num_instances", "2", "--task", "sst-2"]
    prepared = one_task.prepare_one_task_model(*parse_args(OneTaskArgs, TaskArgs, argv=argv))
    assert prepared.instances == 2 and prepared.config.model_type == "mux_bert"
    model = prepared.make_module(1)
    assert type(model) is MuxBertForSequenceClassification
    kept = MuxBertForMaskedLM.from_pretrained(folder / "ours").state_dict()
    new = model.state_dict()
    shared = [name for name in kept if name.startswith(("bert.", "demux_module.", "instance_"))]
    assert len(shared) > 25 and all(torch.equal(kept[name], new[name]) for name in shared)


def test_many_tasks_need_a_stock_encoder(folder):
    argv = [*flags(folder), "--tasks", "sst-2"]
    with pytest.raises(UserError, match="is a model of type 'mux_bert'; needed is 'bert'"):
        many_tasks.prepare_many_tasks_model(*parse_args(ManyTasksArgs, TaskListArgs, argv=argv))
