"""The console command: `megamod VERB ...`, `python -m megamod VERB ...`.

deepspeed --module megamod VERB ...
torchrun --nproc_per_node 2 -m megamod VERB ...
"""

import importlib
import os
import sys

from megamod.command_line import CommandParser, make_unknown_word_error, set_completions
from megamod.commands import GROUPS, list_verbs, read_command_summary
from megamod.errors import UserError, run_main
from megamod.version import __version__

ENDING = """\
megamod VERB --help lists the flags of a verb; hyphens and underscores are the same. In several
processes: deepspeed --module megamod VERB ..., or launchers/VERB.py of the repository.
Completion: pip install argcomplete, and in the shell eval "$(register-python-argcomplete megamod)".
"""


def main() -> None:
    """Call the `main` of the verb on the command line with the rest of it in `sys.argv`.

    Without a verb, and with --help, print the list of all verbs; with --version the version. Under
    shell completion, print completions and end the process.

    Raises:
        UserError: for an unknown verb, and as the verb's `main`.
    """
    words = sys.argv[1:]
    if "_ARGCOMPLETE" in os.environ:
        words = _complete_verb()
    # The deepspeed launcher inserts --local_rank=N before the arguments of the user; LOCAL_RANK is
    # what is read.
    if words and words[0].startswith("--local_rank="):
        words.pop(0)
    verb = words.pop(0) if words else "--help"
    if verb in ("-h", "--help"):
        print(format_verbs())
    elif verb == "--version":
        print(f"megamod {__version__}")
    elif verb.replace("_", "-") not in list_verbs():
        raise make_unknown_word_error("unknown verb", verb, list_verbs())
    else:
        sys.argv = [f"megamod {verb}", *words]
        importlib.import_module(f"megamod.commands.{verb.replace('-', '_')}").main()


def format_verbs() -> str:
    """Format the help of `megamod`: all verbs by group, each with the summary of its command."""
    lines = [f"megamod {__version__}: modular language models on DeepSpeed", ""]
    lines += ["usage: megamod VERB ...", "       megamod --version", ""]
    width = max(map(len, list_verbs()))
    for title, names in GROUPS.items():
        lines.append(title)
        for name in names:
            lines.append(f"  {name.replace('_', '-'):{width}}  {read_command_summary(name)}")
        lines.append("")
    return "\n".join([*lines, ENDING.rstrip()])


def _complete_verb() -> list[str]:
    """Print completions of the verb for the shell and end the process.

    If the shell's line has a verb already, nothing is printed and the process continues: the words
    after `megamod` are returned, for the parser of the verb's command to complete. _ARGCOMPLETE,
    the number of words that this parser skips, is raised by one. Raises UserError if no shell asks
    for completions.
    """
    if not {"COMP_LINE", "COMP_POINT"} <= os.environ.keys():
        raise UserError("_ARGCOMPLETE is set, but no shell asks for completions (no COMP_LINE)")
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    # argcomplete counts in bytes, and skips as many words as _ARGCOMPLETE says.
    before = argcomplete.split_line(line, len(line.encode()[:point].decode(errors="ignore")))[3]
    skipped = int(os.environ["_ARGCOMPLETE"])
    if len(before) > skipped:
        os.environ["_ARGCOMPLETE"] = str(skipped + 1)
        return before[skipped:]
    parser = CommandParser(__doc__)
    set_completions(parser.add_argument("verb"), list_verbs())
    parser.parse_args([])  # ends the process
    return []


def run() -> None:
    """Call `main` and end the process with the exit code of its outcome."""
    run_main(main)


if __name__ == "__main__":
    run()
