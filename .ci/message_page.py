"""Page of the documentation site with every message of a mistake, made from the code.

A message is an f-string of a `raise UserError(...)`; its values appear as `…`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

GUIDES = {
    "btm": "btm.md",
    "convert": "conversion.md",
    "data": "data.md",
    "evaluation": "using-models.md",
    "merging": "merging.md",
    "mixture": "mixing.md",
    "planning": "planning.md",
    "serving": "serving.md",
    "models": "using-models.md",
}
"""Packages of megamod, and the page that explains what their messages are about."""

INTRODUCTION = """# Messages

A mistake ends a command with exit code 2 and one sentence that names the value, where it came from
and what is allowed. Search this page for the fixed part of a message; `…` stands for values. Exit
code 3 is a stop by policy (a loss that is not finite), 4 a lost rank, 130 an interruption with a
checkpoint written: see [reliability](reliability.md).
"""


def format_messages(package: Path) -> str:
    """Format the messages of all modules of a package as one page, by subpackage."""
    by_part: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        part = parts[0] if len(parts) > 1 else ""
        by_part.setdefault(part, set()).update(iterate_messages(path.read_text(encoding="utf-8")))
    lines = [INTRODUCTION]
    for part, messages in sorted(by_part.items()):
        if messages:
            guide = f" ([guide]({GUIDES[part]}))" if part in GUIDES else ""
            lines.append(f"## {part or 'Arguments and files'}{guide}\n")
            lines += [f"* `{message}`" for message in sorted(messages, key=str.lower)]
            lines.append("")
    return "\n".join(lines)


def iterate_messages(source: str) -> Iterator[str]:
    """Yield the text of every `UserError(...)` of a module whose argument is a string."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="UserError"), args=[first, *_]):
                text = format_text(first)
                if any(letter.isalpha() for letter in text):
                    yield " ".join(text.replace("`", "'").split())


def format_text(node: ast.expr) -> str:
    """Return a string expression with `…` for every value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(format_text(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return format_text(left) + format_text(right)
    return "…"
