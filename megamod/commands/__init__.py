"""The commands of `megamod VERB`: each is a file with a function `main`, its help the docstring.

A file of `launchers/` calls the `main` of the same name, for deepspeed and torchrun, which start
files.
"""

import ast
from pathlib import Path

GROUPS = {
    "Before a run": ("preprocess", "plan", "check_hostfile", "recipes"),
    "Train language models and encoders": ("pretrain", "btm", "adapt", "forest"),
    "Train on tasks": ("finetune_glue", "finetune_ner", "finetune_mtl", "finetune_all"),
    "Make one model of several": ("merge", "to_moe"),
    "Use": ("generate", "serve", "attribute"),
    "Measure": ("eval_lm", "eval_ensemble", "eval_barrier", "report", "study"),
    "Files": ("convert", "verify"),
}
"""Modules of all commands by group; a verb is a module's name with hyphens."""


def list_verbs() -> list[str]:
    """List the verbs of all commands, in the order of `GROUPS`."""
    return [name.replace("_", "-") for names in GROUPS.values() for name in names]


def read_command_summary(name: str) -> str:
    """Read the first paragraph of the docstring of a command's module, without importing it.

    `name` is a module in `GROUPS`; the paragraph becomes one line.
    """
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return " ".join(ast.get_docstring(ast.parse(source)).partition("\n\n")[0].split())
