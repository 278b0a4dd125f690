"""The notebook as a page of the documentation site: its text, code, output and pictures."""

import json
from pathlib import Path

LINK = "[The notebook itself](notebook.ipynb) opens in Jupyter.\n"
LONGEST = 40
"""Lines of an output on the page."""


def format_notebook(path: Path) -> str:
    """Format the cells of a notebook as Markdown; pictures are part of the text."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [format_output(output) for output in cell["outputs"]]
    parts.insert(1, LINK)
    return "\n\n".join(part for part in parts if part) + "\n"


def format_output(output: dict) -> str:
    """Format a text, shortened, or a picture; other outputs are dropped."""
    picture = output.get("data", {}).get("image/png")
    if picture is not None:
        return f"![](data:image/png;base64,{''.join(picture).strip()})"
    lines = "".join(output.get("text", ())).splitlines()
    if len(lines) > LONGEST:
        lines = [*lines[: LONGEST // 2], "...", *lines[-LONGEST // 2 :]]
    return "```text\n" + "\n".join(lines) + "\n```" if lines else ""
