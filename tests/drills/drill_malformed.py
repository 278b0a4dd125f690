"""F: damaged files of every format are read, or refused in one sentence; see malformed.py."""

import logging
import warnings

import pytest
from drills.formats import make_formats
from drills.malformed import run_cases
from drills.sizes import SEED, pick, report

CASES = pick(20, 10_000)  # of each format
NAMES = (
    *("text", "jsonl", "tsv", "conll", "bin", "idx", "databin.json", "recipe", "deepspeed"),
    *("hostfile", "safetensors", "config.json", "config of a merge", "merge recipe", "index"),
    *("forest.json", "tokenizer.json", "tokenizer_config", "sentencepiece", "task", "sweep"),
    *("barrier study", "study", "state.json", "signed state", "signed optimizer"),
    *("signed configuration", "manifest"),
)


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    formats = make_formats(tmp_path_factory.mktemp("formats"))
    assert tuple(formats) == NAMES
    return formats


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(name, formats, record_property):
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run_cases(name, *formats[name], 0, CASES, SEED)
    finally:
        logging.disable(logging.NOTSET)
    report(record_property, CASES, len(result.lost))
    assert result.lost == ()
    assert result.refused + result.accepted == CASES
    assert result.refused > CASES // 20  # the changes are ones that matter
