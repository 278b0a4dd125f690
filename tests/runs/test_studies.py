"""Studies from file to table: tiny runs in one process, their JSON files, and what is read off."""

import json
import math
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import on_ranks

from megamod.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = {
    "law": ["court", "judge", "plea", "oath", "writ"],
    "code": ["loop", "if", "else", "while", "def"],
}
COMMON = dict(
    model="tiny", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_seq_length=16, per_device_train_batch_size=4, learning_rate=0.01, max_steps=4,
)  # fmt: skip
LLAMA = {"model": None, "family": "llama", "seed_share": 0.5}
TRAINED = {"mixture_train": "all", "mixture_share": 0.25, "mixture_learning_rate": 0.001}
STUDY = {
    "title": "tiny",
    "kind": "language_models",
    "text": {
        "domains": ["law", "code"],
        "novel": ["tax"],
        "tokenizer": "sentencepiece:290",
        "held_out_bytes": 400,
    },
    "common": COMMON,
    "rungs": {"short": {}},
    "arms": {
        "dense": {"score_novel": True},
        "demix": {"untie": "feedforward", "per_device_train_batch_size": 2, "global_batch_size": 4},
        "btm50": {"seed_share": 0.5, "expert_learning_rate": 0.005},
        "random": {"seed_share": 0, "random_split": True},
        "strangers": {"seed_share": 0.5, "strangers": "orthogonal", "strangers_refine_steps": 1},
        "sparse": {**LLAMA, "mixture_router": "calibrated", "mixture_topk": 1, **TRAINED},
        "anchored": {**LLAMA, "anchor": True, "mixture_topk": 3},
        "more": {
            "untie": "feedforward",
            "per_device_train_batch_size": 2,
            "global_batch_size": 4,
            "max_grad_norm": 1.0,
            "adapt_to": "tax",
            "adapt_method": "feedforward",
            "adapt_steps": 3,
            "adapt_learning_rate": 0.02,
        },
    },
    "seeds": [1],
    "table": {
        "value": "perplexity",
        "baseline": ["dense", "own"],
        "lines": {"dense": ["dense", "own"], "mixed": ["btm50", "mixed"], "dm": ["demix", "own"]},
        "plot": ["mixed"],
    },
}


BARRIERS = {
    "title": "line",
    "kind": "barriers",
    "text": STUDY["text"],
    "common": COMMON | {"circle": 2, "points": 3, "held_out_rows": 4},
    "arms": {
        "vanilla": {"align_method": "identity"},
        "maps": {"align_method": "orthogonal", "calibration_rows": 12, "align_refine_steps": 1},
        "weights": {"align_method": "orthogonal", "align_groups": ["ff", "attn"]},
    },
    "table": {
        "value": "nats",
        "baseline": ["vanilla", "barrier"],
        "lines": {"vanilla": ["vanilla", "barrier"], "maps": ["maps", "average"]},
        "plot": ["vanilla", "maps"],
    },
}


