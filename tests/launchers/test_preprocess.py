import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import run_launcher

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launchers" / "preprocess.py"


launch = functools.partial(run_launcher, "preprocess")


def test_help_does_not_load_torch():
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(LAUNCHER)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    message = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert message.rstrip().endswith("[]")
    assert "--input news=data/news.jsonl" in message and "sentencepiece:VOCAB" in message


def test_text_to_data_bin(tmp_path):
    documents = [f"document {number} says {number * number}" for number in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": item}) for item in documents))
    command = (
        *("--input", f"first={tmp_path / 'a.txt'}", "--input", f"second={tmp_path / 'b.jsonl'}"),
        *("--tokenizer", "sentencepiece:300", "--output_dir", tmp_path / "out", "--field", "body"),
    )
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    header = json.loads((tmp_path / "out" / "databin.json").read_text())
    total = sum(of["tokens"] for splits in header["domains"].values() for of in splits.values())
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["domain", "first", "second"]
    assert lines[-1] == (
        f"{tmp_path / 'out'}: 2 domains, {total:,} tokens, sentencepiece tokenizer with 300 ids, "
        "one eos per document"
    )
    assert launch(*command).stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "a=missing.txt"], "missing.txt does not exist"),
        (["--input", "nothing"], "write NAME=PATH"),
        ([], "pass --input NAME=PATH or --builtin"),
        (["--builtin", "--input", "c_headers=x"], "--builtin has a domain of that name"),
        (["--input", "a=setup.py", "--workers", "0"], "allowed are 1 to"),
        (["--input", "a=setup.py", "--workers", "1000000"], "--workers 1000000: allowed are 1 to"),
        (["--input", "a=LICENSE"], "LICENSE: the ending '' is not one of"),
        (["--builtin", "--tokenizer", "sentencepiece:x"], "write the number of ids"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(tmp_path, arguments, message):
    done = launch("--tokenizer", "sentencepiece:300", "--output_dir", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("UserError: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
