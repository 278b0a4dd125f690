"""The parser of every command: one-sentence errors, flags of other programs, shell completion."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from megamod.errors import UserError

# Flags of other programs, without dashes, and the answer. Of several answers the first counts whose
# flag the command has; one that starts with no flag counts for all commands.
FOREIGN_FLAGS = {
    "lr": ("--learning_rate",),
    "N": ("--num_instances",),
    "d": ("--demuxing_variant",),
    "m": ("--muxing_variant",),
    "fp16": ("--precision fp16",),
    "bf16": ("--precision bf16",),
    "fp16_opt_level": ("--precision fp16",),
    "batch_size": ("--per_device_train_batch_size", "--per_device_eval_batch_size"),
    "train_batch_size": ("--per_device_train_batch_size",),
    "eval_batch_size": ("--per_device_eval_batch_size",),
    "per_gpu_train_batch_size": ("--per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("--per_device_eval_batch_size",),
    "max_length": ("--max_seq_length", "--max_new_tokens"),
    "block_size": ("--max_seq_length",),
    "steps": ("--max_steps",),
    "max_update": ("--max_steps",),
    "epochs": ("--num_train_epochs", "--max_steps"),
    "num_train_epochs": ("--max_steps",),
    "task_name": ("--task", "--tasks"),
    "model_path": ("--model",),
    "model_files": ("--models",),
    "merge_type": ("a variant of the study file, such as `groups: [ff, attn]`",),
    "train_frac": ("`calibration: {fraction: ...}` in the study file",),
    "originals": ("the variant `{method: identity}` of the study file",),
    "uniform_mt_sampling": ("--mt_sampling uniform",),
    "overwrite_output_dir": ("--output_dir with a new folder, since no run is overwritten",),
    "overwrite_cache": ("not needed, since caches are found by a digest of their data",),
    "evaluate_during_training": ("--eval_steps N",),
    "eval_strategy": ("--eval_steps N",),
    "save_strategy": ("--save_steps N",),
    "logging_dir": ("--output_dir, whose folder tb has the logs of TensorBoard",),
    "logging_first_step": ("--logging_steps 1",),
    "no_cuda": ("the environment variable DS_ACCELERATOR=cpu",),
    "resume_from_checkpoint": ("--resume PATH",),
    "dataset_name": ("--data, a folder written by megamod preprocess",),
    "train_file": ("--data, a folder written by megamod preprocess",),
}


class CommandParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are `UserError`s of one sentence.

    Args:
        doc: docstring of the command: its first paragraph heads the help, the rest ends it.
        options: as for `argparse.ArgumentParser`.
    """

    def __init__(self, doc: str | None, **options: object):
        """Set up help and abbreviations, and add --traceback; see the class for the arguments."""
        description, _, epilog = (doc or "").strip().partition("\n\n")
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        # `run_main` looks for it among the words of the command line.
        self.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with a message of argparse, instead of ending the process."""
        raise UserError(message)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line; under shell completion, print completions and end the process.

        For --help the help is printed, and the process ends.

        Args:
            args: words without the program's name; None: those of the process.
            namespace: object that gets the values; None: a new one.
        Raises:
            UserError: for unknown flags and words, and values that argparse refuses.
        """
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(self)  # ends the process
        parsed, unknown = self.parse_known_args(args, namespace)
        self._refuse_unknown_words(unknown)
        return parsed

    def _refuse_unknown_words(self, words: Sequence[str]) -> None:
        """Raise UserError for the first of the words that argparse did not recognize, if there are
        any.

        The message suggests our name for a flag that is spelled as in another program, and the
        nearest flag for any other.
        """
        flags = [text for action in self._actions for text in action.option_strings]
        for word in words:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                for answer in FOREIGN_FLAGS.get(flag.lstrip("-").replace("-", "_"), ()):
                    equivalent = re.match(r"--\w+", answer)
                    if equivalent is None or equivalent[0] in flags:
                        raise UserError(f"unknown flag {flag!r}; here it is {answer}")
                raise make_unknown_word_error("unknown flag", flag, flags)
        if words:
            expected = "; a recipe is the first argument" if "[RECIPE" in (self.usage or "") else ""
            raise UserError(f"unexpected argument {words[0]!r}{expected}")


def set_completions(action: argparse.Action, values: Sequence[str]) -> None:
    """Set the values that the shell completes for a flag or argument; argparse does not check them.

    Sets the attribute `completer` of `action`, which argcomplete reads.
    """
    action.completer = lambda **_: values


def make_unknown_word_error(problem: str, word: str, words: Iterable[str]) -> UserError:
    """Make the error for an unknown word, which suggests the nearest known word if one is similar.

    Args:
        problem: beginning of the message, such as "unknown flag".
        word: the unknown word.
        words: all known words.
    """
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.75)
    nearest = f"the nearest is {near[0]!r}, " if near else ""
    return UserError(f"{problem} {word!r}; {nearest}--help lists all")
