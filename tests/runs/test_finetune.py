"""Finetuning from flags to files: what is learned, on any ranks, across a cut, and mistakes."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from failures import failing
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from megamod.args import SafetyArgs
from megamod.errors import UserError
from megamod.evaluation.mux_pipeline import MuxPipeline
from megamod.flags import parse_args
from megamod.runs.finetune.args import (
    FinetuneOptimArgs,
    FinetuneRunArgs,
    OneTaskArgs,
    TaskArgs,
    WordArgs,
)
from megamod.runs.finetune.source import load_matching_tokenizer

WORDS = [f"w{n}" for n in range(12)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "##s"]
SEQUENCE = (FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs, OneTaskArgs, TaskArgs)
SIZE = dict(vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
SIZE |= dict(intermediate_size=32, max_position_embeddings=24, initializer_range=0.3)


class MixConfig(PreTrainedConfig):
    """A bag of words in which N rows share one state."""

    model_type = "mix_of_rows"
    vocab_size, hidden_size, num_instances, muxing_variant = len(VOCAB), 16, 2, "mean"
    task_loss_coeff, retrieval_loss_coeff = 0.0, 1.0  # as after a warm-up


class MixForSequenceClassification(PreTrainedModel):
    """Keys tell the rows apart, in the mix and out of it."""

    config_class = MixConfig

    def __init__(self, config: MixConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.keys = nn.Parameter(torch.randn(config.num_instances, config.hidden_size))
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def forward(self, input_ids, attention_mask) -> SequenceClassifierOutput:
        assert self.config.retrieval_loss_coeff == 0.0 and input_ids.shape[1] == 16
        states = (self.words(input_ids) * attention_mask[..., None]).mean(1)
        groups = states.unflatten(0, (-1, len(self.keys)))
        mixed = (groups * self.keys).mean(1, keepdim=True).expand_as(groups)
        output = torch.cat([mixed * self.keys, self.keys.expand_as(mixed)], -1).flatten(0, 1)
        return SequenceClassifierOutput(logits=self.classifier(output))


AutoConfig.register(MixConfig.model_type, MixConfig)
AutoModelForSequenceClassification.register(MixConfig, MixForSequenceClassification)


def sentence(label: int, random_: random.Random) -> str:
    """Words of the first half for label 0, of the second one for label 1."""
    return " ".join(random_.choices(WORDS[6 * label : 6 * label + 6], k=random_.randint(3, 6)))


def make_place(root: Path) -> Path:
    """A tokenizer, a model without weights, a sentence task, a regression and an entity task."""
    random_ = random.Random(5)
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    # Without dropout: its draws depend on the rank, as they should.
    BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(
        root / "new"
    )
    MixConfig().save_pretrained(root / "mix")
    for split, rows in (("train", 24), ("dev", 11), ("test", 5)):
        labels = [random_.randrange(2) for _ in range(rows)]
        texts = [sentence(label, random_) for label in labels]
        folder = root / "glue" / "SST-2"
        folder.mkdir(parents=True, exist_ok=True)
        if split == "test":
            lines = ["index\tsentence", *(f"{n}\t{text}" for n, text in enumerate(texts))]
        else:
            rows_ = zip(texts, labels, strict=True)
            lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows_)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        folder = root / "ner" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{split}.txt", "w") as file:
            for text in texts:
                for word in text.split():
                    file.write(f"{word}s\t{'B-HIGH' if WORDS.index(word) >= 6 else 'O'}\n")
                file.write("\n")
    return root


FAILED_AND_NOT = ("failed", "unfailing")


def flags(workspace: Path, output: Path, **changes: object) -> list[str]:
    """A short run as flags; values None are left out."""
    inputs = dict(
        task="sst-2", data_dir=workspace / "glue", model=workspace / "new", num_instances=1,
        tokenizer_name=workspace / "tokenizer", output_dir=output, max_seq_length=16, max_steps=12,
        per_device_train_batch_size=2, global_batch_size=8, per_device_eval_batch_size=4,
        eval_steps=4, save_steps=4, logging_steps=4, learning_rate=0.01, report_to="none",
        adam_epsilon=1e-3,  # a usual one makes updates of the rounding noise of the key bias
        do_train=True, do_eval=True,
    )  # fmt: skip
    inputs |= changes
    words = []
    for name, value in inputs.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def start(workspace: Path, output: Path, *, words: bool = False, **changes: object) -> None:
    """One command in this process."""
    from megamod.runs.finetune.one_task import prepare_one_task_model
    from megamod.runs.finetune.run import finetune

    if words:
        changes = {"task": "toy", "data_dir": workspace / "ner", **changes}
    classes = (*SEQUENCE, WordArgs) if words else SEQUENCE
    parsed = parse_args(*classes, argv=flags(workspace, output, **changes))
    finetune(prepare_one_task_model(*parsed[3:]), parsed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def alone(rank: int, root: Path) -> None:
    """Everything that is done in one process."""
    from megamod.runs.finetune import run

    start(root, root / "whole", do_predict=True, save_total_limit=9)
    start(root, root / "cut", stop_step=6)
    shutil.copytree(root / "cut", root / "cut-kept")
    start(root, root / "cut")
    start(root, root / "cut", do_predict=True, per_device_eval_batch_size=8)  # nothing to train
    with failing(run, "publish_model", call=2), pytest.raises(UserError, match="after step 4"):
        start(root, root / "failed", save_steps=0, eval_steps=2)  # step 4 is better than step 2
    assert (root / "failed" / "checkpoints" / "step-4").is_dir()
    start(root, root / "failed", save_steps=0, eval_steps=2)
    start(root, root / "unfailing", save_steps=0, eval_steps=2)
    start(root, root / "seeds", seeds=[1, 2], max_steps=2, eval_steps=0)
    start(root, root / "words", words=True, do_predict=True, max_steps=24, eval_steps=12)
    start(
        root, root / "again", words=True, do_train=None, do_predict=True, tokenizer_name=None,
        model=root / "words" / "model", predict_split="dev",
    )  # fmt: skip
    mixed = dict(model=root / "mix", num_instances=2, max_steps=40, eval_steps=0, do_predict=True)
    start(root, root / "mixed", **mixed, predict_split="dev", learning_rate=0.05)
    mixed = dict(model=root / "mixed" / "model", num_instances=None, tokenizer_name=None)
    start(root, root / "copies", **mixed, do_train=None, do_predict=None, ensemble=True)
    changes = dict(max_steps=None, num_train_epochs=1.5, do_eval=None, global_batch_size=16)
    start(root, root / "epochs", **changes)


def together(rank: int, root: Path) -> None:
    """The same on two ranks."""
    start(root, root / "two")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder in which all runs were made."""
    root = make_place(tmp_path_factory.mktemp("finetune"))
    on_ranks(1, alone, root)
    on_ranks(2, together, root)
    return root


