"""Kill -9 of Branch-Train-Merge jobs and of their driver, at random moments, again and again.

    python tests/drills/btm_kill.py --folder runs/btm-kill --kills 20 --seed 1

A tiny forest of three experts is grown once undisturbed. Then it is grown again and again: each
time a random process of a random job, or the driver, is killed, and a killed driver is started
again. Every forest that so comes about must have the weights and the optimizer of the first, bit
for bit. The drill goes on where it was stopped; it ends with a summary, and exit code 1 if any
forest differed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megamod.btm.jobs import MARK

REPOSITORY = Path(__file__).resolve().parents[2]
DOMAINS = ("law", "med", "code")
RECIPE = """
model: tiny
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
max_steps: 40
seed_share: 0.25
per_device_train_batch_size: 1
global_batch_size: 6
logging_steps: 4
save_steps: 4
save_total_limit: 2
eval_batches: 1
max_seq_length: 32
learning_rate: 3.0e-3
report_to: none
max_restarts: 1000
slots: 2
domains: [law, med, code]
"""
LONGEST = 900  # seconds that one undisturbed stretch may take


def drill(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill so many times in all and finish the last forest; returns counts of what happened.

    Returns:
        kills of jobs and of drivers, forests compared, forests that differed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "counts.json"
    counts = {"jobs": 0, "drivers": 0, "forests": 0, "different": 0}
    if file.exists():
        counts = json.loads(file.read_text())
    prepare(folder)
    whole = folder / "whole"
    if not (whole / "forest.json").exists():
        assert start(folder, whole).wait(LONGEST) == 0, (folder / "driver.log").read_text()[-3000:]
    while counts["jobs"] + counts["drivers"] < kills or (folder / "cut").exists():
        disturbed(folder, counts, kills, seed, file)
        counts["forests"] += 1
        same = digests(folder / "cut") == digests(whole)
        counts["different"] += not same
        file.write_text(json.dumps(counts))
        kept = folder / f"different-{counts['forests']}"
        shutil.rmtree(folder / "cut") if same else (folder / "cut").rename(kept)
    return counts


def prepare(folder: Path) -> None:
    """A data-bin of made-up sentences, and the recipe."""
    if not (folder / "bin").exists():
        from megamod.data.corpus.binarize import binarize

        words = random.Random(0)
        binarize(
            {
                domain: [
                    " ".join(words.choices([f"{domain}{c}" for c in "abcdefgh"], k=40)) + "."
                    for _ in range(200)
                ]
                for domain in DOMAINS
            },
            "sentencepiece:300",
            folder / "bin",
        )
    (folder / "recipe.yaml").write_text(RECIPE + f"data: {folder / 'bin'}\n")


def disturbed(folder: Path, counts: dict[str, int], kills: int, seed: int, file: Path) -> None:
    """Grow the forest in folder/cut, killing on the way."""
    cut = folder / "cut"
    if not cut.exists():
        # The seed is a job like the others; grown once, it leaves the time to the experts.
        shutil.copytree(folder / "whole" / "seed", folder / ".cut" / "seed", dirs_exist_ok=True)
        (folder / ".cut").rename(cut)
    driver = start(folder, cut)
    deadline = time.monotonic() + LONGEST
    while True:
        built = counts["jobs"] + counts["drivers"]
        if built >= kills:
            assert driver.wait(LONGEST) == 0, (folder / "driver.log").read_text()[-3000:]
            return
        choose = random.Random(f"{seed} {built}")
        moment = time.monotonic() + choose.uniform(0.5, 15)
        while time.monotonic() < moment and driver.poll() is None:
            time.sleep(0.05)
        if driver.poll() is not None:
            assert driver.returncode == 0, (folder / "driver.log").read_text()[-3000:]
            return
        assert time.monotonic() < deadline, "the forest does not grow"
        result = processes(cut)
        if choose.random() < 0.4 or not result:
            driver.kill()
            driver.wait()
            counts["drivers"] += 1
            time.sleep(choose.uniform(0, 3))
            driver = start(folder, cut)
        else:
            choose.choice(result).kill()
            counts["jobs"] += 1
        file.write_text(json.dumps(counts))


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """A driver."""
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "launchers" / "btm.py")]
    command += [str(folder / "recipe.yaml"), "--output_dir", str(output)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(folder / "driver.log", "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def processes(output: Path) -> list[psutil.Process]:
    """Living processes of the jobs in a folder, by process number."""
    result = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if mark.startswith(f"{output.resolve()}{os.sep}"):
            result.append(process)
    return sorted(result, key=lambda process: process.pid)


def digests(output: Path) -> dict[str, str]:
    """Digests of every file of models and checkpoints, and what the forest says of its experts.

    run.yaml names the folder, which is left out, and manifests without its digest are compared.
    """
    message = {}
    files = [*output.glob("experts/*/model/*"), *output.glob("experts/*/checkpoints/step-*/*")]
    for file in sorted(files):
        content = file.read_bytes()
        if file.name == "run.yaml":
            content = content.replace(str(output).encode(), b"")
        if file.name == "manifest.json":
            listed = json.loads(content)["files"]
            del listed["run.yaml"]
            content = json.dumps(listed).encode()
        message[str(file.relative_to(output))] = hashlib.sha256(content).hexdigest()
    for entry in json.loads((output / "forest.json").read_text())["experts"]:
        kept = {key: value for key, value in entry.items() if key != "parents"}
        message[entry["domain"]] = json.dumps(kept, sort_keys=True)
    return message


def main() -> None:
    """Parse, kill, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.monotonic()
    try:
        counts = drill(args.folder.resolve(), args.kills, args.seed)
    finally:
        for process in processes(args.folder.resolve()):
            process.send_signal(signal.SIGKILL)
    output = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{output}; {time.monotonic() - begun:.0f} s")
    sys.exit(counts["different"] > 0)


if __name__ == "__main__":
    main()
