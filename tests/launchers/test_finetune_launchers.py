"""launchers/finetune_*.py as people start them: help, mistakes, and many runs from one file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import run_launcher

from megamod.errors import UserError
from megamod.runs.studies.sweep import SweepJob, read_sweep, run_sweep

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
HEADER = "sentence\tlabel\n"


@pytest.fixture
def root(tmp_path) -> Path:
    """A tiny model and a task."""
    from transformers import BertConfig

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertConfig(vocab_size=8, max_position_embeddings=8, **size).save_pretrained(tmp_path / "new")
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        rows = "good film\t1\nbad film\t0\n" * 4
        (tmp_path / "data" / f"{split}.tsv").write_text(HEADER + rows)
    return tmp_path


@pytest.mark.parametrize("name", ["finetune_glue", "finetune_ner", "finetune_all"])
def test_help_is_quick_and_shows_commands(name):
    begin = os.times().children_user
    command = [sys.executable, "-W", "ignore", LAUNCHERS / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"megamod {name.replace('_', '-')} " in done.stdout
    assert "--output_dir" in done.stdout and os.times().children_user - begin < 1


def test_a_run_from_the_command_line_and_a_mistake_in_its_file(root):
    flags = [
        "--task", "sst2", "--data_dir", root / "data", "--model", root / "new",
        "--tokenizer_name", root / "tokenizer", "--do_train", "--do_eval", "--max_steps", 2,
        "--per_device_train_batch_size", 2, "--output_dir",
    ]  # fmt: skip
    done = run_launcher("finetune_glue", *flags, root / "out")
    assert done.returncode == 0, done.stderr
    assert "dev accuracy" in done.stdout and (root / "out" / "model" / "config.json").exists()
    file = root / "data" / "dev.tsv"
    file.write_text(HEADER + "good film\t1\nbad film\t2\n")
    done = run_launcher("finetune_glue", *flags, root / "no")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{file}, line 3: label '2' is not one of task sst-2: 0, 1" in done.stderr
    assert not (root / "no").exists()


PROGRAM = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
score = int(flags["--seed"]) / 10 + int(flags["--num_instances"]) / 100
record = {"rows": {}, "cut_rows": {}, "model": None, "seeds": {}}
record |= {"task_score": score, "mean": {"dev accuracy": score}}
record["instances_per_second"] = 10.0 * int(flags["--num_instances"])
(pathlib.Path(flags["--output_dir"]) / "results.json").write_text(json.dumps(record))
"""
SWEEP = "{tasks: {rte: }, models: {mux: {num_instances: [2, 5]}}, seeds: [1, 3]}"


def test_many_runs_give_one_table_and_are_made_once(tmp_path):
    (tmp_path / "finetune_glue.py").write_text(PROGRAM)  # in place of the launcher
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    jobs, launch = read_sweep(tmp_path / "sweep.yaml")
    out = tmp_path / "all"
    table = run_sweep(jobs, out, tmp_path, 2, launch)
    record = json.loads((out / "summary.json").read_text())
    assert [(item["task"], item["num_instances"], item["seeds"]) for item in record] == [
        ("rte", 2, 2),
        ("rte", 5, 2),
    ]
    assert record[0]["mean"]["task_score"] == pytest.approx(0.22)
    assert record[0]["deviation"]["dev accuracy"] == pytest.approx(0.02**0.5)
    assert record[1]["mean"]["instances_per_second"] == 50
    assert "mux, N = 2    0.2200 ± 0.1414" in table
    for plot in ("scores.png", "trade_off.png"):
        assert (out / plot).read_bytes()[:4] == b"\x89PNG" and str(out / plot) in table
    times = [(job.get_folder(out) / "results.json").stat().st_mtime_ns for job in jobs]
    assert run_sweep(jobs, out, tmp_path, 1, launch) == table
    assert [(job.get_folder(out) / "results.json").stat().st_mtime_ns for job in jobs] == times
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("rte: ", "rte: {max_steps: 3}"))
    with pytest.raises(UserError, match="holds a run with other flags"):
        run_sweep(read_sweep(tmp_path / "sweep.yaml")[0], out, tmp_path, 1, launch)


def test_jobs_of_a_sweep(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "common: {do_train: true, max_steps: 5}\n"
        "tasks: {rte: {max_steps: 9}, toy: {launcher: ner}}\n"
        "models: {mux: {model: 'runs/mux-{N}', num_instances: [2, 5]}}\n"
        "launch: [deepspeed]\n"
    )
    jobs, launch = read_sweep(tmp_path / "s.yaml")
    assert launch == ["deepspeed"] and len(jobs) == 4
    flags = dict(task="rte", do_train=True, max_steps=9, model="runs/mux-5", num_instances=5)
    assert jobs[1] == SweepJob("rte", "mux", 5, 1, "glue", flags)
    words = jobs[2].list_arguments(tmp_path)
    assert jobs[2].launcher == "ner" and words[:4] == ["--task", "toy", "--do_train", "true"]
    assert words[-2:] == ["--output_dir", str(tmp_path / "toy" / "mux" / "N-2" / "seed-1")]