def test_results_predictions_and_the_model_belong_together(workspace):
    out = workspace / "whole"
    record, scores = results(out), json.loads((out / "evaluations.json").read_text())
    assert [item["step"] for item in scores] == [4, 8, 12]
    values = [item["scores"]["dev"]["accuracy"] for item in scores]
    best = scores[values.index(max(values))]
    assert record["seeds"]["1"]["best"] == best
    assert record["mean"]["dev accuracy"] == record["task_score"] == max(values) > 0.8
    kept = weights(out / "checkpoints" / f"step-{best['step']}")
    assert all(torch.equal(kept[name], w) for name, w in weights(out / "model").items())

    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")

    def answer(text: str) -> int:
        with torch.no_grad():
            return int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())

    rows = (workspace / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    right = [answer(row.split("\t")[0]) == int(row.split("\t")[1]) for row in rows]
    assert np.mean(right) == pytest.approx(max(values))
    rows = (workspace / "glue" / "SST-2" / "test.tsv").read_text().splitlines()[1:]
    predicted = (out / "predictions" / "SST-2.tsv").read_text().splitlines()
    assert predicted[0] == "index\tprediction"
    assert predicted[1:] == [f"{n}\t{answer(row.split(chr(9))[1])}" for n, row in enumerate(rows)]


def test_two_ranks_learn_what_one_learns(workspace):
    first, two = (
        json.loads((workspace / n / "evaluations.json").read_text()) for n in ("whole", "two")
    )
    for a, b in zip(first, two, strict=True):
        assert a["scores"]["dev"]["loss"] == pytest.approx(b["scores"]["dev"]["loss"], abs=1e-5)
    ours, theirs = (weights(workspace / n / "checkpoints" / "step-12") for n in ("whole", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)


def test_a_run_that_was_cut_ends_like_one_that_was_not(workspace):
    assert len(json.loads((workspace / "cut-kept" / "evaluations.json").read_text())) == 2
    before = json.loads((workspace / "whole" / "evaluations.json").read_text())
    after = json.loads((workspace / "cut" / "evaluations.json").read_text())
    # The cut run was scored at its end, step 6, too: that is not forgotten and changes nothing.
    for scored in (before, after):
        assert all(item.pop("instances_per_second") > 0 for item in scored)
    assert [item for item in after if item["step"] != 6] == before
    ours, theirs = (weights(workspace / n / "checkpoints" / "step-12") for n in ("whole", "cut"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (workspace / "cut" / "predictions" / "SST-2.tsv").exists()


def test_an_evaluation_that_failed_is_repeated(workspace):
    ours, theirs = (
        json.loads((workspace / name / "evaluations.json").read_text()) for name in FAILED_AND_NOT
    )
    for scored in (ours, theirs):
        assert all(first.pop("instances_per_second") > 0 for first in scored)
    assert ours == theirs and [first["step"] for first in ours] == [2, 4, 6, 8, 10, 12]
    for folder in ("checkpoints/step-12", "model"):
        first, other = (weights(workspace / name / folder) for name in FAILED_AND_NOT)
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_seeds_have_means_and_deviations(workspace):
    record = results(workspace / "seeds")
    losses = [record["seeds"][seed]["best"]["scores"]["dev"]["loss"] for seed in "12"]
    assert losses[0] != losses[1]
    assert record["mean"]["dev loss"] == pytest.approx(np.mean(losses))
    assert record["deviation"]["dev loss"] == pytest.approx(np.std(losses, ddof=1))
    assert results(workspace / "seeds" / "seed-2")["seed"] == 2


def test_labels_of_words(workspace):
    record = results(workspace / "words")
    assert record["task"]["labels"] == ["O", "B-HIGH", "I-HIGH"]
    assert record["mean"]["dev f1"] > 0.9
    assert record["seeds"]["1"]["predicted"]["test"]["accuracy"] > 0.9
    model = AutoModelForTokenClassification.from_pretrained(workspace / "words" / "model")
    assert model.config.label2id == {"O": 0, "B-HIGH": 1, "I-HIGH": 2}
    rows = (workspace / "words" / "predictions" / "test.txt").read_text().split("\n\n")
    assert len(rows) == 5 and all(len(r.split("\t")) == 3 for r in rows[0].split("\n"))


def test_a_trained_model_is_scored_again_by_itself(workspace):
    trained, again = results(workspace / "words"), results(workspace / "again")
    assert again["mean"]["dev f1"] == pytest.approx(trained["mean"]["dev f1"])
    assert (workspace / "again" / "predictions" / "dev.txt").exists()
    assert not (workspace / "again" / "checkpoints").exists()


def test_instances_are_scored_apart(workspace):
    record = results(workspace / "mixed")
    scores = record["seeds"]["1"]["best"]["scores"]["dev"]
    slots = scores["accuracy_by_slot"]
    assert record["num_instances"] == 2 and len(slots) == 2
    assert scores["accuracy"] == pytest.approx((6 * slots[0] + 5 * slots[1]) / 11)
    assert scores["accuracy"] > 0.6
    model = AutoModelForSequenceClassification.from_pretrained(workspace / "mixed" / "model")
    assert (model.config.task_loss_coeff, model.config.retrieval_loss_coeff) == (1.0, 0.0)
    rows = (workspace / "mixed" / "predictions" / "sst-2_dev.tsv").read_text().splitlines()
    assert len(rows) == 12


def test_an_ensemble_is_the_mean_over_copies(workspace):
    """N = 2: a row of the model above shares its pass with itself or with any other."""
    record = results(workspace / "copies")
    scores = record["seeds"]["1"]["best"]["scores"]["dev"]
    assert "accuracy_by_slot" not in scores and scores["accuracy"] > 0.6
    assert record["instances_per_second"] > 0 and record["rows"]["dev"] == 11
    alone = results(workspace / "mixed")["seeds"]["1"]["best"]["scores"]["dev"]
    assert scores["loss"] != alone["loss"]
    classify = MuxPipeline.from_pretrained(
        workspace / "mixed" / "model", max_length=16, batch_size=2, ensemble=True, seed=1
    )
    rows = (workspace / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(row.split("\t") for row in rows), strict=True)
    answers = classify(list(texts))
    right = [output["label"] == label for output, label in zip(answers, labels, strict=True)]
    assert np.mean(right) == pytest.approx(scores["accuracy"])
    shares = [x["score"] if ok else 1 - x["score"] for x, ok in zip(answers, right, strict=True)]
    assert -np.log(shares).mean() == pytest.approx(scores["loss"], abs=1e-5)


def test_epochs_become_steps(workspace):
    assert results(workspace / "epochs")["seeds"]["1"] == {"step": 3}  # 1.5 x 24 / 16 = 2.25
    assert (
        "max_steps: 3  # --num_train_epochs 1.5" in (workspace / "epochs" / "run.yaml").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_instances=2), "--num_instances 2: the model .*new is made for 1"),
        (
            dict(model="mix", num_instances=None, per_device_train_batch_size=1),
            "of the 2 inst.* 2$",
        ),
        (dict(max_seq_length=40), "--max_seq_length 40: the model has positions for 24 tokens"),
        (dict(task="rte"), "no file of task rte"),
        (dict(task=None), "--task is missing"),
        (dict(do_train=None), "there are no weights in it, so it must be trained"),
        (dict(tokenizer_name=None), "(?s)tokenizer cannot be used .*--tokenizer_name"),
        (dict(model=None, config_name="bert_huge"), "is no folder and none of bert_tiny"),
        (
            dict(predict_split="valid", do_predict=True),
            "--predict_split valid: task sst-2 has train",
        ),
        (dict(seeds=["1", "x"]), "--seeds: 'x' is not a whole number"),
        (dict(metric_for_best_model="bleu"), "--metric_for_best_model bleu is none of accuracy"),
        (dict(do_train=None, do_eval=None), "nothing to do"),
        (dict(data_dir=None), "cannot be loaded from the hub"),
        (dict(words=True, label_column=5), "2 columns, there is no column 5"),
        (dict(per_device_train_batch_size=3), "--global_batch_size 8: must be a multiple of 3"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, workspace, changes, message):
    if changes.get("model") == "mix":
        changes = {**changes, "model": workspace / "mix"}
    with pytest.raises(UserError, match=message):
        start(workspace, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_sentence_longer_than_the_model(tmp_path, workspace):
    shutil.copytree(workspace / "glue", tmp_path / "glue")
    with open(tmp_path / "glue" / "SST-2" / "dev.tsv", "a") as file:
        file.write("w1 " * 23 + "\t1\n")
    with pytest.raises(UserError, match=r"dev.tsv, line 13: 25 tokens, the model has 24 positions"):
        start(workspace, tmp_path / "out", data_dir=tmp_path / "glue")


def test_a_tokenizer_of_another_model(tmp_path, workspace):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, "more"]) + "\n")
    with pytest.raises(
        UserError, match=r"has 20 ids, the model .* 19: they do not belong together"
    ):
        start(workspace, tmp_path / "out", tokenizer_name=tmp_path)


def test_a_tokenizer_without_padding(tmp_path):
    words = Tokenizer(WordLevel({"</s>": 0, "w1": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: an encoder's tokenizer is needed"):
        load_matching_tokenizer(None, str(tmp_path), None)


def test_a_model_of_other_labels(tmp_path, workspace):
    with pytest.raises(UserError, match="the model answers 0, 1, task sick-e has contradiction"):
        start(
            workspace,
            tmp_path / "out",
            task="sick-e",
            model=workspace / "whole" / "model",
            do_train=None,
        )


def test_labels_in_capitals_and_labels_without_names(tmp_path, workspace, caplog):
    """As in run_glue capitals do not count; LABEL_n are taken in the order of the task's labels."""
    model = AutoModelForSequenceClassification.from_pretrained(workspace / "whole" / "model")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = (workspace / "glue" / "SST-2" / "dev.tsv").read_text().replace("\t1", "\tgood")
    (folder / "dev.tsv").write_text(rows.replace("\t0", "\tbad"))
    spec = (
        "{name: t, kind: sequence, text: sentence, label: label, labels: [LABELS], "
        "files: {dev: dev.tsv}}"
    )
    scores = results(workspace / "whole")["mean"]
    for labels, names, warns in (
        ("good, bad", ["BAD", "Good"], False),
        ("bad, good", ["LABEL_0", "LABEL_1"], True),
    ):
        model.config.id2label = dict(enumerate(names))
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "t.yaml").write_text(spec.replace("LABELS", labels))
        caplog.clear()
        out = tmp_path / names[0]
        start(
            workspace, out, task=None, task_spec=tmp_path / "t.yaml", data_dir=folder,
            do_train=None,
            model=tmp_path / "model",
        )  # fmt: skip
        assert results(out)["task"]["labels"] == ["bad", "good"]
        assert results(out)["mean"]["dev accuracy"] == scores["dev accuracy"]
        assert ("LABEL_0 to LABEL_1: they are taken to be bad, good" in caplog.text) is warns


def test_a_model_without_its_head_is_not_scored(tmp_path, workspace):
    """Without training nothing may be drawn at random: no head, no encoder, no new model."""
    shutil.copytree(workspace / "whole" / "model", tmp_path / "model")
    whole = load_file(tmp_path / "model" / "model.safetensors")
    for name, shape in (("classifier.weight", None), ("classifier.bias", (3,))):
        tensors = {key: tensor for key, tensor in whole.items() if key != name}
        if shape is not None:
            tensors[name] = torch.zeros(shape)
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"1 of its weights are missing .* such as {name}"):
            start(workspace, tmp_path / "out", model=tmp_path / "model", do_train=None)
    with pytest.raises(UserError, match=r"--config_name bert_tiny: a new model .* --do_train"):
        start(workspace, tmp_path / "out", model=None, config_name="bert_tiny", do_train=None)
    assert not (tmp_path / "out").exists()
