"""Finetuning on many tasks from flags to files: on any ranks and ZeRO stage, across a cut."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from failures import failing
from ranks import on_ranks
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from megamod.args import SafetyArgs
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.models.ca_mtl.model import CaMtlForMultiTask
from megamod.runs.finetune.args import (
    FinetuneOptimArgs,
    FinetuneRunArgs,
    ManyTasksArgs,
    TaskListArgs,
)

WORDS = [f"w{n}" for n in range(12)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
SIZE = dict(vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
SIZE |= dict(intermediate_size=32, max_position_embeddings=24, initializer_range=0.2)
CLASSES = (FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs, ManyTasksArgs, TaskListArgs)
STAGES = (0, 1, 2, 3)


def make_place(root: Path) -> Path:
    """An encoder with weights, three tasks of GLUE and one of labels of tokens from a YAML file."""
    random_ = random.Random(7)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZE)).save_pretrained(root / "bert")
    (root / "bert" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    heads = {
        "SST-2": "sentence\tlabel",
        "RTE": "index\tsentence1\tsentence2\tlabel",
        "STS-B": "\t".join(["index", *"abcdef", "sentence1", "sentence2", "score"]),
    }
    for folder, head in heads.items():
        (root / "glue" / folder).mkdir(parents=True)
        for split, count in (("train", 20 if folder == "SST-2" else 12), ("dev", 9), ("test", 5)):
            lines = [head if split != "test" else head.rsplit("\t", 1)[0]]
            if folder == "SST-2" and split == "test":
                lines = ["index\tsentence"]
            for number in range(count):
                high = number % 2
                text = " ".join(random_.choices(WORDS[6 * high : 6 * high + 6], k=4))
                label = {"SST-2": high, "RTE": ("entailment", "not_entailment")[high]}
                label["STS-B"] = 4.5 * high + 0.25
                cells = {
                    "SST-2": [text] if split != "test" else [str(number), text],
                    "RTE": [str(number), text, "w3"],
                    "STS-B": [str(number), *"......", text, "w3"],
                }[folder]
                lines.append(
                    "\t".join([*cells, *([str(label[folder])] if split != "test" else [])])
                )
            (root / "glue" / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    for split in ("train", "dev", "test"):
        with open(root / f"{split}.txt", "w") as file:
            for _ in range(10):
                for word in random_.choices(WORDS, k=4):
                    file.write(f"{word} {'B-HIGH' if WORDS.index(word) >= 6 else 'O'}\n")
                file.write("\n")
    (root / "toy.yaml").write_text(
        "name: toy\nkind: token\ntext: 0\nlabel: 1\nheader: false\n"
        "files: {train: train.txt, dev: dev.txt, test: test.txt}\n"
    )
    return root


def parsed(root: Path, output: Path, **changes: object) -> tuple:
    """Arguments of a short run; values None are left out."""
    arguments = dict(
        tasks=["sst-2", "rte", "sts-b"], data_dir=root / "glue", model=root / "bert",
        output_dir=output, max_seq_length=16, max_steps=6, per_device_train_batch_size=2,
        global_batch_size=8, eval_steps=3, save_steps=3, logging_steps=3, learning_rate=0.01,
        report_to="none", adam_epsilon=1e-3, do_train=True, do_eval=True,
    )  # fmt: skip
    words = []
    for name, value in {**arguments, **changes}.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return parse_args(*CLASSES, argv=words)


def start(root: Path, output: Path, **changes: object) -> None:
    """One command in this process."""
    from megamod.runs.finetune.many_tasks import prepare_many_tasks_model
    from megamod.runs.finetune.run import finetune

    arguments = parsed(root, output, **changes)
    finetune(prepare_many_tasks_model(*arguments[3:]), arguments)


def spread(root: Path, name: str, sampling: str, stage: int) -> None:
    """Results that do not depend on the number of ranks or on the tasks of a rank."""
    config = root / f"zero{stage}.json"
    start(
        root, root / name / f"{sampling}-{stage}", mt_sampling=sampling, deepspeed=config,
        uncertainty_selection="global", task_loss_reduction="global", do_eval=None, save_steps=0,
        per_device_train_batch_size=1, max_steps=3, dropout=0.0,  # its draws depend on the rank
    )  # fmt: skip


CASES = {  # by number of ranks: sampling, and stage of ZeRO
    2: [("proportional", 0), ("proportional", 2), ("uncertainty", 0)],
    4: [("proportional", 1), ("proportional", 3), ("uncertainty", 3)],
}


def together(rank: int, root: Path, world: int) -> None:
    """All cases on these ranks."""
    for sampling, stage in CASES[world]:
        spread(root, f"on{world}", sampling, stage)


def alone(rank: int, root: Path) -> None:
    """Everything that is done in one process."""
    from megamod.runs.finetune import scores

    for sampling in ("proportional", "uncertainty"):
        spread(root, "one", sampling, 0)
    whole = dict(mt_sampling="uncertainty", do_predict=True, save_total_limit=9)
    start(root, root / "whole", **whole)
    start(root, root / "cut", **whole, stop_step=4)
    start(root, root / "cut", **whole)
    with failing(scores, "score_split", call=2), pytest.raises(UserError, match="step 3"):
        start(root, root / "failed", **whole, save_steps=0)
    start(root, root / "failed", **whole, save_steps=0)
    mixed = dict(tasks=["sst-2", str(root / "toy.yaml")], data_dir=None, do_predict=True)
    shutil.copytree(root / "glue" / "SST-2", root / "SST-2")
    start(
        root, root / "mixed", **mixed | dict(data_dir=[root / "glue", root]), variant="plain",
        max_steps=60, eval_steps=30, seeds=[4],
    )  # fmt: skip
    model = root / "mixed" / "seed-4" / "model"
    again = dict(do_train=None, model=model, data_dir=[root / "glue", root], do_eval=True)
    start(root, root / "again", **again, tasks=["sst-2", str(root / "toy.yaml")])
    start(
        root, root / "frozen", freeze_encoder_layers="0-0", variant="large", max_steps=2,
        mt_sampling="uniform", do_eval=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which all runs were made."""
    root = make_place(tmp_path_factory.mktemp("multitask"))
    for stage in STAGES:
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    on_ranks(1, alone, root)
    for world in CASES:
        on_ranks(world, together, root, world)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("world", "sampling", "stage"), [(world, *case) for world in CASES for case in CASES[world]]
)
def test_ranks_learn_what_one_process_learns(folder, world, sampling, stage):
    """Also where a task has no row on a rank, which has one, and under every stage of ZeRO."""
    ours = weights(folder / "one" / f"{sampling}-0" / "model")
    theirs = weights(folder / f"on{world}" / f"{sampling}-{stage}" / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)


