"""Flags of the commands that write a model folder tensor by tensor: `merge` and `to_moe`."""

import os
import re
from dataclasses import dataclass
from typing import Literal

from megamod.errors import UserError
from megamod.flags import Arguments, option

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}  # B as in billion: mergekit's


@dataclass
class ModelOutputArgs(Arguments):
    """Model folder to write."""

    out_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = option(
        None, "dtype of the result; none: that of the first model"
    )
    max_shard_size: str = option(
        "5GB", "size above which there are several weight files", alias="out_shard_size"
    )
    num_threads: int | None = option(
        None, "tensors written at the same time; none: one per processor, 8 at most", least=1
    )
    copy_tokenizer: bool = option(True, "whether the result gets a tokenizer")
    quiet: bool = option(False, "no progress bar, and not a word unless something is wrong")
    dry_run: bool = option(False, "check everything, say what would be done, write nothing")
    output_dir: str | None = option(None, "folder to make")

    def make_merge_arguments(self) -> dict[str, object]:
        """Return the arguments that `merge`, `write_greedy_soup` and `convert_to_moe` share.

        They are shard_bytes, threads, copy_tokenizer, dry_run and quiet. `out_dtype` is not among
        them: it is a part of the recipe.

        Raises:
            UserError: if --max_shard_size is no size.
        """
        return {
            "shard_bytes": parse_size(self.max_shard_size, "--max_shard_size"),
            "threads": self.num_threads or min(len(os.sched_getaffinity(0)), 8),
            "copy_tokenizer": self.copy_tokenizer,
            "dry_run": self.dry_run,
            "quiet": self.quiet,
        }

    def print_report(self, *lines: str, is_new: bool = True) -> None:
        """Print lines about the result, then one about its folder; nothing with --quiet.

        Args:
            lines: lines of text, without line ends.
            is_new: False if the folder had this result before the command, so nothing was written.
        """
        if not self.quiet:
            done = "written to" if is_new else "done already, in"
            end = "nothing was written" if self.dry_run else f"{done} {self.output_dir}"
            print(*lines, end, sep="\n")


def parse_size(text: str, origin: str) -> int:
    """Parse a size in bytes, such as 500M, 5GB or 5B.

    It is a number alone, or with K, M, G or B (10^9, as in mergekit) or KB, MB or GB, in either
    case.

    Args:
        text: the size.
        origin: flag of the size, for messages.
    Raises:
        UserError: naming `origin`, if it is not such a size, or is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGB]?)(B?)", text.strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0 or (match[3] and match[2] in "bB"):
        raise UserError(f"{origin}: {text!r} is not a size; write one like 500M, 5GB or 5B (= 5GB)")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