def make_inputs(root: Path) -> Path:
    """Folders of text and one task."""
    draw = random.Random(5)
    for name in ("law", "code", "tax"):
        folder = root / "inputs" / "domains" / name
        folder.mkdir(parents=True)
        for split, count in (("train", 60), ("valid", 30), ("test", 30)):
            words = WORDS.get(name, WORDS["law"] + WORDS["code"])
            documents = [" ".join(draw.choices(words, k=9)) for _ in range(count)]
            (folder / f"{split}.txt").write_text("\n\n".join(documents) + "\n")
    (root / "tiny.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    (root / "line.yaml").write_text(yaml.safe_dump(BARRIERS, sort_keys=False))
    make_tasks(root)
    return root


def run_twice(rank: int, root: Path) -> None:
    """All cells; again, which must do nothing; one of them anew; then those of finetuning."""
    from megamod.runs.studies.study import StudyFolders, repeat_cell, run_cells
    from megamod.runs.studies.study_file import read_study

    study = read_study(root / "tiny.yaml")
    places = StudyFolders(root / "inputs", root / "work", root / "evidence")
    run_cells(study, study.cells, places)
    times = {path: path.stat().st_mtime_ns for path in places.evidence.iterdir()}
    run_cells(study, study.cells, places)
    assert times == {path: path.stat().st_mtime_ns for path in places.evidence.iterdir()}
    line = repeat_cell(study, study.find_cell("btm50.short.s1"), places, root / "again")
    assert line.startswith("btm50.short.s1: largest relative difference 0 ")
    assert torch.get_num_threads() == 1
    finetune_all(root)
    barriers = read_study(root / "line.yaml")
    places = StudyFolders(root / "inputs", root / "work", root / "evidence-line")
    run_cells(barriers, barriers.cells, places)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = make_inputs(tmp_path_factory.mktemp("study"))
    on_ranks(1, run_twice, root)
    return root


def records(workspace: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in (workspace / "evidence").glob("*.json")}


def test_mixtures(workspace):
    """One sparse model of a forest, trained on; and of anchored experts, whose seed is one more."""
    sparse, anchored = (records(workspace)[f"{arm}.short.s1"] for arm in ("sparse", "anchored"))
    assert set(sparse["scores"]) == set(anchored["scores"]) == {"own"}
    sizes = [record["details"]["parameters"] for record in (sparse, anchored)]
    feed_forward = 3 * 16 * 32
    assert sizes[0]["total"] - sizes[0]["active"] == feed_forward
    assert sizes[1]["active"] == sizes[1]["total"]
    assert sizes[1]["total"] - sizes[0]["total"] == feed_forward + 16


def test_records(workspace):
    kept_records = records(workspace)
    arms = ("anchored", "btm50", "demix", "dense", "more", "random", "sparse", "strangers")
    assert sorted(kept_records) == [f"{arm}.short.s1" for arm in arms]
    tokens = 4 * 4 * 16
    for arm, record in kept_records.items():
        further = 4 * 16 if arm.startswith("sparse") else 0
        assert record["details"]["tokens"] == tokens + further
    dense, demix, btm50 = (kept_records[f"{arm}.short.s1"] for arm in ("dense", "demix", "btm50"))
    sizes = [record["details"]["parameters"] for record in (dense, demix, btm50)]
    network = 2 * 16 * 32 + 32 + 16
    assert sizes[1]["total"] == sizes[0]["total"] + network
    assert sizes[2]["total"] == 2 * sizes[0]["total"]
    assert sizes[0]["outside_embeddings"] == network + 4 * (16 * 16 + 16) + 3 * 2 * 16
    assert len({size["active"] for size in sizes}) == 1
    assert set(dense["scores"]) == {"own", "novel_own"}
    rows = {"mixed", "history", "history_0.9", "uniform_prior", "simple_average", "top1", "own"}
    assert set(demix["scores"]) == rows | {"best_expert"}
    assert set(btm50["scores"]) == rows | {"best_expert", "average", "seed"}
    assert "own" not in kept_records["random.short.s1"]["scores"]
    assert set(kept_records["strangers.short.s1"]["scores"]) == set(btm50["scores"])
    more = kept_records["more.short.s1"]
    assert set(more["scores"]) == {"start", "adapted", "novel_start", "novel_adapted"}
    start = more["details"]["start"]
    assert more["details"]["losses"]["start"] == pytest.approx(
        demix["details"]["experts"][start],
        abs=0.02,  # clipped at another norm
    )
    assert more["details"]["novel"]["adapted"] != more["details"]["novel"]["start"]
    for record in kept_records.values():
        assert record["config"]["learning_rate"] == 0.01 and record["machine"]["threads"] == 1
        losses = record["details"]["losses"]
        for row, values in losses.items():
            values_shown = record["scores"][row]
            assert values_shown["perplexity"] == pytest.approx(
                sum(map(math.exp, values.values())) / 2
            )


def test_bits_per_byte(workspace):
    header = json.loads((workspace / "work" / "data" / "domains" / "databin.json").read_text())
    record = records(workspace)["dense.short.s1"]
    bits = []
    for domain, loss in record["details"]["losses"]["own"].items():
        test = header["domains"][domain]["test"]
        text = (workspace / "inputs" / "domains" / domain / "test.txt").read_text().split("\n\n")
        kept = "".join(text[: test["items"]]).rstrip("\n")
        assert test["bytes"] == len(kept) <= 400 < len(kept) + len(text[test["items"]])
        bits.append(loss / math.log(2) * test["tokens"] / len(kept))
    assert record["scores"]["own"]["bits_per_byte"] == pytest.approx(sum(bits) / 2)


def test_mixtures_bound_experts(workspace):
    details = records(workspace)["btm50.short.s1"]["details"]
    for domain in ("law", "code"):
        best = min(losses[domain] for losses in details["experts"].values())
        # A mixture of two loses at most the logarithm of the smaller weight against the best.
        assert best - 0.7 < details["losses"]["mixed"][domain] < best + 0.7
        left = details["without"]["law"][domain]
        assert left == pytest.approx(details["experts"]["code"][domain], abs=2e-6)
        assert sum(details["priors"][domain].values()) == pytest.approx(1, abs=1e-5)


def test_table_and_document(workspace):
    from megamod.runs.studies.report import fill_document, format_markdown, plot_study, read_records
    from megamod.runs.studies.study_file import read_study

    study, kept_records = read_study(workspace / "tiny.yaml"), records(workspace)
    kept = read_records(study, workspace / "evidence")
    text = format_markdown(study, kept)
    dense = kept_records["dense.short.s1"]["scores"]["own"]["perplexity"]
    mixed = kept_records["btm50.short.s1"]["scores"]["mixed"]["perplexity"]
    assert f"| dense | {dense:.2f} |" in text
    assert f"| mixed | {mixed:.2f} ({mixed / dense:.3f}; {int(mixed < dense)}/1) |" in text
    assert "8 of 8 cells, seeds 1" in text
    cell = "<!-- cell tiny, short, mixed -->{}<!-- end of cell -->"
    document = "a\n<!-- study tiny -->\n{}\n<!-- end of study tiny -->\n| b | " + cell + " |\n"
    shown = f"{mixed:.2f} ({mixed / dense:.3f}; {int(mixed < dense)}/1)"
    filled = fill_document(document.format("old", "0.1"), {"tiny": (study, kept)})
    assert filled == document.format(f"\n{text}\n", shown)
    assert fill_document(document, {}) == document
    with pytest.raises(UserError, match="lacks its end"):
        fill_document("<!-- study tiny -->\n", {"tiny": (study, kept)})
    with pytest.raises(UserError, match="has no cell long, mixed; columns: short; lines: dense, "):
        fill_document(cell.replace("short", "long"), {"tiny": (study, kept)})
    assert plot_study(study, kept, workspace / "plot.png")
    assert (workspace / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_changed_settings_are_refused(workspace, tmp_path):
    from megamod.runs.studies.records import read_cell_record
    from megamod.runs.studies.study_file import read_study

    changed = {**STUDY, "common": {**COMMON, "max_steps": 5}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    cell = read_study(tmp_path / "tiny.yaml").find_cell("dense.short.s1")
    with pytest.raises(UserError, match="max_steps: 4 then, 5 now"):
        read_cell_record(workspace / "evidence", cell)


FINETUNING = {
    "title": "two tasks",
    "kind": "finetuning",
    "text": STUDY["text"] | {"tokenizer": "package:toy_encoder/model", "bos": True},
    "common": {
        "launcher": "mtl", "tasks": ["sst-2", "cola"], "data_dir": "glue", "variant": "plain",
        "model": "package:toy_encoder/model", "max_steps": 3, "max_seq_length": 16,
        "per_device_train_batch_size": 4, "learning_rate": 0.01,
    },
    "arms": {
        "plain": {},
        "single": {"one_model_a_task": True, "max_steps": 2},
        "one": {
            "launcher": "glue", "task": "sst-2", "max_steps": 2, "learning_rate": 0.1,
            "tasks": None, "variant": None,
        },
        "two": {
            "launcher": "glue", "task": "sst-2", "max_steps": 2, "learning_rate": 0.1,
            "tasks": None, "variant": None, "pretrain_objective": "distillation",
            "pretrain_num_instances": 2, "pretrain_max_steps": 2, "pretrain_max_seq_length": 8,
            "pretrain_per_device_train_batch_size": 4, "pretrain_per_device_eval_batch_size": 4,
        },
    },
    "seeds": [1],
    "table": {
        "value": "score", "columns": "rows", "rows": ["sst-2", "cola"], "compare": "difference",
        "digits": 3, "baseline": ["plain"], "lines": {"plain": ["plain"], "single": ["single"]},
    },
}  # fmt: skip


def make_tasks(root: Path) -> None:
    """Two tasks of GLUE, and an encoder inside a package."""
    from transformers import BertConfig, BertModel

    draw, words = random.Random(3), [word for of in WORDS.values() for word in of]
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **size)
    model = root / "packages" / "toy_encoder" / "model"
    BertModel(config).save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (model.parent / "__init__.py").write_text("")
    for task, head in (("SST-2", "sentence\tlabel\n"), ("CoLA", "")):
        (root / "inputs" / "glue" / task).mkdir(parents=True)
        for split, count in (("train", 16), ("dev", 12)):
            rows = []
            for number in range(count):
                text = " ".join(draw.choices(words, k=4))
                label = number % 2
                rows.append(f"{text}\t{label}" if head else f"a\t{label}\t\t{text}")
            file = root / "inputs" / "glue" / task / f"{split}.tsv"
            file.write_text(head + "\n".join(rows) + "\n")
    (root / "tasks.yaml").write_text(yaml.safe_dump(FINETUNING))


def finetune_all(root: Path) -> None:
    """Cells of the study of finetuning."""
    from megamod.runs.studies.study import StudyFolders, run_cells
    from megamod.runs.studies.study_file import read_study

    sys.path.insert(0, str(root / "packages"))
    study = read_study(root / "tasks.yaml")
    places = StudyFolders(root / "inputs", root / "work-tasks", root / "evidence-tasks")
    run_cells(study, study.cells, places)


def test_barriers(workspace, tmp_path):
    from megamod.runs.studies.report import format_markdown, plot_study, read_records
    from megamod.runs.studies.study_file import read_study

    study = read_study(workspace / "line.yaml")
    kept_records = read_records(study, workspace / "evidence-line")
    assert sorted(kept_records) == [f"{arm}.all.s1" for arm in ("maps", "vanilla", "weights")]
    ends = []
    for record in kept_records.values():
        curve = record["details"]["curve"]
        assert curve["weights"] == [0.0, 0.5, 1.0] and record["details"]["seeds"] == [1, 2, 1]
        ends.append((curve["losses"][0], curve["losses"][-1]))
        worst = max(ends[-1])
        assert record["scores"]["worst"]["nats"] == pytest.approx(worst, abs=1e-5)
        middle = curve["losses"][1] - worst
        assert record["scores"]["average"]["nats"] == pytest.approx(middle, abs=1e-5)
        rise = curve["losses"][1] - sum(ends[-1]) / 2
        assert record["scores"]["barrier"]["nats"] == pytest.approx(max(0.0, rise), abs=1e-5)
    # An aligned model computes what it did.
    for end in ends[1:]:
        assert end == pytest.approx(ends[0], abs=1e-4)
    assert "3 of 3 cells" in format_markdown(study, kept_records)
    assert plot_study(study, kept_records, tmp_path / "line.png")


def test_finetuning(workspace):
    from megamod.runs.studies.report import format_markdown, read_records
    from megamod.runs.studies.study_file import read_study

    study = read_study(workspace / "tasks.yaml")
    kept_records = read_records(study, workspace / "evidence-tasks")
    assert sorted(kept_records) == [f"{arm}.all.s1" for arm in ("one", "plain", "single", "two")]
    two = kept_records["two.all.s1"]
    assert two["details"]["pretraining"]["task_loss"] > 0 and len(two["config"]["inputs"]) == 2
    assert set(kept_records["one.all.s1"]["scores"]) == {"sst-2", "mean"}
    for name, record in kept_records.items():
        scores = record["scores"]
        assert scores["sst-2"]["score"] == scores["sst-2"]["dev_accuracy"]
        assert scores["mean"]["instances_per_second"] > 0, name
        assert len(record["config"]["inputs"]["model"]) == 16
        assert record["config"]["model"] == "package:toy_encoder/model"
    means = {
        arm: (kept_records[f"{arm}.all.s1"]["scores"]["sst-2"]["score"]
        + kept_records[f"{arm}.all.s1"]["scores"]["cola"]["score"]) / 2
        for arm in ("plain", "single")
    }  # fmt: skip
    text, gap = format_markdown(study, kept_records), means["single"] - means["plain"]
    assert f"| {means['single']:.3f} ({gap:+.3f}; {int(gap < 0)}/1) |" in text
    assert not list((workspace / "work-tasks").glob("*.s1*/"))


def test_package_folders(tmp_path, monkeypatch):
    from megamod.runs.studies.packages import resolve_package_path

    (tmp_path / "toy_two" / "model").mkdir(parents=True)
    (tmp_path / "toy_two" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_package_path("package:toy_two/model") == str(tmp_path / "toy_two" / "model")
    assert resolve_package_path("wordpiece:300") == "wordpiece:300"
    with pytest.raises(UserError, match="there is no folder other in the package toy_two"):
        resolve_package_path("package:toy_two/other")
    with pytest.raises(UserError, match="pip install toy-three"):
        resolve_package_path("package:toy_three/model")


COPY = """
import os, shutil, sys
copy = lambda file, target: os.replace(shutil.copyfile(file, f"{target}.{os.getpid()}"), target)
shutil.copytree(*sys.argv[1:3], dirs_exist_ok=True, copy_function=copy)
"""


def test_processes(workspace, tmp_path, monkeypatch):
    from megamod.runs.studies import study as running
    from megamod.runs.studies.study_file import read_study

    monkeypatch.setattr(running, "POLL_SECONDS", 0.02)
    study = read_study(workspace / "tiny.yaml")
    places = running.StudyFolders(workspace / "inputs", tmp_path / "work", tmp_path / "evidence")
    with pytest.raises(UserError, match=r"8 cells are not done, dense\.short\.s1 among them"):
        running.run_cells_in_processes(study, study.cells, places, ["-c", ""], 2)
    words = ["-c", COPY, str(workspace / "evidence"), str(places.evidence)]
    running.run_cells_in_processes(study, study.cells, places, words, 2)
    assert running.format_progress(study, study.cells, places) == (
        "8 of 8 cells of tiny; 0:00 h of work left"
    )
    (places.evidence / "dense.short.s1.json").unlink()
    assert running.format_progress(study, study.cells, places).startswith(
        "7 of 8 cells of tiny; 0:00 h"
    )


def launch(monkeypatch, *words: object) -> None:
    """launchers/study.py in this process."""
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
    runpy.run_path(str(REPOSITORY / "launchers" / "study.py"))["main"]()


def test_launcher(workspace, tmp_path, monkeypatch, capsys):
    launch(monkeypatch, workspace / "tiny.yaml", "--list", "true")
    assert capsys.readouterr().out.startswith("dense.short.s1: model tiny, ")
    document, plot = tmp_path / "doc.md", tmp_path / "plot.png"
    document.write_text("<!-- study tiny -->\n<!-- end of study tiny -->\n")
    shown = ("--table", "true", "--document", document, "--plot", plot)
    launch(monkeypatch, workspace / "tiny.yaml", "--evidence", workspace / "evidence", *shown)
    assert capsys.readouterr().out.strip() in document.read_text() and plot.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--study is missing"),
        (("ladder",), "--study ladder: is no file and none of barrier_held_out, "),
        (("ladder_1k",), "--inputs is missing"),
        (("ladder_1k", "--inputs", "absent"), "--inputs absent: there is no such folder"),
        (("ladder_1k", "--inputs", ".", "--repeat", "true"), "name the runs with --cells"),
        (("ladder_1k", "--cells", "dense.t80.s9"), "has no 'dense.t80.s9'; the nearest: dense.t80"),
        (("ladder_1k", "--table", "true", "--document", "absent.md"), "there is no such file"),
    ],
)
def test_launcher_refuses(words, message, monkeypatch):
    with pytest.raises(UserError, match=re.escape(message)):
        launch(monkeypatch, *words)


@pytest.mark.parametrize("document", ["docs/results.md", "README.md"])
def test_results_are_up_to_date(document):
    """Tables and cells in the documents are those of the JSON files."""
    from megamod.runs.studies.report import fill_document, list_studies, read_records
    from megamod.runs.studies.study_file import read_study

    text, studies = (REPOSITORY / document).read_text(encoding="utf-8"), {}
    for name in list_studies(text):
        study = read_study(REPOSITORY / "launchers" / "recipes" / "studies" / f"{name}.yaml")
        studies[name] = study, read_records(study, REPOSITORY / "docs" / "evidence" / name)
    assert fill_document(text, studies) == text, f"study.py NAME --table true --document {document}"
