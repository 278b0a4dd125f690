"""Turn text into a data-bin, the folder that every training run reads.

    megamod preprocess --input news=data/news.jsonl code=data/code/ \\
        --tokenizer sentencepiece:8192 --output_dir runs/databin

Each domain is NAME=PATH, where PATH is one of
    FILE.txt       documents with blank lines between them      \\  divided 90/5/5 into train, valid
    FILE.jsonl     one JSON object per line, key --text_column   |  and test by a hash of the text
    FILE.csv, FILE.tsv, FILE.parquet   the same column of a table  /
    FOLDER         with train, valid and test files in these formats, or shards of them
    FOLDER         written by datasets' save_to_disk
    hf:NAME[:CONFIG]   a data set of the Hugging Face hub
--builtin uses four domains of real text from this Python installation.

--sample_lines N tokenizes nothing: it writes N random lines of every text file below PATH with
that many lines, such as of every book of a corpus, to OUT/NAME.txt.

The same command resumes an interrupted run.
"""

import argparse
import logging
from pathlib import Path

from megamod.command_line import CommandParser
from megamod.errors import UserError, run_main
from megamod.folder_lock import lock_folder


def main() -> None:
    """Parse the command line; write a data-bin, or a sample of lines, into --output_dir.

    Raises UserError for flags that do not go together, or text that cannot be read.
    """
    options = parse_arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megamod").setLevel(logging.INFO)

    from megamod.data.corpus.binarize import binarize
    from megamod.data.corpus.builtin import load_builtin_documents
    from megamod.data.corpus.documents import parse_domain_paths
    from megamod.data.corpus.header import format_databin_summary
    from megamod.states.hub import find_or_download_folder, is_hub_name

    inputs: dict[str, str | list[str]] = {**parse_domain_paths(options.input)}
    if options.sample_lines is not None:
        print(write_line_sample(options, inputs))
        return
    if options.tokenizer is None:
        raise UserError("--tokenizer is missing: sentencepiece:8192, or a folder; see --help")
    if is_hub_name(options.tokenizer) and not options.tokenizer.endswith(".model"):
        folder = find_or_download_folder(options.tokenizer, "--tokenizer", weights=False)
        options.tokenizer = str(folder)
    if options.builtin:
        builtin = load_builtin_documents()
        if both := sorted(builtin.keys() & inputs.keys()):
            raise UserError(f"--input {both[0]}=...: --builtin has a domain of that name")
        inputs = {**builtin, **inputs}
    header = binarize(
        inputs,
        options.tokenizer,
        options.output_dir,
        item_unit=options.items,
        add_bos=options.bos,
        text_column=options.field,
        encoding_errors=options.encoding_errors,
        seed=options.seed,
        workers=options.workers,
        streaming=options.streaming,
        do_lower_case=None if options.do_lower_case is None else options.do_lower_case == "true",
    )
    print(format_databin_summary(header, options.output_dir))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; see `--help`. Raise UserError for words that it does not allow."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="domains; all later steps keep their order",
    )
    add("--builtin", action="store_true", help="add python_code, c_headers, reference_prose, ...")
    add(
        "--tokenizer",
        metavar="T",
        help="sentencepiece:VOCAB, or wordpiece:VOCAB for encoders, to train one on the train "
        "splits; a SentencePiece .model file; a folder with encoder.json, vocab.bpe and dict.txt "
        "(GPT-2 with the ids of fairseq); or a "
        "Hugging Face folder or name",
    )
    add(
        "--do_lower_case",
        choices=("true", "false"),
        help="for BERT's word pieces, in place of what the tokenizer's folder says; a folder with "
        "vocab.txt alone is lower-cased unless capitals are a real part of the vocabulary",
    )
    add("--output_dir", required=True, type=Path, metavar="DATABIN", help="output folder")
    add(
        "--items",
        choices=("document", "line"),
        help="unit that an eos token ends (default: line for the GPT-2 folder, else document)",
    )
    add(
        "--bos",
        action="store_true",
        help="start each item with bos, for models that read [CLS] text [SEP]",
    )
    add(
        "--text_column",
        "--field",
        dest="field",
        default="text",
        metavar="NAME",
        help="JSON key or column of the text (default: text)",
    )
    add(
        "--streaming",
        action="store_true",
        help="read hf: data sets over the network, several times, instead of storing them",
    )
    add(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="refuse bytes that are not UTF-8 text (default), or replace and count them",
    )
    add("--seed", type=int, default=0, help="seed of the division into splits (default: 0)")
    add("--sample_lines", type=int, metavar="N", help="write N random lines of each file")
    add("--workers", type=int, metavar="N", help="processes (default: follows the amount of text)")
    return parser.parse_args()


def write_line_sample(options: argparse.Namespace, inputs: dict[str, str]) -> str:
    """Write random lines of text files to OUT/NAME.txt, for --sample_lines.

    Args:
        options: parsed command line.
        inputs: path of the text by domain.
    Returns:
        a report, a line per domain.
    Raises:
        UserError: for flags that do not go with --sample_lines, or as `write_random_lines`.
    """
    from megamod.data.corpus.line_sample import write_random_lines

    if options.builtin or options.tokenizer is not None or not inputs:
        raise UserError(
            "--sample_lines writes text and takes --input alone, no --tokenizer or --builtin"
        )
    if options.sample_lines < 1:
        raise UserError(f"--sample_lines {options.sample_lines}: at least 1 is needed")
    with lock_folder(options.output_dir):
        counts = write_random_lines(
            inputs,
            options.sample_lines,
            options.output_dir,
            encoding_errors=options.encoding_errors,
            seed=options.seed,
        )
    return "\n".join(
        f"{options.output_dir / name}.txt: {options.sample_lines} lines of each of {used} files, "
        f"{skipped} files have fewer"
        for name, (used, skipped) in counts.items()
    )


if __name__ == "__main__":
    run_main(main)
