"""Formats of the drill of damaged files: a valid file of each, and its reader."""

import json
from functools import partial
from pathlib import Path

from drills import signed
from drills.malformed import Format

from megamod.data.corpus.binarize import binarize
from megamod.data.corpus.decoding import Decoding
from megamod.data.corpus.documents import read_documents
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.databin import DataBin
from megamod.data.tasks.specs import TASKS, make_token_task
from megamod.data.tasks.task_file import read_task_spec
from megamod.data.tasks.text_labels import read_text_task
from megamod.data.tasks.word_labels import read_token_task
from megamod.dist.ds_config import resolve_ds_config
from megamod.dist.hostfile import read_hostfile
from megamod.flags import parse_args
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe
from megamod.models.lm.load import load_lm
from megamod.runs.studies import barrier_recipe, study_file, sweep
from megamod.states.checkpoint_folder import StateRecord
from megamod.states.forest import open_forest
from megamod.states.stream import ModelFolder
from megamod.states.weights import read_weights

TSV = "index\tsentence1\tsentence2\tlabel\n" + "".join(
    f"{n}\tone {n}\ttwo\t{'not_' * (n % 2)}entailment\n" for n in range(6)
)
CONLL = "-DOCSTART- O\n\n" + "EU B-ORG\nthe I-ORG\nrejects O\n\nBonn B-LOC\n. O\n\n" * 3
TASK = {"name": "t", "kind": "pair", "text": ["a", "d"], "label": "l", "labels": ["x", "y"]}
TASK |= {"metrics": ["f1"], "files": {"train": "a.tsv"}, "header": True}
DS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000, "overlap_comm": True},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "gradient_clipping": 1.0,
}
RUN = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 2,
    "gradient_clipping": 1.0,
}
RECIPE = {"model": "tiny", "max_steps": 4, "learning_rate": 0.003, "data": "bin", "domains": ["a"]}
MERGE = {
    "merge_method": "linear",
    "models": [
        {"model": "law", "parameters": {"weight": [0.5, 1.0]}},
        {
            "model": "code",
            "parameters": {"weight": [{"filter": "fc1", "value": 0.5}, {"value": 1.0}]},
        },
    ],
    "parameters": {"normalize": True},
    "dtype": "float32",
}
SWEEP = {"tasks": {"rte": {}}, "models": {"mux": {"num_instances": [2, 5]}}, "seeds": [1, 3]}
BARRIER = {
    "models": {"a": "law", "b": "code"},
    "pairs": [["a", "b"]],
    "variants": {"vanilla": {"method": "identity"}, "ff": {"groups": ["ff", "attn"]}},
    "points": 3,
    "task": "clm",
    "data": "text.txt",
    "max_items": 2,
}
STATE = {"state": {"step": 4, "data_step": 4, "tokens": {"law": 3}}, "world_size": 1}


def make_formats(root: Path) -> dict[str, tuple[Format, Path]]:
    """Make a folder with a valid file for every format.

    Returns:
        format and folder, by name.
    """
    from saved_models import make_model
    from tokenizers import Tokenizer, models

    def place(name: str, **files: str) -> Path:
        folder = root / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    result: dict[str, tuple[Format, Path]] = {}

    def add(name: str, folder: Path, file: str, kind: str, read) -> None:
        read(folder)  # a valid file is read
        result[name] = Format(file, read, kind), folder

    texts = [f"text {n} of {n * n}" for n in range(12)]
    many = [f"text {n} of {n * n}" for n in range(600)]
    add("text", place("text", a__txt="\n\n".join(texts)), "a.txt", "lines", _read_text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    add("jsonl", place("jsonl", a__jsonl=lines), "a.jsonl", "lines", _read_jsonl)
    add("tsv", place("tsv", train__tsv=TSV), "train.tsv", "lines", _read_tsv)
    add("conll", place("conll", train__txt=CONLL), "train.txt", "lines", _read_conll)
    data = root / "databin"
    binarize({"law": many}, "sentencepiece:280", data)
    add("bin", data, "law/train.bin", "binary", _read_databin)
    add("idx", data, "law/train.idx", "binary", _read_databin)
    add("databin.json", data, "databin.json", "json", _read_databin)
    flags = place("recipe", run__yaml=_yaml(RECIPE))
    add("recipe", flags, "run.yaml", "yaml", _read_flags)
    add("deepspeed", place("deepspeed", ds__json=json.dumps(DS)), "ds.json", "json", _read_ds)
    hosts = "node-1 slots=4\nnode-2 slots=4  # second\n10.0.0.3 slots=4\n"
    add("hostfile", place("hostfile", hosts=hosts), "hosts", "lines", _read_hostfile)
    models_folder = place("models")
    for name in ("law", "code"):
        make_model(models_folder / name)
    add("safetensors", models_folder, "law/model.safetensors", "binary", _read_weights)
    add("config.json", models_folder, "law/config.json", "json", _load_model)
    add("config of a merge", models_folder, "law/config.json", "json", partial(_merge, root))
    (models_folder / "merge.yml").write_text(_yaml(MERGE))
    add("merge recipe", models_folder, "merge.yml", "yaml", _plan_merge)
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors"}}
    sharded = place("index", **{"config__json": "{}"})
    _write_one_tensor(sharded / "x.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    add("index", sharded, "model.safetensors.index.json", "json", read_weights)
    entries = [_entry("law", "law"), _entry("code", "code")]
    (models_folder / "forest.json").write_text(json.dumps({"format": 1, "experts": entries}))
    add("forest.json", models_folder, "forest.json", "json", open_forest)
    pieces = place("tokenizer")
    words = {"[UNK]": 0, "[PAD]": 1, "</s>": 2, "<s>": 3, "a": 4, "b": 5}
    Tokenizer(models.WordLevel(words, "[UNK]")).save(str(pieces / "tokenizer.json"))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>"}
    special["tokenizer_class"] = "PreTrainedTokenizerFast"
    (pieces / "tokenizer_config.json").write_text(json.dumps(special))
    add("tokenizer.json", pieces, "tokenizer.json", "json", _encode)
    add("tokenizer_config", pieces, "tokenizer_config.json", "json", _encode)
    model_file = place("sentencepiece")
    (model_file / "sentencepiece.model").write_bytes(
        (data / "tokenizer" / "sentencepiece.model").read_bytes()
    )
    add("sentencepiece", model_file, "sentencepiece.model", "binary", _encode)
    task = place("task", task__yaml=_yaml(TASK), a__tsv="a\tb\tc\td\tl\n1\t2\t3\t4\tx\n")
    add("task", task, "task.yaml", "yaml", _read_task)
    add(
        "sweep",
        place("sweep", s__yaml=_yaml(SWEEP)),
        "s.yaml",
        "yaml",
        _read("s.yaml", sweep.read_sweep),
    )
    (models_folder / "b.yaml").write_text(_yaml(BARRIER))
    (models_folder / "text.txt").write_text("a text\n" * 40)
    add(
        "barrier study",
        models_folder,
        "b.yaml",
        "yaml",
        _read("b.yaml", barrier_recipe.read_barrier_study),
    )
    repository = Path(__file__).resolve().parents[2]
    study = sorted((repository / "launchers" / "recipes" / "studies").glob("*.yaml"))[0]
    folder = place("study", study__yaml=study.read_text())
    add("study", folder, "study.yaml", "yaml", _read("study.yaml", study_file.read_study))
    add(
        "state.json",
        place("state", state__json=json.dumps(STATE)),
        "state.json",
        "json",
        StateRecord.read,
    )
    for name, file, kind, read in signed.FORMATS:
        add(name, signed.make_checkpoint(root / name), file, kind, read)
    return result


def _yaml(value: object) -> str:
    import yaml

    return yaml.dump(value)


def _entry(domain: str, path: str) -> dict[str, object]:
    empty = {"member": None, "seed": None, "data_digest": None, "config_digest": None}
    numbers = {"start_update": 0, "updates": 0, "tokens": 0, "gpus": 1}
    return {"domain": domain, "path": path, "parents": [], **empty, **numbers}


def _write_one_tensor(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4)}, file)


