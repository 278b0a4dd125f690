"""Pages of the documentation site that are made from other files: hooks of mkdocs.

The README becomes the first page, `options.md` has the flags of every command, from the same
dataclasses as `--help`, `messages.md` the messages of all mistakes, and `notebook.md` the cells and
outputs of the notebook.
"""

import contextlib
import importlib.util
import io
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from megamod.commands import GROUPS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "ds_configs/README.md": "ds_configs.md",
    "launchers/recipes/README.md": "recipes.md",
}
"""Pages outside of docs/, and their names on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewrite_links(text, source)))
    files.append(File.generated(config, "options.md", content=format_options()))
    notebook = load_neighbour("notebook_page").format_notebook(REPOSITORY / "docs/notebook.ipynb")
    files.append(File.generated(config, "notebook.md", content=notebook))
    messages = load_neighbour("message_page").format_messages(REPOSITORY / "megamod")
    files.append(File.generated(config, "messages.md", content=messages))
    return files


def on_page_markdown(markdown: str, *, page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page in docs/."""
    return (
        markdown if page.file.generated_by else rewrite_links(markdown, f"docs/{page.file.src_uri}")
    )


def rewrite_links(text: str, source: str) -> str:
    """Rewrite relative links: to pages of the site, and to other files as their bare titles."""

    def rewrite(match: re.Match) -> str:
        title, link, anchor = match.groups()
        target = os.path.normpath(os.path.join(os.path.dirname(source), link))
        target = {"docs/notebook.ipynb": "docs/notebook.md"}.get(target, target)
        if target in PAGES:
            return f"[{title}]({PAGES[target]}{anchor or ''})"
        if target.startswith("docs/"):
            return f"[{title}]({target.removeprefix('docs/')}{anchor or ''})"
        return title

    text = re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", text)  # pictures of the README
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([\w./-]+)(#[\w-]+)?\)", rewrite, text)


def load_neighbour(name: str) -> ModuleType:
    """Load another file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def format_options() -> str:
    """Format the help of every command as one page."""
    parts = ["# Options\n\nThe help of every command. Hyphens and underscores are the same.\n"]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            verb = name.replace("_", "-")
            command = importlib.import_module(f"megamod.commands.{name}")
            words = [f"megamod {verb}", "--help"]
            with (
                mock.patch.object(sys, "argv", words),
                mock.patch.dict(os.environ, {"COLUMNS": "100"}),
                contextlib.redirect_stdout(io.StringIO()) as output,
                contextlib.suppress(SystemExit),
            ):
                command.main()
            parts.append(f"### {verb}\n\n```text\n{output.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)
