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
from megamod.flags import move_argument_to_flag, parse_args


def main() -> None:
    """Parse the flags and TEXT, compute the shares, print and write them.

    Raises:
        UserError: as `megamod.runs.attribution.attribute_texts`.
    """
    from megamod.runs.attribution_args import AttributionArgs

    argv = move_argument_to_flag(sys.argv[1:], "--text")  # TEXT
    (args,) = parse_args(AttributionArgs, argv=argv, doc=__doc__)
    from megamod.runs.attribution import attribute_texts

    attribute_texts(args)


if __name__ == "__main__":
    run_main(main)
