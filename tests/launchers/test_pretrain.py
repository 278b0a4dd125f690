"""launchers/pretrain.py as people start it: three launchers, a kill in the midst, and mistakes."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamod  # noqa: F401  (registers the models)
from megamod.data.corpus.binarize import binarize
from megamod.data.lm.pretraining import LmData

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launchers" / "pretrain.py"
PREPROCESS = REPOSITORY / "launchers" / "preprocess.py"
SMOKE = REPOSITORY / "ds_configs" / "cpu_smoke.json"
BIN = Path(sys.executable).parent
DOMAINS = ("law", "med", "code", "news")
RECIPE = """
model: tiny
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
untie: feedforward
max_steps: 4
per_device_train_batch_size: 2
global_batch_size: 16
logging_steps: 1
save_steps: 2
max_seq_length: 32
learning_rate: 3.0e-3
max_grad_norm: 1.0
"""


def words_of(domain: str, documents: int, seed: int) -> list[str]:
    """Documents of made-up sentences; every domain has its own words."""
    random_ = random.Random(seed)
    words = [f"{domain}{letter}{letter}" for letter in "abcdefghijklmnop"] + ["the", "of", "and"]
    return [" ".join(random_.choices(words, k=40)) + "." for _ in range(documents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a data-bin of four domains and a recipe."""
    root = tmp_path_factory.mktemp("pretrain")
    texts = {domain: words_of(domain, 200, seed) for seed, domain in enumerate(DOMAINS)}
    binarize(texts, "sentencepiece:300", root / "bin")
    (root / "recipe.yaml").write_text(RECIPE + f"data: {root / 'bin'}\n")
    return root


