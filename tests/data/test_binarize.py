import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megamod.data.corpus import binarize as module
from megamod.data.corpus.binarize import binarize
from megamod.data.corpus.documents import assign_split
from megamod.data.corpus.indexed import IndexedDataset, format_split_prefix
from megamod.data.corpus.tokenizers import load_tokenizer, train_sentencepiece
from megamod.errors import UserError
from megamod.folder_lock import Holder, lock_folder_name

SPLITS = ("train", "valid", "test")


def text_of(number: int) -> str:
    source = random.Random(number)
    words = ["model", "expert", "merge", "naïve", "the", "of", "x=1", "漢字"]
    return "\n".join(
        " ".join(source.choices(words, k=source.randint(1, 12))) for _ in range(1 + number % 3)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece([text_of(number) for number in range(300)], 320)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    rows = [json.dumps({"text": text_of(number)}) for number in range(200)]
    (root / "one.jsonl").write_text("\n".join(rows))
    (root / "two").mkdir()
    for where, split in enumerate(SPLITS):
        texts = [text_of(1000 + 10 * where + number) for number in range(10)]
        (root / "two" / f"{split}.txt").write_text("\n\n".join(texts) + "\n")
    return {"zeta": root / "one.jsonl", "alpha": root / "two"}


@pytest.fixture(scope="module")
def baseline(inputs, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("baseline") / "out"
    binarize(inputs, tokenizer, output, workers=1)
    return output


def test_bos_starts_each_item(inputs, tokenizer, baseline, tmp_path):
    header = binarize(inputs, tokenizer, tmp_path / "out", add_bos=True, workers=1)
    assert header["bos"] is True
    for domain, splits in header["domains"].items():
        for split, of in splits.items():
            plain = stored(baseline, domain, split)
            assert stored(tmp_path / "out", domain, split) == [[0, *item] for item in plain]
            assert of["tokens"] == sum(map(len, plain)) + len(plain)


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def naive(texts: list[str], tokenizer) -> list[list[int]]:
    return [[*tokenizer.backend.encode(text).ids, 2] for text in texts]


def stored(output: Path, domain: str, split: str) -> list[list[int]]:
    data = IndexedDataset(output / format_split_prefix(domain, split))
    return [
        data.tokens[data.offsets[item] : data.offsets[item + 1]].tolist()
        for item in range(len(data))
    ]


def test_items_and_header(baseline, inputs, tokenizer):
    header = json.loads((baseline / "databin.json").read_text())
    assert list(header["domains"]) == ["zeta", "alpha"]
    assert header["tokenizer"] == {"kind": "sentencepiece", "digest": tokenizer.digest}
    named = {name: header[name] for name in ("format", "vocab_size", "items", "replaced")}
    assert named == {
        "format": 1,
        "vocab_size": 320,
        "items": "document",
        "replaced": {"zeta": 0, "alpha": 0},
    }
    assert [header[f"{name}_id"] for name in ("bos", "pad", "eos", "unk")] == [0, 1, 2, 3]
    texts = {"zeta": {split: [] for split in SPLITS}}
    for number in range(200):
        texts["zeta"][assign_split(text_of(number), 0)].append(text_of(number))
    texts["alpha"] = {
        split: [text_of(1000 + 10 * where + number) for number in range(10)]
        for where, split in enumerate(SPLITS)
    }
    for domain, splits in texts.items():
        for split, documents in splits.items():
            expected = naive(documents, tokenizer)
            assert stored(baseline, domain, split) == expected
            of = header["domains"][domain][split]
            assert of["items"] == len(documents)
            assert of["tokens"] == sum(map(len, expected))
            assert of["bytes"] == sum(len(document.encode()) for document in documents)
            assert of["max_id"] == max(map(max, expected))
            prefix = baseline / format_split_prefix(domain, split)
            for ending, digest in of["sha256"].items():
                content = Path(f"{prefix}.{ending}").read_bytes()
                assert hashlib.sha256(content).hexdigest() == digest


def test_layout(baseline):
    assert sorted(name for name in tree(baseline) if not name.startswith("tokenizer/")) == sorted(
        ["databin.json", "dict.txt"]
        + [
            f"{domain}/{name}"
            for domain in ("zeta", "alpha")
            for name in [
                "dict.txt",
                *(
                    f"{stem}.{ending}"
                    for stem in ("train", f"valid_{domain}", f"test_{domain}")
                    for ending in ("bin", "idx")
                ),
            ]
        ]
    )
    assert load_tokenizer(baseline / "tokenizer").vocab_size == 320
    assert [path.name for path in baseline.parent.iterdir()] == ["out"]


def test_items_are_lines_blank_lines_included(inputs, tokenizer, tmp_path):
    header = binarize(inputs, tokenizer, tmp_path / "out", item_unit="line")
    lines = (inputs["alpha"] / "train.txt").read_text().split("\n")[:-1]
    assert stored(tmp_path / "out", "alpha", "train") == naive(lines, tokenizer)
    assert "" in lines and header["items"] == "line"
    documents = [
        text_of(number) for number in range(200) if assign_split(text_of(number), 0) == "test"
    ]
    lines = "\n\n".join(documents).split("\n")
    assert stored(tmp_path / "out", "zeta", "test") == naive(lines, tokenizer)


def test_same_bytes_for_any_number_of_workers(baseline, inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megamod.data.corpus.pool.BATCH_TEXTS", 7)
    for workers in (1, 2):
        binarize(inputs, tokenizer, tmp_path / str(workers), workers=workers)
        assert tree(tmp_path / str(workers)) == tree(baseline)


def test_trained_on_the_train_splits(inputs, tmp_path):
    header = binarize(inputs, "sentencepiece:320", tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out" / "tokenizer")
    texts = [text_of(n) for n in range(200) if assign_split(text_of(n), 0) == "train"]
    texts += [text_of(1000 + number) for number in range(10)]
    assert loaded.digest == train_sentencepiece(texts, 320).digest == header["tokenizer"]["digest"]


def test_the_same_command_does_nothing_and_another_is_refused(inputs, tokenizer, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    header = binarize(inputs, tokenizer, output)
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert binarize(inputs, tokenizer, output) == json.loads(json.dumps(header))
    swapped = dict(reversed(inputs.items()))
    for arguments, options in (
        (inputs, {"item_unit": "line"}),
        (inputs, {"add_bos": True}),
        (swapped, {}),
        (inputs, {"seed": 1}),
    ):
        with pytest.raises(UserError, match="made from other text"):
            binarize(arguments, tokenizer, output, **options)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == stamps


def test_the_same_command_after_a_kill_at_the_end_deletes_what_is_left(inputs, tokenizer, tmp_path):
    binarize(inputs, tokenizer, tmp_path / "out")
    (tmp_path / ".out.partial" / "parts").mkdir(parents=True)
    dead = replace(Holder.make_for_this_process(), started=1)
    (tmp_path / ".out.in_use").write_text(json.dumps(asdict(dead)))
    binarize(inputs, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_folder_is_refused_and_untouched(inputs, tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(UserError, match="not a data-bin"):
        binarize(inputs, tokenizer, tmp_path)
    assert list(tree(tmp_path)) == ["mine.txt"]


def bad(root: Path, kind: str) -> Path:
    path = root / f"{kind}.{'jsonl' if kind in ('json', 'field') else 'txt'}"
    many = "\n\n".join(text_of(number) for number in range(100)).encode()
    content = {
        "utf8": many + b"\xff",
        "nul": many + b"\0",
        "empty": b"",
        "blank": b"\n \n\n",
        "few": b"a single document",
        "json": b'{"text": "a"}\n{',
        "field": b'{"body": "a"}\n',
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["utf8", "nul", "empty", "blank", "few", "json", "field"])
def test_bad_input_leaves_nothing(inputs, tokenizer, tmp_path, kind):
    path = bad(tmp_path, kind)
    with pytest.raises(UserError, match=path.name):
        binarize({**inputs, "bad": path}, tokenizer, tmp_path / "deep" / "out")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_empty_domain_is_named(inputs, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"domain bad: .* holds no text"):
        binarize({**inputs, "bad": bad(tmp_path, "empty")}, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"has 51 documents, none in the split valid.*blank lin"):
        binarize({"bad": ["the same document"] * 50 + ["b"]}, tokenizer, tmp_path / "out", seed=3)


@pytest.mark.parametrize("name", ["a b", "../a", "", "tokenizer", "é"])
def test_domain_names(inputs, tokenizer, tmp_path, name):
    with pytest.raises(
        UserError, match=r"--input(: .* is not made of letters|.* is the name of a folder)"
    ):
        binarize({name: inputs["zeta"]}, tokenizer, tmp_path / "out")


def test_replaced_characters_are_counted(inputs, tokenizer, tmp_path):
    path = bad(tmp_path, "utf8")
    header = binarize({"a": path, **inputs}, tokenizer, tmp_path / "out", encoding_errors="replace")
    assert header["replaced"] == {"a": 1, "zeta": 0, "alpha": 0}


def test_finished_parts_of_an_interrupted_run_are_kept(
    baseline, inputs, tokenizer, tmp_path, monkeypatch
):
    real, calls = module.write_split, []

    def stops_at_the_fourth(texts, *rest):
        calls.append(rest[2].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(texts, *rest)

    monkeypatch.setattr(module, "write_split", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        binarize(inputs, tokenizer, tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    # As a kill leaves a file that was being written, or a full disk.
    (tmp_path / ".out.partial" / "databin" / ".dict.txt.0123abcd.tmp").write_text("cut")
    binarize(inputs, tokenizer, tmp_path / "out", workers=1)
    assert calls[4:] == ["train", "valid_alpha", "test_alpha"]
    assert tree(tmp_path / "out") == tree(baseline)


def test_parts_of_other_options_are_not_kept(baseline, inputs, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            module, "_complete_databin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        binarize(inputs, tokenizer, tmp_path / "out", item_unit="line")
    binarize(inputs, tokenizer, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(baseline)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", ["replace", "rename", "fsync"])
def test_a_failing_disk_at_any_call_leaves_no_half_output(
    baseline, inputs, tokenizer, tmp_path, monkeypatch, call
):
    """Fail the n-th call for n = 1, 2, 5, 10, ...; what is left must let the next run finish."""
    real = getattr(os, call)
    output = tmp_path / "out"
    failing = iter([1, 2, 5, 10, 20, 40, 80, 160, 320, 640])
    while not output.exists():
        left = [next(failing)]

        def fails(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                binarize(inputs, tokenizer, output, workers=1)
            except UserError as error:
                assert "No space left" in str(error)
    assert tree(output) == tree(baseline)


@pytest.mark.slow
def test_kill_at_random_times(baseline, inputs, tmp_path):
    program = (
        "import sys; from megamod.data.corpus.binarize import binarize; "
        "given = dict(one.split('=') for one in sys.argv[3:]); "
        "binarize(given, sys.argv[1], sys.argv[2], workers=1)"
    )
    arguments = [f"{name}={path}" for name, path in inputs.items()]
    command = [sys.executable, "-c", program, str(baseline / "tokenizer"), str(tmp_path / "out")]
    dice = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([*command, *arguments])
        try:
            process.wait(timeout=dice.uniform(0.2, 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "out").exists():
            assert tree(tmp_path / "out") == tree(baseline)
    subprocess.run([*command, *arguments], check=True)
    assert tree(tmp_path / "out") == tree(baseline)


def test_two_runs_into_one_folder(inputs, tokenizer, tmp_path):
    with (
        lock_folder_name(tmp_path / "out"),
        pytest.raises(UserError, match="is in use by process"),
    ):
        binarize(inputs, tokenizer, tmp_path / "out")


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    from megamod.data.corpus.tokenizers import Tokenizer

    backend = Backend(models.WordLevel({f"w{item}": item for item in range(70000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wide = Tokenizer("huggingface", backend, 1, 1, 69999, 0)
    documents = [f"w{69000 + number} w{number}" for number in range(200)]
    header = binarize({"a": documents}, wide, tmp_path / "out")
    data = IndexedDataset(tmp_path / "out" / "a" / "train")
    assert np.dtype(data.dtype) == np.int32
    assert int(data.tokens.max()) == header["domains"]["a"]["train"]["max_id"] == 69999
    assert not (tmp_path / "out" / "dict.txt").exists()