@pytest.mark.parametrize(
    "launch",
    [
        ["deepspeed", "--num_gpus", "2", "--master_port=29501"],
        ["torchrun", "--nproc-per-node=2", "--standalone"],
        ["srun", "-N", "1", "--ntasks-per-node=2", "python"],
        ["accelerate", "launch", "--num_processes", "2", "--cpu"],
    ],
)
def test_programs_that_start_a_sweep(tmp_path, launch):
    (tmp_path / "s.yaml").write_text(f"{{tasks: {{rte: }}, models: {{a: }}, launch: {launch}}}")
    assert read_sweep(tmp_path / "s.yaml")[1] == launch


def test_flags_of_one_number_of_instances_win(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "tasks: {rte: {learning_rate: 1.0}}\n"
        "models: {mux: {num_instances: {2: {}, 5: {learning_rate: 2.0, model: 'at-{N}'}}}}\n"
    )
    two, five = read_sweep(tmp_path / "s.yaml")[0]
    assert dict(two.flags) == dict(task="rte", learning_rate=1.0, num_instances=2)
    assert dict(five.flags) == dict(task="rte", learning_rate=2.0, model="at-5", num_instances=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not `key: value` lines"),
        ("{tasks: {rte: }}", "models is missing"),
        ("{tasks: {rte: }, models: {a: }, seed: 1}", "unknown key 'seed'; the nearest is 'seeds'"),
        ("{tasks: {rte: }, models: {a: {seed: 1}}}", "models.a: seed is chosen for each run"),
        ("{tasks: {rte: }, models: {a: }, seeds: [x]}", r"seeds\[0\]: 'x' is not a whole number"),
        ("{tasks: {rte: {launcher: x}}, models: {a: }}", "launcher 'x' is not allowed"),
        ("{tasks: {rte: }, models: {a: {num_instances: [0]}}}", "0 is not a whole number from 1"),
        ("{tasks: {rte: }, models: {a: {num_instances: {2: {seed: 1}}}}}", "instances.2: seed is"),
        ("{tasks: {rte: }, models: {a: {output-dir: x}}}", "output-dir is chosen for each run"),
        ("{tasks: {rte: 3}, models: {a: }}", "tasks.rte: 3 is not `key: value` lines"),
        ("{tasks: {../../x: }, models: {a: }}", "tasks: '../../x' is not made of letters"),
        ("{tasks: {rte: }, models: {a/b: }}", "models: 'a/b' is not made of letters"),
        ("{", "not YAML"),
        *(
            (f"{{tasks: {{rte: }}, models: {{a: }}, launch: {launch}}}", message)
            for launch, message in (
                ("[sh, -c, 'touch x']", "launch: 'sh' is not one of deepspeed, torchrun, srun"),
                ("[/bin/deepspeed]", "launch: '/bin/deepspeed' is not one of deepspeed"),
                ("deepspeed", "launch: 'deepspeed' is not a list"),
                ("[deepspeed, --num_gpus, 2]", r"launch\[2\]: 2 is not text"),
                ("[deepspeed, --no_python, sh]", "'--no_python' is not a flag of deepspeed that"),
                ("[torchrun, --nnodes]", "launch: --nnodes has no value"),
                ("[torchrun, --standalone, sh]", "'sh' is not a flag of torchrun"),
                ("[srun, -n, '1', sh, -c, x]", "'sh' is not a flag of srun"),
                ("[srun, '--export=LD_PRELOAD=x']", "'--export=LD_PRELOAD=x' is not a flag"),
                ("[accelerate, test]", "accelerate needs `launch` after it"),
            )
        ),
    ],
)
def test_mistakes_in_a_sweep(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_sweep(tmp_path / "s.yaml")


def test_runs_that_fail_are_named_with_their_logs(tmp_path):
    jobs = [SweepJob("sst-2", "gone", 1, 1, "glue", {"task": "sst-2", "do_trian": True})]
    with pytest.raises(UserError, match=r"1 of 1 runs failed; see .*gone/N-1/seed-1/log.txt"):
        run_sweep(jobs, tmp_path, LAUNCHERS, 1, [])
    log = tmp_path / "sst-2" / "gone" / "N-1" / "seed-1" / "log.txt"
    assert "unknown flag '--do_trian'; the nearest is '--do_train'" in log.read_text()