def _read(name: str, reader):
    return lambda folder: reader(folder / name)


def _read_text(folder: Path) -> None:
    """Text is what lies between blank lines, and nothing is lost or invented."""
    documents = list(read_documents(folder / "a.txt", "text", Decoding()))
    raw = (folder / "a.txt").read_bytes().decode("utf-8-sig")
    assert "".join("".join(documents).split()) == "".join(raw.split())


def _read_jsonl(folder: Path) -> None:
    """Every object has its text, as a second reader finds it."""
    documents = list(read_documents(folder / "a.jsonl", "text", Decoding()))
    lines = (folder / "a.jsonl").read_bytes().decode("utf-8-sig").splitlines()
    assert len(documents) <= len(lines) + 1


def _read_tsv(folder: Path) -> None:
    _, sets = read_text_task(TASKS["rte"], folder, ["train"])
    assert set(sets["train"].labels.tolist()) <= {0, 1}


def _read_conll(folder: Path) -> None:
    task, sets = read_token_task(make_token_task("any"), folder, ["train"], repair=False)
    for words, labels in zip(sets["train"].words, sets["train"].labels, strict=True):
        assert len(words) == len(labels) and set(labels) <= set(task.labels)


def _read_databin(folder: Path) -> None:
    """A damaged data-bin is never read: all of it has digests."""
    split = DataBin(folder, "full").open_split("law", "train")
    tokens = _EXPECTED.setdefault(folder, split.tokens.tolist())
    assert split.tokens.tolist() == tokens


_EXPECTED: dict[Path, list[int]] = {}


def _read_flags(folder: Path) -> None:
    from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs

    parse_args(RunArgs, ModelArgs, OptimArgs, DataArgs, argv=[str(folder / "run.yaml")])


def _read_ds(folder: Path) -> None:
    origins = dict.fromkeys(RUN, "default")
    resolve_ds_config(str(folder / "ds.json"), RUN, origins)


def _read_hostfile(folder: Path) -> None:
    read_hostfile(folder / "hosts", require_selectable=True)


def _read_weights(folder: Path) -> None:
    read_weights(folder / "law")
    with ModelFolder(folder / "law"):
        pass


def _load_model(folder: Path) -> None:
    load_lm(folder / "law", flag="--model")


def _merge(root: Path, folder: Path) -> None:
    """Every merged model can be loaded, unless its type is unknown."""
    import shutil

    from transformers import CONFIG_MAPPING

    from megamod.merging.merge import average_folders

    output = root / "merged"
    try:
        average_folders([(folder / "law", None), (folder / "law", None)], [1, 1], output)
        if json.loads((output / "config.json").read_text()).get("model_type") not in CONFIG_MAPPING:
            return
        try:
            load_lm(output, flag="--model")
        except Exception as error:
            raise AssertionError(f"merged, but {error}") from error
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _plan_merge(folder: Path) -> None:
    recipe = read_recipe(folder / "merge.yml")
    merge(recipe, None, dry_run=True)


def _encode(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode_batch(["a b text"])
    assert all(0 <= item < tokenizer.vocab_size for item in ids)


def _read_task(folder: Path) -> None:
    read_text_task(read_task_spec(folder / "task.yaml"), folder, ["train"])