def test_a_run_whose_evaluation_failed_goes_on_from_its_step(folder):
    ours, theirs = (weights(folder / n / "checkpoints" / "step-6") for n in ("whole", "failed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    scored = json.loads((folder / "failed" / "evaluations.json").read_text())
    assert [item["step"] for item in scored] == [3, 6]


def test_a_run_that_was_cut_chooses_and_learns_what_it_had(folder):
    ours, theirs = (weights(folder / n / "checkpoints" / "step-6") for n in ("whole", "cut"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    def shares(name: str) -> list:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if "loss" in r and r["step"] in (3, 6)]
        return [{k: v for k, v in r.items() if k.startswith("share/")} for r in records]

    assert shares("whole")[0] == shares("cut")[0] and len(shares("whole")[0]) == 3
    assert sum(shares("whole")[0].values()) == pytest.approx(1)
    assert (folder / "cut" / "task_shares.png").read_bytes()[:4] == b"\x89PNG"


def test_results_and_predictions_of_every_task(folder):
    record = results(folder / "whole")
    best = record["seeds"]["1"]["best"]
    scores = {name: record["mean"][name] for name in ("sst-2", "rte", "sts-b")}
    assert record["mean"]["average"] == pytest.approx(sum(scores.values()) / 3)
    assert scores["sst-2"] == best["tasks"]["sst-2"]["dev"]["accuracy"]
    peaks = record["seeds"]["1"]["by_task"]["sts-b"]["dev spearmanr"]
    assert peaks["value"] >= best["tasks"]["sts-b"]["dev"]["spearmanr"]
    for name in ("SST-2", "RTE", "STS-B"):
        lines = (folder / "whole" / "predictions" / f"{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 6
    assert lines[1].split("\t")[1].count(".") == 1  # a value
    start = json.loads((folder / "whole" / "start.json").read_text())
    assert "bert.encoder.layer.1.attention.self.query.weight" in start["loaded"]
    assert {"heads.weight", "bert.task_type_embeddings.weight"} <= set(start["new"])


def test_the_model_reloads_as_what_it_is(folder):
    model = AutoModel.from_pretrained(folder / "whole" / "model").eval()
    assert isinstance(model, CaMtlForMultiTask) and model.config.variant == "base"
    assert model.config.tasks == ["sst-2", "rte", "sts-b"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole" / "model")
    row = (folder / "glue" / "SST-2" / "test.tsv").read_text().splitlines()[1].split("\t")[1]
    with torch.no_grad():
        fields = tokenizer(row, return_tensors="pt")
        logits = model(**fields, task_ids=torch.zeros(1, dtype=torch.int64)).logits[0]
    said = (folder / "whole" / "predictions" / "SST-2.tsv").read_text().splitlines()[1]
    assert said == f"0\t{int(logits.argmax())}"


def test_labels_of_words_are_a_task_like_others(folder):
    record = results(folder / "mixed")["seeds"]["4"]
    assert record["best"]["tasks"]["toy"]["dev"]["f1"] > 0.9
    assert record["best"]["tasks"]["sst-2"]["dev"]["accuracy"] > 0.8
    assert (folder / "mixed" / "seed-4" / "predictions" / "toy_test.txt").exists()
    again = results(folder / "again")["seeds"]["1"]["best"]
    assert again["tasks"] == record["best"]["tasks"]


def test_frozen_blocks_stay_and_their_conditions_move(folder):
    before, after = weights(folder / "bert"), weights(folder / "frozen" / "model")
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"):
        assert torch.equal(before[f"bert.{name}"], after[f"bert.{name}"])
    moved = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(before[moved], after[moved])
    assert after["bert.encoder.layer.0.attention.self.random_weight_matrix"].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=["sst-2", "nothing"]), r"--tasks nothing: is none of cola, mnli"),
        (dict(tasks=["cola"]), "no file of task cola"),
        (dict(tasks=["sst-2", "sst-2"]), "sst-2 is listed twice"),
        (dict(tasks=["SST-2", "sst-2"]), "sst-2 is listed twice"),
        (dict(max_seq_length=12), "max_seq_length 12 does not divide hidden_size 32"),
        (dict(max_seq_length=64), "--max_seq_length 64: the model takes 24 tokens"),
        (dict(freeze_encoder_layers="0-2"), "has blocks 0 to 1"),
        (dict(freeze_encoder_layers="1-0"), "such as 0-5"),
        (dict(uniform_mt_sampling=True, mt_sampling="sequential"), "give one"),
        (dict(use_mt_uncertainty=True, uniform_mt_sampling=True), "give one"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    from megamod.runs.finetune.many_tasks import prepare_many_tasks_model

    root = make_place(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare_many_tasks_model(*parsed(root, root / "out", **changes)[3:])
    assert not (root / "out").exists()


def test_new_weights_are_reported_as_new(tmp_path, caplog):
    from megamod.runs.finetune.many_tasks import prepare_many_tasks_model

    root = make_place(tmp_path)
    shape = dict(model=None, config_name="bert_tiny", tokenizer_name=root / "bert")
    prepared = prepare_many_tasks_model(*parsed(root, root / "out", **shape)[3:])
    caplog.set_level("INFO", "megamod")
    count = len(list(prepared.make_module(1).named_parameters()))
    assert caplog.messages == [f"new weights: {count} tensors"]


def test_mistakes_about_a_trained_model(folder):
    from megamod.runs.finetune.many_tasks import prepare_many_tasks_model

    model = dict(model=folder / "whole" / "model", do_train=None)
    with pytest.raises(UserError, match=r"--tasks sst-2 rte: .* has heads for sst-2 rte sts-b"):
        prepare_many_tasks_model(*parsed(folder, folder / "x", **model, tasks=["sst-2", "rte"])[3:])
    with pytest.raises(UserError, match="is of variant base"):
        prepare_many_tasks_model(*parsed(folder, folder / "x", **model, variant="plain")[3:])
    (folder / "bad" / "SST-2").mkdir(parents=True)
    (folder / "bad" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\nw1 w2\t7\n")
    wrong = [folder / "bad", folder / "glue"]
    with pytest.raises(UserError, match=r"dev.tsv, line 2: label '7' is not one of task sst-2"):
        prepare_many_tasks_model(*parsed(folder, folder / "x", **model, data_dir=wrong)[3:])


def test_the_recipe_is_that_of_the_release():
    recipe = Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "ca_mtl_base.yaml"
    run, _, optim, stage, args = parse_args(*CLASSES, argv=[str(recipe), "--output_dir", "out"])
    assert (stage.model, stage.variant, stage.parse_frozen_blocks()) == (
        "google-bert/bert-base-cased",
        "base",
        (0, 5),
    )
    assert (args.mt_sampling, args.max_seq_length, len(args.tasks)) == ("uncertainty", 128, 8)
    assert (optim.learning_rate, stage.num_train_epochs, run.seed) == (2e-5, 5.0, 12)
