"""The notebook of the documentation: its cells run in order, its commands in the same process."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from ranks import on_ranks

from megamod.__main__ import main

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"
# Fewer steps and shorter text than a reader runs; the loops and files are the same.
SHORTER = {
    r"--max_steps \d+": "--max_steps 2",
    r"(sentencepiece|wordpiece):\d+": r"\1:400",
    r"--max_new_tokens \d+": "--max_new_tokens 3",
    r"per_device_train_batch_size(:?) (?:16|64)": r"per_device_train_batch_size\1 4",
    r"hidden_size: 128": "hidden_size: 32",
}


def read_cells() -> list[dict[str, object]]:
    """The cells of the notebook, whose sources are lists of lines."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run_command(line: str) -> None:
    """Run `megamod VERB ...`, in this process."""
    program, *sys.argv[1:] = shlex.split(line)
    assert program == "megamod", line
    main()


def run_cells(_: int, folder: str, sources: list[str]) -> dict[str, list]:
    """Run the cells in a folder; return what the reader looks at."""
    import os

    import matplotlib

    matplotlib.use("Agg")
    os.chdir(folder)
    script = []
    for source in sources:
        # A notebook replaces {names} in commands of the shell.
        source = re.sub(r"\\\n *", "", source)
        script.append(re.sub(r"(?m)^( *)!(.*)$", lambda m: f"{m[1]}run_command(f{m[2]!r})", source))
    Path("cells.py").write_text("\n\n".join(script))
    names = runpy.run_path("cells.py", {"run_command": run_command})
    import matplotlib.pyplot as plt

    return {
        "sums": names["weights"].sum(0).tolist(),
        "shape": list(names["weights"].shape),
        "answers": [sorted(answer) for answer in names["classify"](names["lines"])],
        "figures": len(plt.get_fignums()),
    }


@pytest.mark.slow  # a seed, three experts, a mixture, two classifiers: all of the notebook
def test_the_cells_run_in_order(tmp_path):
    sources = ["".join(cell["source"]) for cell in read_cells() if cell["cell_type"] == "code"]
    for pattern, shorter in SHORTER.items():
        assert any(re.search(pattern, source) for source in sources), pattern
        sources = [re.sub(pattern, shorter, source) for source in sources]
    (seen,) = on_ranks(1, run_cells, str(tmp_path), sources)
    assert seen["shape"] == [3, 120] and seen["sums"] == pytest.approx([1.0] * 120, abs=1e-4)
    assert seen["answers"] == [["label", "score"]] * 6 and seen["figures"] == 4
    runs = tmp_path / "runs" / "notebook"
    record = json.loads((runs / "moe" / "moe.json").read_text())
    assert [expert["domain"] for expert in record["experts"]] == [
        *("python_code", "c_headers", "reference_prose")
    ]
    for name in ("seed", "sparse", "n1", "n2"):
        assert (runs / name / "model" / "config.json").is_file(), name
    assert (runs / "experts.png").is_file() and (runs / "attribution/attribution.png").is_file()


def test_outputs_are_small_and_complete():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in read_cells() if cell["cell_type"] == "code"]
    assert len(text) < 300_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    # Nothing of the machine that ran it.
    assert not re.search(r"/(?:home|root|tmp|work|usr)/", text)