def environment() -> dict[str, str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    # The deepspeed launcher looks for python on the PATH.
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def start(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
        timeout=300,
    )


def naive_perplexity(model, data: LmData, domain: str) -> float:
    """exp of the mean nll over a split, from the logits."""
    total, count = 0.0, 0
    for batch in data.iterate_eval_batches(domain, "valid", 8, 0):
        with torch.no_grad():
            mask = batch.get("attention_mask")
            logits = model(batch["input_ids"], attention_mask=mask).logits.double()
        labels = batch["labels"]
        scores = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total -= float(scores[labels != -100].sum())
        count += int((labels != -100).sum())
    return math.exp(total / count)


def assert_picture(path: Path) -> None:
    """A PNG of some size in which not all is white."""
    from matplotlib.image import imread

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 150
    assert (pixels.min(-1) < 0.5).mean() > 0.005


def assert_outputs(out: Path, steps: int) -> dict[str, object]:
    """The files of any run; returns what perplexity.json says."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [record["step"] for record in records if "loss" in record]
    assert logged == list(range(1, steps + 1))
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    tokens = [record["tokens"] for record in records if "loss" in record]
    assert tokens == sorted(set(tokens)) and tokens[0] <= 16 * 32
    config = json.loads((out / "ds_config.resolved.json").read_text())
    assert "auto" not in json.dumps(config)
    versions = json.loads((out / "env.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    assert_picture(out / "loss.png")
    return json.loads((out / "perplexity.json").read_text())


@pytest.mark.slow
def test_deepspeed_launcher_trains_demix(folder):
    out = folder / "demix"
    done = start(
        *(BIN / "deepspeed", "--num_accelerators", "2", "--master_port", free_port()),
        *(LAUNCHER, folder / "recipe.yaml", "--deepspeed", SMOKE, "--output_dir", out),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = assert_outputs(out, 4)
    assert_picture(out / "experts.png")
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["0", "law,med"] in [row[:1] + row[3:4] for row in table]
    assert ["1", "code,news"] in [row[:1] + row[3:4] for row in table]
    assert scores["step"] == 4 and set(scores["perplexity"]) == set(DOMAINS)

    # What is on disk is what was scored, and it speaks.
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    data = LmData(str(folder / "bin"), domains=None, block_size=32, domain_token=False)
    for expert, domain in (("law", "law"), ("news", "law"), ("code", "news")):
        model.set_domain(expert)
        output = scores["perplexity"][expert][domain]
        assert naive_perplexity(model, data, domain) == pytest.approx(output, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    prompt = tokenizer("the lawaa of", return_tensors="pt").input_ids
    said = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert said.shape == (1, prompt.shape[1] + 5)
    assert isinstance(tokenizer.decode(said[0]), str)


@pytest.mark.slow
def test_torchrun_trains_independent_models(folder):
    out = folder / "btm"
    done = start(
        *(BIN / "torchrun", "--nproc_per_node", "2", "--master_port", free_port()),
        *(LAUNCHER, folder / "recipe.yaml", "--untie", "all", "--domains", "law", "code"),
        *("--output_dir", out),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = assert_outputs(out, 4)
    data = LmData(str(folder / "bin"), domains=["law", "code"], block_size=32, domain_token=False)
    for expert in ("law", "code"):
        model = AutoModelForCausalLM.from_pretrained(out / "model" / expert).eval()
        for domain in ("law", "code"):
            output = scores["perplexity"][expert][domain]
            assert naive_perplexity(model, data, domain) == pytest.approx(output, rel=1e-5)


@pytest.mark.long  # three runs; drills/drill_cuts.py has more of them with each push
def test_sigterm_then_the_same_command_is_the_run_without_it(folder):
    """The second run is the run.yaml of the first, which so is shown to repeat a run."""
    steps, whole, cut = 60, folder / "whole", folder / "cut"
    flags = ("--max_steps", steps, "--save_steps", 0)
    done = start(sys.executable, LAUNCHER, folder / "recipe.yaml", *flags, "--output_dir", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_outputs(whole, steps)

    command = [sys.executable, LAUNCHER, whole / "run.yaml", "--output_dir", cut]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    log, deadline = cut / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 1000):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 130, output[-3000:]
    stopped = int(re.search(r"Interrupted: stopped by a signal after step (\d+);", output)[1])
    assert 1 < stopped < steps
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == [f"step-{stopped}"]
    assert not (cut / "model").exists()

    done = start(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{cut}: resumes at step {stopped} of {steps}" in done.stderr
    assert_outputs(cut, steps)
    for part in ("model", f"checkpoints/step-{steps}"):
        files = sorted(path.name for path in (whole / part).glob("*.safetensors"))
        assert len(files) >= 5 and files == sorted(
            p.name for p in (cut / part).glob("*.safetensors")
        )
        for name in files:
            first, other = load_file(whole / part / name), load_file(cut / part / name)
            assert all(torch.equal(tensor, other[key]) for key, tensor in first.items())
    numbers = [(out / "perplexity.json").read_text() for out in (whole, cut)]
    assert numbers[0] == numbers[1]

    done = start(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{cut}: has its {steps} steps already, nothing is trained" in done.stderr
    assert_outputs(cut, steps)


# --- mistakes: one process runs them all -----------------------------------------------------

MISTAKES = """
import contextlib, io, json, os, runpy, sys

def left(code):
    raise SystemExit(code)

os._exit = left
cases, results = json.load(open(sys.argv[1])), {}
for name, (launcher, flags, variables) in cases.items():
    os.environ.update(variables)
    sys.argv = [launcher, *flags]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(launcher, run_name="__main__")
        except SystemExit as end:
            code = end.code
    results[name] = (code, out.getvalue(), err.getvalue())
    for variable in variables:
        del os.environ[variable]
print("RESULTS" + json.dumps(results))
"""


def spoiled_bin(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder / "bin", folder / f"bin-{name}"))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def cases_of(folder: Path) -> dict[str, tuple[list[object], list[str], dict[str, str]]]:
    """By name: flags after the recipe, what the message must hold, environment variables."""
    truncated_idx = spoiled_bin(folder, "idx") / "law" / "train.idx"
    write(truncated_idx, truncated_idx.read_bytes()[:-5])
    truncated_bin = spoiled_bin(folder, "tokens") / "med" / "train.bin"
    write(truncated_bin, truncated_bin.read_bytes()[:-4])
    magic = spoiled_bin(folder, "magic") / "law" / "train.idx"
    write(magic, b"NOTMAGIC!" + magic.read_bytes()[9:])
    header = spoiled_bin(folder, "header") / "databin.json"
    write(header, header.read_text().replace('"vocab_size": 300', '"vocab_size": 20'))
    gone = spoiled_bin(folder, "gone") / "code" / "train.bin"
    gone.unlink()
    no_valid = spoiled_bin(folder, "no-valid") / "news" / "valid_news.idx"
    no_valid.unlink()
    cut_valid = spoiled_bin(folder, "cut-valid") / "med" / "valid_med.bin"
    write(cut_valid, cut_valid.read_bytes()[:-2])
    empty = spoiled_bin(folder, "empty")
    fairseq = folder / "fairseq"
    shutil.copytree(folder / "bin" / "law", fairseq / "law", ignore=lambda *_: ["dict.txt"])
    write(fairseq / "dict.txt", "".join(f"{n} 1\n" for n in range(10)))
    output = json.loads((empty / "databin.json").read_text())
    output["domains"]["news"]["train"] |= {"items": 0, "tokens": 0}
    del output["files"], output["digest"]  # as headers were before they had digests
    write(empty / "databin.json", json.dumps(output))

    def ds(name: str, text: str) -> Path:
        return write(folder / f"{name}.json", text)

    stage3 = ds("stage3", '{"zero_optimization": {"stage": 3}}')
    unknown = ds("unknown", '{"zero_optimization": {"stage": 1, "overlap_com": true}}')
    auto = ds("auto", '{"zero_optimization": {"stage": 1, "sub_group_size": "auto"}}')
    syntax = ds("syntax", '{\n  "gradient_clipping": 1.0,\n}')
    conflict = ds("conflict", '{"train_micro_batch_size_per_gpu": 4}')
    three = {"RANK": "0", "WORLD_SIZE": "3"}
    wrong_key = write(folder / "wrong.yaml", RECIPE + "untied: all\n")
    bytes_ = write(folder / "bytes.yaml", RECIPE.encode() + b"data: \xff\xfe\n")
    return {
        "no data": (["--data", folder / "nowhere"], [f"{folder / 'nowhere'}", "data-bin"], {}),
        "missing domain": (["--domains", "law", "sport"], ["sport", "law, med, code, news"], {}),
        "short domain": (["--max_seq_length", "90000"], ["--max_seq_length 90000", "law"], {}),
        "empty domain": (["--data", empty], ["news", "train"], {}),
        "truncated idx": (["--data", truncated_idx.parents[1]], [str(truncated_idx)], {}),
        "truncated bin": (["--data", truncated_bin.parents[1]], [str(truncated_bin)], {}),
        "wrong magic": (["--data", magic.parents[1]], [str(magic), "NOTMAGIC"], {}),
        "missing bin": (["--data", gone.parents[1]], [str(gone)], {}),
        "missing valid": (["--data", no_valid.parents[1]], [str(no_valid)], {}),
        "cut valid": (["--data", cut_valid.parents[1]], [str(cut_valid)], {}),
        "header": (["--data", header.parent], [str(header), "20"], {}),
        "id outside": (["--data", fairseq], [str(fairseq / "law" / "train"), "14"], {}),
        "three ranks": (["--untie", "feedforward"], ["3 ranks", "4 experts", "1, 2, 4, 8"], three),
        "btm ranks": (["--untie", "all"], ["1 ranks", "4 experts", "one job per domain"], {}),
        "zero 3": (["--deepspeed", stage3], ["ZeRO stage 3", "use stage 1 or 2"], {}),
        "json key": (
            ["--deepspeed", unknown],
            [f"{unknown}: unknown key zero_optimization.overlap_com;", "overlap_comm"],
            {},
        ),
        "json auto": (["--deepspeed", auto], [str(auto), "zero_optimization.sub_group_size"], {}),
        "json syntax": (["--deepspeed", syntax], [f"{syntax}, line 3, column 1"], {}),
        "json conflict": (
            ["--deepspeed", conflict],
            [str(conflict), "train_micro_batch_size_per_gpu", "recipe"],
            {},
        ),
        "no json": (["--deepspeed", folder / "x.json"], [f"{folder / 'x.json'}"], {}),
        "flag": (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"], {}),
        "value": (["--max_steps", "many"], ["--max_steps", "many", "whole number"], {}),
        "recipe key": (
            [wrong_key],
            [f"{wrong_key}, line {RECIPE.count(chr(10)) + 1}", "untie"],
            {},
        ),
        "recipe bytes": ([bytes_], [str(bytes_)], {}),
        "batch": (["--global_batch_size", "6"], ["--global_batch_size 6"], {}),
        "sampler": (["--sampler", "unbalanced"], ["--sampler unbalanced", "balanced"], {}),
        "model": (["--model", "huge"], ["huge", "125m"], {}),
        "rollback": (
            ["--untie", "all", "--domains", "law", "--nonfinite", "rollback"],
            ["--nonfinite rollback"],
            {},
        ),
        "MEGAMOD": ([], ["MEGAMOD_SEED", "x"], {"MEGAMOD_SEED": "x"}),
        # From here on processes have been joined.
        "resume path": (
            ["--resume", folder / "nowhere"],
            [f"--resume {folder / 'nowhere'}", "manifest.json is missing"],
            {},
        ),
        "resume none valid": (
            ["--output_dir", folder / "spoilt"],
            [f"{folder / 'spoilt' / 'checkpoints'}: none of 1 checkpoints is valid"],
            {},
        ),
        "resume none": (
            ["--output_dir", folder / "spoilt", "--resume", "none"],
            ["--resume none", "holds checkpoints already"],
            {},
        ),
    }


@pytest.fixture(scope="module")
def mistakes(folder):
    """(exit code, stdout, stderr) of every case, and what stood in its output folder after it."""
    cases = cases_of(folder)
    spoilt = folder / "spoilt" / "checkpoints" / "step-2"
    spoilt.mkdir(parents=True)
    (spoilt / "state.json").write_text("{}")
    commands = {}
    for number, (name, (flags, _, variables)) in enumerate(cases.items()):
        flags = [str(flag) for flag in flags]
        if not (flags and flags[0].endswith(".yaml")):
            flags = [str(folder / "recipe.yaml"), *flags]
        if "--output_dir" not in flags:
            flags += ["--output_dir", str(folder / "never" / str(number))]
        commands[name] = (str(LAUNCHER), flags, variables)
    commands["print groups"] = (
        str(LAUNCHER),
        [
            str(folder / "recipe.yaml"),
            "--print_groups",
            "--output_dir",
            str(folder / "never" / "g"),
        ],
        {},
    )
    write(folder / "commands.json", json.dumps(commands))
    done = start(sys.executable, "-c", MISTAKES, folder / "commands.json")
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    return cases, json.loads(done.stdout.partition("RESULTS")[2])


NAMES = """
no data, missing domain, short domain, empty domain, truncated idx, truncated bin, wrong magic,
missing bin, missing valid, cut valid, header, id outside, three ranks, btm ranks, zero 3, json key,
json auto, json syntax,
json conflict, no json, flag, value, recipe key, recipe bytes, batch, sampler, model, rollback,
MEGAMOD, resume path, resume none valid, resume none
"""
NAMES = [name.strip() for name in NAMES.split(",")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_exit_2_and_one_message(mistakes, name):
    cases, results = mistakes
    code, _, err = results[name]
    assert code == 2, err[-2000:]
    # Warnings of the log may come before it, nothing after it.
    message = [line for line in err.splitlines() if "UserError: " in line]
    assert len(message) == 1 and err.endswith(message[0] + "\n"), err
    assert "Traceback" not in err and len(message[0]) < 700
    for part in cases[name][1]:
        assert part in message[0], message[0]


@pytest.mark.slow
def test_mistakes_write_nothing(mistakes, folder):
    cases, _ = mistakes
    assert set(cases) == set(NAMES)
    assert not (folder / "never").exists()
    left = [str(path.relative_to(folder / "spoilt")) for path in (folder / "spoilt").rglob("*")]
    assert sorted(left) == ["checkpoints", "checkpoints/step-2", "checkpoints/step-2/state.json"]


@pytest.mark.slow
def test_print_groups_prints_and_ends(mistakes):
    code, out, _ = mistakes[1]["print groups"]
    assert code == 0
    head, row = out.strip().splitlines()
    assert head.split() == [
        "rank",
        "host",
        "device",
        "domains",
        "shared",
        "over",
        "experts",
        "over",
    ]
    assert row.split() == ["0", os.uname().nodename, "cpu", ",".join(DOMAINS), "0", "0"]


@pytest.mark.slow
def test_text_that_is_not_utf8_is_refused_by_preprocess(tmp_path):
    lines = [f"line {number}" for number in range(50)]
    good = "\n\n".join(lines).encode() + b"\n\ncaf"
    bad = write(tmp_path / "bad.txt", good + b"\xe9\n")
    done = start(
        *(sys.executable, PREPROCESS, "--input", f"a={bad}", "--tokenizer", "sentencepiece:300"),
        *("--output_dir", tmp_path / "out"),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"UserError: {bad}: invalid UTF-8 at byte offset {len(good)};")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
