"""Export of one expert of a model with experts as an ordinary dense model folder.

An expert of a decoder family of transformers becomes a folder that transformers loads without
megamod.
"""

from pathlib import Path

from megamod.convert import ConvertOptions
from megamod.errors import UserError
from megamod.states.dense import write_dense_model
from megamod.states.forest import read_model_config

# Records of the run and of the model with experts, which do not describe the expert's folder.
_SKIPPED = ("README.md", "run.yaml", "state.json", "manifest.json", "merge.json")


def export(source: Path, folder: Path, options: ConvertOptions) -> list[Path]:
    """Write the expert of the one domain in `options.domains` as a dense model folder.

    Tokenizer and generation settings are copied, too.

    Args:
        source: model folder with experts.
        folder: existing folder that the files are written into.
        options: `domains` has the name of the expert.
    Returns:
        paths of the written files.
    Raises:
        UserError: if `source` has no experts, or `options` does not name one of them.
    """
    config = read_model_config(Path(source))
    if config.get("untie", "none") == "none":
        raise UserError(f"{source}: is one dense model and has no experts")
    domains = list(config["domains"])
    if len(options.domains) != 1 or options.domains[0] not in domains:
        raise UserError(
            f"--domains: name one expert of {source}, not {' '.join(options.domains) or 'none'}; "
            f"there are {', '.join(domains)}"
        )
    return write_dense_model(Path(source), options.domains[0], folder, _SKIPPED)
