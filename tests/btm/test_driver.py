"""The driver with stand-ins for the launchers: small programs that leave the same files behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megamod.btm.jobs import MARK
from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix

REPOSITORY = Path(__file__).resolve().parents[2]

# A run that takes `last` steps of 0.02 s; files named after its folder make it misbehave.
PRETRAIN = """
import json, os, signal, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(flags["--output_dir"])
last = int(flags.get("--stop_step", flags["--max_steps"]))
told = Path(os.environ["TOLD"])
with open(told / "starts", "a") as starts:
    starts.write(f"{out.name} {os.getpid()}\\n")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))

def save(step):
    folder = out / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "data_step": step, "tokens": {out.name: 10 * step}}
    record = {"state": state, "settings": {"seed": 1, "data digest": "d"}, "world_size": 1}
    (folder / "state.json").write_text(json.dumps(record))

wrong = told / f"wrong-{out.name}"
if wrong.exists():
    print("some lines before\\nUserError: --data: is not what it should be", file=sys.stderr)
    sys.exit(int(wrong.read_text()))
there = sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step-*"))
for step in range(there[-1] if there else 0, last):
    time.sleep(float(os.environ.get("PAUSE", "0.02")))
    out.mkdir(parents=True, exist_ok=True)
    record = {"step": step + 1, "loss": 5 - step / 10, "tokens_per_second": 100.0}
    with open(out / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps(record) + "\\n")
    crash = told / f"crash-{out.name}"
    if step == 2 and crash.exists() and crash.stat().st_size:
        crash.write_text(crash.read_text()[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    save(step + 1)
    if asked:
        sys.exit(130)
(out / "model").mkdir(exist_ok=True)
config = {"vocab_size": 7, "domains": [out.name], "untie": "none"}
(out / "model" / "config.json").write_text(json.dumps(config))
(out / "perplexity.json").write_text(json.dumps({"step": last}))
"""
FOREST = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
assert words[0] == "branch"
out, step = Path(words[words.index("--output_dir") + 1]), int(words[words.index("--step") + 1])
parent = Path(words[words.index("--parents") + 1]) / "checkpoints" / f"step-{step}"
assert parent.is_dir()
(out / "checkpoints" / f"step-{step}").mkdir(parents=True)
record = {"parents": [{"path": str(parent), "weight": 1.0}], "start_update": step}
(out / "branch.json").write_text(json.dumps(record))
"""
FLAGS = ("--max_steps", "6", "--global_batch_size", "6", "--per_device_train_batch_size", "1")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Stand-ins for commands, a data-bin's header, a folder for what programs tell."""
    for name, text in (("pretrain.py", PRETRAIN), ("forest.py", FOREST)):
        (tmp_path / "launchers").mkdir(exist_ok=True)
        (tmp_path / "launchers" / name).write_text(text)
    btm = (REPOSITORY / "megamod" / "commands" / "btm.py").read_text()
    (tmp_path / "launchers" / "btm.py").write_text(btm)
    (tmp_path / "told").mkdir()
    (tmp_path / "bin").mkdir()
    of_split = {"items": 1, "tokens": 4, "bytes": 4, "max_id": 3}
    domains = {name: {"train": of_split, "valid": of_split} for name in ("law", "med", "code")}
    ids = {"vocab_size": 4, "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    header = {"format": 1, **ids, "domains": domains}
    (tmp_path / "bin" / "databin.json").write_text(json.dumps(header))
    for name in domains:
        for split in ("train", "valid"):
            prefix = tmp_path / "bin" / format_split_prefix(name, split)
            prefix.parent.mkdir(exist_ok=True)
            with IndexedWriter(prefix, np.uint16) as writer:
                writer.add_item(np.arange(4))
    yield tmp_path
    for process in marked(tmp_path):
        process.kill()


def begin(folder: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """A driver at work in place/out."""
    environment = {**os.environ, "TOLD": str(folder / "told"), "DS_ACCELERATOR": "cpu", **variables}
    command = [sys.executable, str(folder / "launchers" / "btm.py"), "--data", str(folder / "bin")]
    return subprocess.Popen(
        [*command, "--output_dir", str(folder / "out"), *FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ended(driver: subprocess.Popen[str], code: int) -> str:
    """Wait for the end of a driver; returns what it printed."""
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == code, out + err
    return out + err


def marked(folder: Path) -> list[psutil.Process]:
    """Living processes of the jobs in place/out."""
    result = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(folder.resolve())):
                result.append(process)
        except (psutil.Error, OSError):
            continue
    return result


def starts(folder: Path) -> list[str]:
    """Names of the runs in the order in which their programs were started."""
    lines = (folder / "told" / "starts").read_text().splitlines()
    return [line.split()[0] for line in lines]


def wait_for(what, seconds: float = 30) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def experts(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "out" / "forest.json").read_text())["experts"]


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_seed_then_experts_then_a_forest(folder):
    output = ended(begin(folder, "--slots", "2", "--seed_gpus", "1"), 0)
    assert starts(folder)[0] == "seed" and sorted(starts(folder)[1:]) == ["code", "law", "med"]
    built = experts(folder)
    assert [expert["domain"] for expert in built] == ["law", "med", "code"]
    assert [expert["path"] for expert in built] == [
        f"experts/{d}/model" for d in ("law", "med", "code")
    ]
    for expert in built:
        assert (expert["start_update"], expert["updates"]) == (3, 6)
        assert expert["parents"][0]["path"].endswith("seed/checkpoints/step-3")
    assert "med  done  step 6/6  loss 4.5000  tokens/s 100" in output

    # All is done: nothing is started again, and the forest stays as it is.
    before = (folder / "out" / "forest.json").read_bytes()
    ended(begin(folder, "--slots", "2", "--seed_gpus", "1"), 0)
    assert len(starts(folder)) == 4 and (folder / "out" / "forest.json").read_bytes() == before


def test_slots_are_all_that_run_at_once(folder):
    driver = begin(folder, "--slots", "2", "--seed_share", "0", PAUSE="0.1")
    most = 0
    while driver.poll() is None:
        most = max(most, len(marked(folder)))
        time.sleep(0.02)
    ended(driver, 0)
    assert most == 2


def test_a_crash_restarts_that_expert_alone(folder):
    (folder / "told" / "crash-med").write_text("xx")
    output = ended(begin(folder, "--seed_share", "0", "--slots", "3"), 0)
    assert sorted(starts(folder)) == ["code", "law", "med", "med", "med"]
    assert "med  done  step 6/6" in output and "restarts 2" in output
    assert len(experts(folder)) == 3


def test_crashes_without_end(folder):
    (folder / "told" / "crash-med").write_text("x" * 9)
    output = ended(begin(folder, "--seed_share", "0", "--slots", "3", "--max_restarts", "1"), 4)
    assert starts(folder).count("med") == 2
    assert "med: pretrain.py crashed (exit code -9), " in output
    assert not (folder / "out" / "forest.json").exists()
    assert (folder / "out" / "experts" / "code" / "perplexity.json").exists()


def test_a_program_that_ends_too_early_did_not_crash(folder):
    (folder / "told" / "wrong-med").write_text("0")
    output = ended(begin(folder, "--seed_share", "0", "--slots", "3", "--max_restarts", "0"), 4)
    assert "med: pretrain.py ended before it was finished (exit code 0), 0 restarts" in output


@pytest.mark.parametrize("code", [2, 3])
def test_a_mistake_is_told_and_not_tried_again(folder, code):
    (folder / "told" / "wrong-law").write_text(str(code))
    output = ended(begin(folder, "--seed_share", "0", "--slots", "2"), code)
    assert starts(folder).count("law") == 1
    assert f"law: pretrain.py ended with exit code {code}" in output
    assert "UserError: --data: is not what it should be" in output
    # Mended, the same command goes on: only what is missing is run.
    (folder / "told" / "wrong-law").unlink()
    ended(begin(folder, "--seed_share", "0", "--slots", "2"), 0)
    assert sorted(starts(folder)) == ["code", "law", "law", "med"]


def test_told_to_stop_jobs_save_and_the_driver_says_130(folder):
    driver = begin(folder, "--seed_share", "0", "--slots", "2", PAUSE="0.3")
    metrics = folder / "out" / "experts" / "law" / "metrics.jsonl"
    wait_for(metrics.exists)
    driver.send_signal(signal.SIGTERM)
    assert "the same command resumes" in ended(driver, 130)
    assert marked(folder) == []
    assert list((folder / "out" / "experts" / "law" / "checkpoints").glob("step-*"))
    ended(begin(folder, "--seed_share", "0", "--slots", "2"), 0)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]  # none was made twice


def test_a_killed_driver_leaves_jobs_that_the_next_one_waits_for(folder):
    # Slow enough that the jobs are still running when the next driver has started.
    driver = begin(folder, "--seed_share", "0", "--slots", "2", PAUSE="1")
    wait_for((folder / "out" / "experts" / "law" / "metrics.jsonl").exists)
    before = {process.pid for process in marked(folder)}
    driver.kill()
    driver.communicate()
    assert {process.pid for process in marked(folder)} == before and before
    output = ended(begin(folder, "--seed_share", "0", "--slots", "2", PAUSE="0.02"), 0)
    assert "law  adopted" in output
    assert sorted(starts(folder)) == ["code", "law", "med"]
    assert len(experts(folder)) == 3


def test_two_drivers_do_not_share_a_folder(folder):
    driver = begin(folder, "--seed_share", "0", PAUSE="0.3")
    wait_for((folder / "out" / "experts" / "law" / "metrics.jsonl").exists)
    assert "out: is in use by process" in ended(begin(folder, "--seed_share", "0"), 2)
    driver.terminate()
    ended(driver, 130)


def test_mistakes_start_nothing_and_change_nothing(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text("seed_shares: 0.5\n")
    before = tree(folder)
    hosts = folder / "nowhere"
    cases = [
        ((str(recipe),), "the nearest is 'seed_share'"),
        (("--rounds", "law tax"), "'tax' is not in"),
        (("--gpus_per_expert", "2"), "--gpus_per_expert"),
        (("--hostfile", str(hosts)), "nowhere: cannot be read"),
        (("--in_one_world", "--slots", "2"), "--in_one_world 3: does not fit"),
    ]
    for flags, message in cases:
        command = [sys.executable, str(folder / "launchers" / "btm.py"), *flags]
        command += ["--data", str(folder / "bin"), "--output_dir", str(folder / "out"), *FLAGS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and tree(folder) == before


def test_a_dry_run_names_commands_and_slots(folder):
    (folder / "hosts").write_text("node-1 slots=4\nnode-2 slots=4\n")
    before = tree(folder)
    flags = ("--hostfile", str(folder / "hosts"), "--gpus_per_expert", "2", "--dry_run")
    output = ended(begin(folder, *flags), 0)
    assert tree(folder) == before
    assert "--include node-1:0,1 --force_multi" in output
    for where in ("law: node-1:0,1", "med: node-1:2,3", "code: node-2:0,1"):
        assert f"\n{where}\n" in output
    assert "seed: node-1:0,1,2@node-2:0,1,2" not in output  # six slots are no whole machines
    assert "\nseed: node-1:0,1,2\n" in output


def test_the_driver_does_without_torch():
    program = "import sys; sys.modules['torch'] = None\nimport megamod.btm.driver, psutil\n"
    program += "assert not {'transformers', 'numpy', 'deepspeed'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
