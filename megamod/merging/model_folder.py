"""What lies beside the weights of a merged model: configuration, tokenizer, card and record."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod import __version__
from megamod.files import write_json
from megamod.merging.recipe import Recipe

RECORD = "merge.json"
_CARRIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "dict.txt", "*.model"),
    *("generation_config.json", "preprocessor_config.json"),
)
_CARD = """---
library_name: {library}
license: unknown
tags: [merge, {model_type}]
---
A merge ({method}) of {count} models, made with megamod {version}.

| weight | model | digest of its weights |
|---|---|---|
{rows}

Load it as those it was made of{how}. `{record}` has all of this for programs.
"""


def merged_config(
    config: dict[str, object], recipe: Recipe, stored: str | None
) -> dict[str, object]:
    """The base's configuration, with what the merge changes: the dtype, and which domains.

    Args:
        stored: name of the dtype of the weights; None: as the base's.
    """
    config = dict(config)
    if stored is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = stored
    if config.get("model_type") == "demix":
        if recipe.inputs[recipe.base].member is not None:
            config["untie"] = "none"
        domains = [one.domain for one in recipe.inputs]
        if config.get("untie") == "none" and None not in domains:
            config["domains"] = list(dict.fromkeys(domains))
    return config


def carry_over(source: Path, folder: Path, config: Mapping[str, object]) -> None:
    """Write config.json, and copy the files of the tokenizer and of generation.

    Of a model with code of its own (`auto_map`), the code too.
    """
    write_json(folder / "config.json", config)
    for pattern in (*_CARRIED, *(("*.py",) if "auto_map" in config else ())):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_record(
    folder: Path,
    recipe: Recipe,
    shares: Sequence[float | None],
    digests: Sequence[str],
    config: Mapping[str, object],
) -> None:
    """Write merge.json and the model card.

    Args:
        shares: factor of each model, None where it differs between tensors.
        digests: of the weights of each model.
    """
    parents = [
        {
            "path": str(one.path),
            "member": one.member,
            "domain": one.domain,
            "weight": share,
            "parameters": dict(one.parameters),
            "digest": digest,
        }
        for one, share, digest in zip(recipe.inputs, shares, digests, strict=True)
    ]
    record = {"format": 1, "merge_method": recipe.method, "parameters": dict(recipe.parameters)}
    record |= {"dtype": recipe.dtype, "out_dtype": recipe.out_dtype, "parents": parents}
    record["megamod"] = __version__
    write_json(folder / RECORD, record)
    rows = "\n".join(
        f"| {'by tensor' if share is None else format(share, '.6g')} | {one} | {digest} |"
        for one, share, digest in zip(recipe.inputs, shares, digests, strict=True)
    )
    ours = str(config.get("model_type", "")).startswith("demix")
    text = _CARD.format(
        library="megamod" if ours else "transformers",
        model_type=config.get("model_type", "unknown"),
        method=recipe.method,
        count=len(parents),
        version=__version__,
        rows=rows,
        how=", after `import megamod`" if ours else "",
        record=RECORD,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
