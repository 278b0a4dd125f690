"""Turn text into a data-bin, the folder that every training run reads.

    python launchers/preprocess.py --input news=data/news.jsonl code=data/code/ \\
        --tokenizer sentencepiece:8192 --output_dir runs/databin

Each domain is NAME=PATH, where PATH is one of
    FILE.txt       documents with blank lines between them      \\  divided 90/5/5 into train, valid
    FILE.jsonl     one JSON object per line, key --text_column   |  and test by a hash of the text
    FILE.csv, FILE.tsv, FILE.parquet   the same column of a table  /
    FOLDER         with train, valid and test files in these formats
    FOLDER         written by datasets' save_to_disk
    hf:NAME[:CONFIG]   a data set of the Hugging Face hub
or --builtin takes four domains of real text from this Python installation.

With --sample_lines N nothing is tokenized: OUT/NAME.txt gets N random lines of every text file
below PATH that has so many, such as of every book of a corpus, to compare models on.

A run that was interrupted goes on where it was when the same command is given again.
"""

import argparse
from pathlib import Path

from megamod.errors import UserError, run


def main() -> None:
    """Parse, binarize, print one table."""
    options = parse_arguments()

    from megamod.data.corpus.binarize import binarize
    from megamod.data.corpus.builtin import builtin_documents
    from megamod.data.corpus.documents import parse_inputs

    inputs: dict[str, str | list[str]] = {**parse_inputs(options.input)}
    if options.sample_lines is not None:
        print(sample(options, inputs))
        return
    if options.tokenizer is None:
        raise UserError("--tokenizer is missing: sentencepiece:8192, or a folder; see --help")
    if options.builtin:
        builtin = builtin_documents()
        if both := sorted(builtin.keys() & inputs.keys()):
            raise UserError(f"--input {both[0]}=...: --builtin has a domain of that name")
        inputs = {**builtin, **inputs}
    header = binarize(
        inputs,
        options.tokenizer,
        options.output_dir,
        items=options.items,
        bos=options.bos,
        field=options.field,
        encoding_errors=options.encoding_errors,
        seed=options.seed,
        workers=options.workers,
        streaming=options.streaming,
        do_lower_case=None if options.do_lower_case is None else options.do_lower_case == "true",
    )
    print(summary(header, options.output_dir))


def parse_arguments() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="domains, in the order that all later steps keep",
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
    add("--output_dir", required=True, type=Path, metavar="DATABIN", help="folder to make")
    add(
        "--items",
        choices=("document", "line"),
        help="what ends with an eos token; default: line for the GPT-2 folder, else document",
    )
    add(
        "--bos",
        action="store_true",
        help="put bos in front of each item, for models that read [CLS] text [SEP]",
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
    add("--seed", type=int, default=0, help="divides files that are not split (default: 0)")
    add("--sample_lines", type=int, metavar="N", help="draw N lines of each file, and no more")
    add("--workers", type=int, metavar="N", help="processes (default: by the amount of text)")
    add("--traceback", action="store_true", help="show where an error was raised")
    return parser.parse_args()


def sample(options: argparse.Namespace, inputs: dict[str, str]) -> str:
    """Draw lines of text files; what came of it, a line per domain.

    Raises:
        UserError: for flags that do not go with it, and files that do not do.
    """
    from megamod.data.corpus.line_sample import sample_lines

    if options.builtin or options.tokenizer is not None or not inputs:
        raise UserError("--sample_lines goes with --input alone: it writes text, not a data-bin")
    if options.sample_lines < 1:
        raise UserError(f"--sample_lines {options.sample_lines}: at least 1 is needed")
    told = sample_lines(
        inputs,
        options.sample_lines,
        options.output_dir,
        encoding_errors=options.encoding_errors,
        seed=options.seed,
    )
    return "\n".join(
        f"{options.output_dir / name}.txt: {options.sample_lines} lines of each of {taken} files, "
        f"{left} files have fewer"
        for name, (taken, left) in told.items()
    )


def summary(header: dict, output: Path) -> str:
    """Totals of each domain as a table, and in the last line where the result is."""
    rows = [("domain", "train tokens", "valid tokens", "test tokens", "bytes", "replaced")]
    for name, splits in header["domains"].items():
        tokens = [f"{splits[split]['tokens']:,}" for split in ("train", "valid", "test")]
        text = sum(of["bytes"] for of in splits.values())
        rows.append((name, *tokens, f"{text:,}", str(header["replaced"][name])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    total = sum(of["tokens"] for splits in header["domains"].values() for of in splits.values())
    kind, vocabulary = header["tokenizer"]["kind"], header["vocab_size"]
    lines.append(
        f"{output}: {len(rows) - 1} domains, {total:,} tokens, {kind} tokenizer with "
        f"{vocabulary:,} ids, one eos per {header['items']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
