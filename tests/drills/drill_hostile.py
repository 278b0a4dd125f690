"""S: files that would run code or write elsewhere do neither, whatever reads them."""

import json
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
from convert.test_reading import FORMS, HOSTILE
from drills.sizes import SEED, pick, report
from saved_models import make_model

from megamod.convert.reading import read_checkpoint
from megamod.convert.sources import resolve_model
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.tasks.task_file import read_task_spec
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.merging.recipe_file import read_recipe
from megamod.models.lm.load import load_lm
from megamod.states.weights import read_weights

CASES = pick(12, 200)
TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:subprocess.check_call [[touch, {canary}]]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
)
OUTSIDE = ("../outside", "/outside", "a/../../outside", "..")


def _pickle(folder: Path, canary: Path, draw: random.Random) -> list:
    case, form = draw.choice(sorted(HOSTILE)), draw.choice(sorted(FORMS))
    canary.with_name("program.py").write_text(f"open({str(canary)!r}, 'w')")
    model = make_model(folder / "model")
    (model / "model.safetensors").unlink()
    FORMS[form](HOSTILE[case](canary), model / "pytorch_model.bin")
    known = {"demix"}.__contains__
    return [
        lambda: read_checkpoint(model / "pytorch_model.bin"),
        lambda: load_lm(model, flag="--model"),
        lambda: resolve_model(str(model), "--model", known) and load_lm(model, flag="--model"),
    ]


def _yaml(folder: Path, canary: Path, draw: random.Random) -> list:
    tag = draw.choice(TAGS).format(canary=canary)
    file = folder / "file.yaml"
    file.write_text(
        draw.choice(("{}", "models: {}", "merge_method: linear\nmodels: [{}]")).format(tag)
    )
    return [
        lambda: read_recipe(file),
        lambda: read_task_spec(file),
        lambda: parse_args(argv=[str(file)]),
    ]


def _index(folder: Path, canary: Path, draw: random.Random) -> list:
    model = make_model(folder / "model")
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": draw.choice(OUTSIDE)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "outside").write_bytes(b"")
    return [lambda: read_weights(model), lambda: load_lm(model, flag="--model")]


def _code(folder: Path, canary: Path, draw: random.Random) -> list:
    model = make_model(folder / "model")
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    auto = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"], "AutoModel": "evil.M"}
    fields = {"model_type": draw.choice(("evil", "bert", "llama")), "auto_map": auto}
    fields["tokenizer_class"] = draw.choice(("evil.T", "T", "PreTrainedTokenizerFast"))
    for name in ("config.json", "tokenizer_config.json"):
        (model / name).write_text(json.dumps(fields))
    return [
        lambda: resolve_model(str(model), "--model"),
        lambda: load_tokenizer(model),
        lambda: load_lm(model, flag="--model"),
    ]


def _archive(folder: Path, canary: Path, draw: random.Random) -> list:
    file = folder / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", "3\n")
        archive.writestr(f"archive/data/{draw.choice(OUTSIDE)}", b"x" * draw.choice((1, 2**16)))
    return [lambda: read_checkpoint(file)]


KINDS = (_pickle, _pickle, _yaml, _index, _code, _archive)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_executed_or_written_elsewhere(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    lost = []
    for number in range(CASES):
        draw = random.Random(f"{SEED} {number}")
        folder = tmp_path / str(number) / "in"
        folder.mkdir(parents=True)
        canary = tmp_path / str(number) / "canary"
        kind = KINDS[number % len(KINDS)]
        calls = kind(folder, canary, draw)
        before = sorted(tmp_path.rglob("*"))
        for call in calls:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
                if kind is not _archive:  # a bare archive may be read: nothing is unpacked
                    lost.append((number, kind.__name__, "accepted"))
            except UserError:
                pass
            except BaseException as error:
                lost.append((number, kind.__name__, f"{type(error).__name__}: {error!s:.200}"))
        if canary.exists() or sorted(tmp_path.rglob("*")) != before:
            lost.append((number, kind.__name__, "executed, or written"))
        shutil.rmtree(tmp_path / str(number))
    assert not Path("/outside").exists()
    report(record_property, CASES, len(lost))
    assert lost == []
