"""Inputs that are possible but rare: each command ends in one sentence, or goes on."""

import json
import shutil
from types import SimpleNamespace

import pytest
from deepspeed.accelerator import get_accelerator
from drills.commands import make_workplace
from drills.warm import Command
from models.tiny_hosts import tiny_stock

from megamod.runs.pretrain.causal_lm import list_stock_files

LONG = "x" * 300  # more than a file system takes as a name
RUN = ("pretrain", "in/lm.yaml")
OUT = ("--output_dir", "out")


@pytest.fixture
def workplace(inputs, tmp_path):
    folder = make_workplace(tmp_path / "workplace", inputs)
    shutil.copytree(inputs / "bin", folder / "bin")
    return folder


def run(warm, folder, *words):
    outcome = warm.run(Command(words, str(folder)))
    assert "Traceback" not in outcome.text, outcome.text
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*RUN, "--output_dir", LONG), "File name too long"),
        ((*RUN, *OUT, "--data", LONG), "File name too long"),
        ((*RUN, *OUT, "--model", LONG), "File name too long"),
        ((*RUN, *OUT, "--init_from", LONG * 20), "File name too long"),
        (("pretrain", f"{LONG}.yaml", *OUT), "File name too long"),
        (("forest", "branch", "--parents", "in/law", "--domain", LONG, *OUT), "is not made of"),
        (("verify", LONG * 20), "File name too long"),
        (("eval_lm", "--model", LONG, "--data", "in/bin", "--domains", "law"), "too long"),
        ((*RUN, *OUT, "--intermediate_size", str(10**15)), "not enough memory"),
        ((*RUN, *OUT, "--deepspeed", "large.json"), "not enough memory"),
        ((*RUN, *OUT, "--deepspeed", "huge.json"), "which no size or interval can be"),
    ],
    ids=range(11),
)
def test_one_sentence_and_exit_code_2(warm, workplace, words, message):
    for name, size in (("large", 10**18), ("huge", 10**40)):
        content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": size}}
        (workplace / f"{name}.json").write_text(json.dumps(content))
    outcome = run(warm, workplace, *words)
    assert outcome.code == 2 and message in outcome.text, outcome.text[-900:]
    assert len(outcome.text.splitlines()[-1]) < 1000
    assert (
        not list(workplace.glob("out/checkpoints/step-*"))
        and not (workplace / "out/model").exists()
    )


@pytest.mark.slow
def test_precisions_that_the_processor_lacks_are_refused(warm, workplace):
    """Some processors compute in fp16; on all others it is refused before anything is written."""
    outcome = run(warm, workplace, *RUN, *OUT, "--precision", "fp16")
    if get_accelerator().is_fp16_supported():
        assert outcome.code == 0 and (workplace / "out/model").exists(), outcome.text[-900:]
    else:
        assert outcome.code == 2 and "Allowed here (cpu) are fp32, bf16" in outcome.text
        assert not (workplace / "out/model").exists()


@pytest.mark.slow
def test_a_resumed_run_notices_changed_data_under_an_equal_header(warm, workplace):
    words = (*RUN, *OUT, "--data", "bin")
    assert run(warm, workplace, *words, "--stop_step", "4").code == 0
    for file, at in (("law/train.bin", 100), ("tokenizer/tokenizer.json", 300)):
        before = (workplace / "bin" / file).read_bytes()
        changed = bytearray(before)
        changed[at] ^= 1
        (workplace / "bin" / file).write_bytes(changed)
        outcome = run(warm, workplace, *words)
        assert outcome.code == 2 and f"bin/{file}" in outcome.text, outcome.text[-900:]
        (workplace / "bin" / file).write_bytes(before)
    outcome = run(warm, workplace, *words)
    assert outcome.code == 0 and "resumes at step 4" in outcome.text


@pytest.mark.slow
def test_a_folder_among_the_files_of_a_tokenizer_is_not_copied(warm, workplace, tmp_path):
    (workplace / "bin" / "tokenizer" / "notes").mkdir()
    assert run(warm, workplace, *RUN, *OUT, "--data", "bin").code == 0
    for folder in (workplace / "out" / "model", workplace / "out" / "checkpoints" / "step-6"):
        assert (folder / "tokenizer.json").is_file() and not (folder / "notes").exists()
    # A stock model without a tokenizer gets that of the data.
    model = tiny_stock("gpt2")
    model.config.save_pretrained(tmp_path / "gpt2")
    databin = SimpleNamespace(path=workplace / "bin", tokenizer_digest=None)
    data = SimpleNamespace(databin=databin, tokenizer_folder=workplace / "bin" / "tokenizer")
    files = list_stock_files(str(tmp_path / "gpt2"), model.config, data)
    assert "tokenizer.json" in [file.name for file in files]
    assert all(file.is_file() for file in files)
