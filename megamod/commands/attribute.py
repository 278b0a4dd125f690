"""Name the experts of a mixture that answered, for every token and document of a text.

    megamod attribute --model runs/moe TEXT
    megamod attribute --model runs/moe TEXT --output_dir runs/who

TEXT has a document per line, or is JSON lines with `text`. Printed are the experts with digests of
their weights and training data, and the share of each in every document: the router's weights,
averaged over layers and tokens. --output_dir gets the shares of every token as attribution.json and
tokens.txt, and a picture, attribution.png. Shares say which weights computed, not which data caused
an answer.
"""

import sys

from megamod.errors import run_main
from megamod.flags import parse_args


def main() -> None:
    """Parse the flags and TEXT, compute the shares, print and write them.

    Raises:
        UserError: as `megamod.runs.attribution.attribute`.
    """
    from megamod.runs.attribution_args import AttributionArgs

    argv = sys.argv[1:]
    # TEXT, the one word that is neither a flag nor the value of one, gets the flag --text.
    alone = [
        number
        for number, word in enumerate(argv)
        if not word.startswith("-") and (number == 0 or not argv[number - 1].startswith("--"))
    ]
    if len(alone) == 1:
        argv += ["--text", argv.pop(alone[0])]
    (args,) = parse_args(AttributionArgs, argv=argv, doc=__doc__)
    from megamod.runs.attribution import attribute

    attribute(args)


if __name__ == "__main__":
    run_main(main)
