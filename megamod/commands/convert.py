"""Turn a checkpoint of an original program into a model folder, or a folder of ours back.

    megamod convert --format fairseq_lm --input checkpoint_last.pt --output_dir DIR
    megamod convert --format fairseq_lm --input DEMIX_FOLDER --domains law med \\
        --output_dir DIR
    megamod convert --format fairseq_lm --export --input DIR --output_dir FAIRSEQ
    megamod convert --format opt --export --input DIR --domains law --output_dir OPT
    megamod convert --format expert --input DEMIX_FOLDER --domains law \\
        --output_dir DIR
    megamod convert --format datamux --input MUXBERT_FOLDER --output_dir DIR

DIR is read by `from_pretrained(DIR)` of the Auto class for its kind (`AutoModelForCausalLM`, for
encoders `AutoModelForMaskedLM`, ...) after `import megamod`. What was used, left out and missing is
printed. The tokenizer's files in PATH are copied. Pickles are read without running what they name.
"""

import argparse
from pathlib import Path

from megamod.command_line import CommandParser
from megamod.convert import FORMATS, ConvertOptions, import_format
from megamod.errors import UserError, run_main
from megamod.names import check_name
from megamod.states.output_folder import create_new_folder

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """Parse the command line, convert or export, and print what was done.

    The output folder must be new; it is not left half-written.

    Raises:
        UserError: for a format that has no such direction, names that cannot be those of files, an
            output folder that exists, or input that cannot be converted.
    """
    options = parse_arguments()
    for name in options.domains:
        check_name(name, "--domains")
    module = import_format(options.format)
    format_options = ConvertOptions(tuple(options.domains), options.num_attention_heads)
    source = options.input if options.input.is_dir() else options.input.parent
    # `expert` has a single direction, so it needs no --export.
    way = "export" if options.export or options.format == "expert" else "convert"
    if not hasattr(module, way):
        other = "without" if options.export else "with"
        raise UserError(f"--format {options.format}: can be used {other} --export only")
    from megamod.convert.writing import write_converted_model
    from megamod.data.corpus.tokenizers import GPT2_FILES, load_tokenizer
    from megamod.states.tokenizer_files import copy_tokenizer

    if way == "export":
        with create_new_folder(options.output_dir) as folder:
            files = module.export(options.input, folder, format_options)
            files += copy_tokenizer(source, folder)
        print(f"{options.output_dir}: {', '.join(file.name for file in files)}")
        return
    converted = module.convert(options.input, format_options)
    with create_new_folder(options.output_dir) as folder:
        write_converted_model(converted, folder, options.dtype)
        if copy_tokenizer(source, folder) and all((folder / n).is_file() for n in GPT2_FILES):
            load_tokenizer(folder).save(folder)  # what AutoTokenizer reads
    print(converted.format_report())
    parameters = sum(tensor.numel() for tensor in converted.state.values())
    print(f"{options.output_dir}: {parameters:,} parameters in {options.dtype}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; see `--help`. Raise UserError for words that it does not allow."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    format_options = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", required=True, choices=tuple(FORMATS), help=format_options)
    add("--input", required=True, type=Path, metavar="PATH", help="checkpoint: a file or folder")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder to make")
    add(
        "--domains",
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the experts, in the order of the ranks that hold them; --format opt and "
        "expert: the one to export; --format ca_mtl: names of the tasks, in the order of their ids",
    )
    add(
        "--num_attention_heads",
        type=int,
        metavar="H",
        help="where neither the checkpoint nor a config.json beside it tells",
    )
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the result (default: float32)")
    add("--export", action="store_true", help="the other way: PATH is ours, DIR the original's")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
