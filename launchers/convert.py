"""Turn a checkpoint of an original program into a model folder, or a folder of ours back.

    python launchers/convert.py --format fairseq_lm --input checkpoint_last.pt --output_dir DIR
    python launchers/convert.py --format fairseq_lm --input DEMIX_FOLDER --domains law med \\
        --output_dir DIR
    python launchers/convert.py --format fairseq_lm --export --input DIR --output_dir FAIRSEQ
    python launchers/convert.py --format opt --export --input DIR --domains law --output_dir OPT
    python launchers/convert.py --format datamux --input MUXBERT_FOLDER --output_dir DIR

DIR is read by `from_pretrained(DIR)` of the Auto class for its kind (`AutoModelForCausalLM`, for
encoders `AutoModelForMaskedLM`, ...) after `import megamod`. What was used, left out and missing is
printed. Pickles are read without running anything they name.
"""

import argparse
from pathlib import Path

from megamod.convert import FORMATS, Converted, Options, format_module
from megamod.errors import UserError, run
from megamod.states.output_folder import new_folder

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """Parse, convert or export, and say what was done."""
    options = parse_arguments()
    module = format_module(options.format)
    told = Options(tuple(options.domains), options.num_attention_heads)
    way = "export" if options.export else "convert"
    if not hasattr(module, way):
        other = "without" if options.export else "with"
        raise UserError(f"--format {options.format}: can be used {other} --export only")
    if options.export:
        with new_folder(options.output_dir) as folder:
            files = [file.name for file in module.export(options.input, folder, told)]
        print(f"{options.output_dir}: {', '.join(files)}")
        return
    converted = module.convert(options.input, told)
    with new_folder(options.output_dir) as folder:
        write(converted, folder, options.dtype)
    print(converted.report())
    parameters = sum(tensor.numel() for tensor in converted.state.values())
    print(f"{options.output_dir}: {parameters:,} parameters in {options.dtype}")


def write(converted: Converted, folder: Path, dtype: str) -> None:
    """Configuration and weights as `from_pretrained` reads them.

    Raises:
        UserError: for names that cannot be a domain, and weights that the dtype cannot hold.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import megamod  # noqa: F401  (makes our configurations known)
    from megamod.states.weights import write_index, write_weights

    fields = dict(converted.config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, StrictDataclassError) as error:
        told = "--domains" if "domains" in fields else "config.json"
        raise UserError(f"{told}: {' '.join(str(error).split())}") from error
    config.dtype = getattr(torch, dtype)
    state = {name: tensor.to(config.dtype) for name, tensor in converted.state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite in {dtype}")
    config.save_pretrained(folder)
    apart = fields.get("untie", "none") != "none"
    write_weights(folder, state, has_experts=apart)
    if apart:
        write_index(folder, state, sum(tensor.nbytes for tensor in state.values()))


def parse_arguments() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    told = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", required=True, choices=tuple(FORMATS), help=told)
    add("--input", required=True, type=Path, metavar="PATH", help="checkpoint: a file or folder")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder to make")
    add(
        "--domains",
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the experts, in the order of the ranks that hold them; --format opt: the "
        "one to export; --format ca_mtl: names of the tasks, in the order of their ids",
    )
    add(
        "--num_attention_heads",
        type=int,
        metavar="H",
        help="where neither the checkpoint nor a config.json beside it tells",
    )
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the result (default: float32)")
    add("--export", action="store_true", help="the other way: PATH is ours, DIR the original's")
    add("--traceback", action="store_true", help="show where an error was raised")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
