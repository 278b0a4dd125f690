"""Commands that write a folder, on tiny inputs, and the comparison of what two of them wrote.

Every command works in a folder of its own with the inputs as `in` and writes `out`, so that two
runs may write equal bytes.
"""

import hashlib
import json
import random
from pathlib import Path

from megamod.data.corpus.binarize import binarize

DOMAINS = ("law", "code")
LM = """
model: tiny
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
intermediate_size: 32
max_seq_length: 16
per_device_train_batch_size: 2
global_batch_size: 4
max_steps: 6
save_steps: 2
eval_steps: 3
logging_steps: 1
eval_batches: 1
learning_rate: 3.0e-3
report_to: none
data: in/bin
"""
SHORT = ("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--report_to", "none")
ROWS = ("--per_device_train_batch_size", "4", "--eval_steps", "2", *SHORT)
OUT = ("--output_dir", "out")
TEXTS = tuple(f"{domain}=in/{domain}.txt" for domain in DOMAINS)
COMMANDS: dict[str, tuple[str, ...]] = {
    "merge": ("merge", "--models", "in/law", "in/code", "--num_threads", "1", *OUT),
    "preprocess": (
        *("preprocess", "--input", *TEXTS, "--tokenizer", "sentencepiece:300", "--workers", "1"),
        *OUT,
    ),
    "dense": ("pretrain", "in/lm.yaml", *OUT),
    "demix": ("pretrain", "in/lm.yaml", "--untie", "feedforward", *OUT),
    "independent": ("pretrain", "in/lm.yaml", "--domains", "law", "--untie", "all", *OUT),
    "encoder": (
        *("pretrain", "--model", "in/bert", "--objective", "masked_lm", "--data", "in/words"),
        *("--max_seq_length", "8", "--per_device_train_batch_size", "4", *SHORT, *OUT),
    ),
    "classifier": (
        *("finetune_glue", "--task", "sst-2", "--data_dir", "in/glue/SST-2", "--model", "in/bert"),
        *("--do_train", "--do_eval", "--do_predict", *ROWS, *OUT),
    ),
    "tasks": (
        *("finetune_mtl", "--tasks", "sst-2", "rte", "--data_dir", "in/glue", "--model", "in/bert"),
        *("--do_train", "--do_eval", "--max_seq_length", "16", *ROWS, *OUT),
    ),
    "adapt": (
        *("adapt", "--forest", "in/demix", "--data", "in/new", "--domain", "art", "--start", "law"),
        *("--per_device_train_batch_size", "2", *SHORT, *OUT),
    ),
    "convert": (
        *("convert", "--format", "expert", "--input", "in/demix", "--domains", "law", *OUT),
    ),
    "sample": ("preprocess", "--input", *TEXTS, "--sample_lines", "3", *OUT),
    "seeds": (
        *("finetune_glue", "--task", "sst-2", "--data_dir", "in/glue/SST-2", "--model", "in/bert"),
        *("--do_train", "--seeds", "1", "2", *ROWS, *OUT),
    ),
}
_SILENT = ("env.json", ".lock", ".log", ".png")  # endings of files that hold times or pixels
_UNSTABLE = ("second", "_ms", "memory", "mfu", "forest")  # parts of keys


def make_inputs(folder: Path) -> Path:
    """Make the inputs of all commands."""
    from runs.test_multitask import make_place as make_tasks
    from saved_models import make_data, make_model

    folder.mkdir()
    make_tasks(folder)
    draw = random.Random(0)
    texts = {
        domain: [" ".join(draw.choices([domain + c for c in "abcdefgh"], k=20)) for _ in range(80)]
        for domain in DOMAINS
    }
    for domain, documents in texts.items():
        (folder / f"{domain}.txt").write_text("\n\n".join(documents) + "\n")
        make_model(folder / domain)
    make_model(folder / "demix", untie="feedforward", domains=list(DOMAINS))
    make_data(folder / "new")
    binarize(texts, "sentencepiece:300", folder / "bin")
    binarize(texts | {"code": texts["law"]}, "sentencepiece:300", folder / "bin2")
    (folder / "lm.yaml").write_text(LM)
    words = [f"w{n}" for n in range(12)]
    lines = [" ".join(draw.choices(words, k=10)) for _ in range(80)]
    binarize({"words": lines}, str(folder / "bert"), folder / "words", add_bos=True)
    return folder


def make_workplace(folder: Path, inputs: Path) -> Path:
    """Make a folder that a command can work in."""
    folder.mkdir(parents=True)
    (folder / "in").symlink_to(inputs)
    return folder


def read_tree(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder, by relative path, without times and absolute paths.

    Logs must have every step once.
    """
    result = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name.endswith(_SILENT):
            continue
        content = file.read_bytes()
        if file.suffix == ".jsonl" and "predictions" not in name:
            records = [_drop_unstable(json.loads(line)) for line in content.splitlines()]
            content = json.dumps(records).encode()
        elif file.name in ("results.json", "evaluations.json", "start.json"):
            content = json.dumps(_drop_unstable(json.loads(content))).encode()
        result[name] = hashlib.sha256(content).hexdigest()
    return result


def _drop_unstable(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _drop_unstable(item)
            for key, item in value.items()
            if not any(word in key for word in _UNSTABLE)
        }
    return [_drop_unstable(item) for item in value] if isinstance(value, list) else value


def list_leftovers(folder: Path) -> list[str]:
    """Names of locks and temporary files below a folder.

    Without an empty one of a process that was killed before it wrote its name: nobody can tell that
    its owner is dead before it is two minutes old.
    """
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if not (path.match(".*in_use.*.tmp") and path.stat().st_size == 0)
        and (
            path.name.endswith((".tmp", ".in_use", ".partial", ".old"))
            or path.name.startswith((".tmp-", ".start"))
        )
    )
