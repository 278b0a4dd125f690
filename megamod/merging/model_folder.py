"""Files of a merged model besides its weights: configuration, tokenizer, card and record."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megamod.errors import UserError
from megamod.files import format_json, write_atomic, write_json
from megamod.merging.layer_settings import LayerOrigin, build_stacked_config
from megamod.merging.recipe import MergeRecipe, RecipePart
from megamod.merging.vocabulary import FILE as VOCABULARY
from megamod.merging.vocabulary import UNION, Vocabulary
from megamod.schemas import read_json_object
from megamod.states.dense import make_dense_config
from megamod.states.forest import read_model_config
from megamod.states.manifest import find_file_faults
from megamod.states.tokenizer_files import PATTERNS, VOCABULARIES, list_tokenizer_files
from megamod.states.weight_files import compute_files_digest
from megamod.version import __version__

RECORD = "merge.json"
"""File with the recipe of a merge and the digests of its models."""
_CHAT = "chat_template.jinja"
_CARRIED = ("generation_config.json", "preprocessor_config.json")
_CARD = """---
library_name: {library}
license: unknown
tags: [merge, {model_type}]
---
A merge ({method}) of {count} models, made with megamod {version}.

| weight | model | digest of its weights |
|---|---|---|
{rows}
{aligned}{note}
Load it as those it was made of{how}. `{record}` has all of this for programs.
"""


def build_merged_config(
    config: dict[str, object],
    recipe: MergeRecipe,
    stored: str | None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, object]:
    """Build the result's configuration: the template's, with the result's dtype, domains,
    vocabulary and layers.

    Args:
        config: configuration of the template; not changed.
        recipe: recipe of the merge; its models' config.json is read where layers are stacked.
        stored: name of the dtype of the weights; None: that of the template.
        vocabulary: vocabulary of the result; None: that of the template.
    Raises:
        UserError: if layers are stacked, and a setting cannot move with its layer.
    """
    config = dict(config)
    if vocabulary is not None:
        config = vocabulary.renumber_token_ids(config)
        inner = config.get("text_config")
        if "vocab_size" in config:
            config["vocab_size"] = len(vocabulary)
        elif isinstance(inner, dict):
            inner = vocabulary.renumber_token_ids(inner) | {"vocab_size": len(vocabulary)}
            config["text_config"] = inner
    if recipe.is_stacked:
        config = _stack_layer_settings(config, recipe)
    if stored is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = stored
    template = recipe.inputs[recipe.template_model]
    if template.member is not None or template.beside_anchor:
        config = make_dense_config(config)
    if config.get("model_type") == "demix":
        domains = [model.domain for model in recipe.inputs]
        if config.get("untie") == "none" and None not in domains:
            config["domains"] = list(dict.fromkeys(domains))
    return config


def _stack_layer_settings(config: Mapping[str, object], recipe: MergeRecipe) -> dict[str, object]:
    """Return the configuration with a value per stacked layer in every per-layer setting.

    Reads the config.json of all models of the recipe. Raises UserError as `build_stacked_config`.
    """
    configs = {
        number: config if number == recipe.template_model else read_model_config(model.path)
        for number, model in enumerate(recipe.inputs)
    }
    leads = [part.sources[recipe.find_lead_source(part)] for part in recipe.parts]
    origins = [
        LayerOrigin(recipe.inputs[source.model].path, configs[source.model], layer)
        for source in leads
        for layer in range(*source.layers)
    ]
    return build_stacked_config(config, recipe.inputs[recipe.template_model].path, origins)


def write_files_besides_weights(
    template: Path,
    tokenizer: Path | None,
    folder: Path,
    config: Mapping[str, object],
    chat_template: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write all files that a model folder needs besides weights, most of them copies.

    They are config.json, the settings of generation and of a preprocessor, the tokenizer, and the
    model's own code if the configuration refers to it.

    Args:
        template: folder of the model that all but the tokenizer is copied from.
        tokenizer: folder whose tokenizer is copied; None: the result has none.
        folder: to write into. Copied vocabulary files that lack tokens of `vocabulary` are deleted.
        config: content of config.json.
        chat_template: to write, if there is a tokenizer; None: that of the tokenizer.
        vocabulary: vocabulary of the result, to whose ids those in generation_config.json are
            changed; None: that of the tokenizer.
    Raises:
        UserError: if ids are to be renumbered and generation_config.json is not JSON.
    """
    write_json(folder / "config.json", config)
    for pattern in (*_CARRIED, *(("*.py",) if "auto_map" in config else ())):
        _copy_matching_files(template, pattern, folder)
    for pattern in PATTERNS if tokenizer is not None else ():
        _copy_matching_files(tokenizer, pattern, folder)
    if vocabulary is not None:
        _adapt_files_to_vocabulary(folder, tokenizer is not None, vocabulary)
    if tokenizer is not None and chat_template is not None:
        write_atomic(folder / _CHAT, chat_template)


def _adapt_files_to_vocabulary(folder: Path, has_tokenizer: bool, vocabulary: Vocabulary) -> None:
    """Change the files in a folder to a united vocabulary.

    The ids in generation_config.json are renumbered. If the folder has a tokenizer and there are
    new tokens, its tokenizer.json is replaced, and files of other formats, which lack them, are
    deleted.

    Args:
        has_tokenizer: the folder has a tokenizer.
    Raises:
        UserError: if generation_config.json is not JSON.
    """
    generation = folder / _CARRIED[0]
    if generation.is_file():
        write_json(generation, vocabulary.renumber_token_ids(read_json_object(generation)))
    if has_tokenizer and vocabulary.has_new_tokens:
        write_json(folder / VOCABULARY, vocabulary.tokenizer)
        # These files lack the new tokens, and nobody reads them if there is a tokenizer.json.
        for pattern in (*VOCABULARIES, "*.model", "added_tokens.json"):
            for file in folder.glob(pattern):
                file.unlink()


def _copy_matching_files(source: Path, pattern: str, folder: Path) -> None:
    """Copy the files of `source` whose names match a glob pattern into `folder`; perhaps none."""
    for file in sorted(source.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def find_commonest_chat_template(folders: Sequence[Path]) -> str | None:
    """Find the chat template that most of the models in `folders` have; of equals the first.

    None if no model has one. A folder that is named twice counts once.

    Raises:
        UserError: naming a tokenizer_config.json that is not JSON.
    """
    templates = [text for folder in dict.fromkeys(folders) if (text := _read_chat_template(folder))]
    return Counter(templates).most_common(1)[0][0] if templates else None


def _read_chat_template(folder: Path) -> str | None:
    """Read the chat template of a model folder from its own file, else tokenizer_config.json.

    None if neither has one, or it is a list of several named ones.

    Raises:
        UserError: if tokenizer_config.json is not JSON.
    """
    if (folder / _CHAT).is_file():
        return (folder / _CHAT).read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    template = read_json_object(file).get("chat_template")
    return template if isinstance(template, str) else None


def make_merge_record(
    recipe: MergeRecipe,
    shares: Sequence[float | None],
    files: Iterable[str],
    digests: Sequence[str],
    *,
    seed: int,
    tokenizer: Path | None,
    entries: Mapping[str, object],
) -> dict[str, object]:
    """Make the content of merge.json; the tokenizer's files are read for their digest.

    Args:
        recipe: recipe of the merge.
        shares: weight of each model; None: differs between tensors.
        files: names of the weight files of the result.
        digests: digests of the weights of each model, as `TensorSource.compute_digest` gives them.
        seed: seed of all random numbers.
        tokenizer: folder of the result's tokenizer; None: the result has none.
        entries: further entries, which replace those of the same name.
    """
    parents = [
        {
            "path": str(model.path),
            **({"adapter": str(model.adapter)} if model.adapter is not None else {}),
            "member": model.member,
            "domain": model.domain,
            "weight": share,
            "parameters": dict(model.parameters),
            "digest": digest,
            **({"statistics": str(model.statistics)} if model.statistics is not None else {}),
            **({"calibration": dict(model.calibration)} if model.calibration is not None else {}),
        }
        for model, share, digest in zip(recipe.inputs, shares, digests, strict=True)
    ]
    record = {"format": 1, "merge_method": recipe.method, "parameters": dict(recipe.parameters)}
    record |= {"dtype": recipe.dtype, "out_dtype": recipe.out_dtype, "parents": parents}
    record |= {"base": recipe.base, "random_seed": seed}
    for key, block in (("align", recipe.align), ("calibration", recipe.calibration)):
        if block is not None:
            record[key] = dict(block)
    if recipe.vocabulary_request is not None:
        source = recipe.vocabulary_request.source
        record["tokenizer"] = {
            "source": UNION if source is None else str(recipe.inputs[source].path),
            "tokens": {
                # "word" is the key of the token in files of earlier versions, too
                token: {"model": origin.model, "word": origin.token, "force": origin.force}
                for token, origin in recipe.vocabulary_request.origins.items()
            },
        }
    if recipe.parts:
        key = "slices" if recipe.is_stacked else "modules"
        record[key] = [_make_part_record(part) for part in recipe.parts]
    record["files"] = sorted(files)
    record["copied_tokenizer"] = tokenizer and compute_files_digest(list_tokenizer_files(tokenizer))
    return {**record, "megamod": __version__, **entries}


def holds_merge(folder: Path, record: Mapping[str, object], config: Mapping[str, object]) -> bool:
    """Return True if a folder holds the whole result of the merge that a record describes.

    That is, its merge.json and config.json have this content, and its files are those of its
    manifest, digests included. A folder without these files, or with damaged ones, does not.

    Args:
        record: see `make_merge_record`.
        config: configuration of the result.
    """
    try:
        stored = [read_json_object(folder / name) for name in (RECORD, "config.json")]
    except (OSError, UserError):
        return False
    expected = [json.loads(format_json(content)) for content in (record, config)]
    return stored == expected and not find_file_faults(folder)


def write_merge_record(
    folder: Path,
    recipe: MergeRecipe,
    record: Mapping[str, object],
    config: Mapping[str, object],
    note: str,
) -> None:
    """Write merge.json and the model card, README.md.

    Args:
        folder, recipe: folder of the result, and the recipe.
        record: see `make_merge_record`.
        config: configuration of the result.
        note: paragraph for the card; "": none.
    """
    write_json(folder / RECORD, record)
    parents = record["parents"]
    rows = "\n".join(
        f"| {'by tensor' if parent['weight'] is None else format(parent['weight'], '.6g')} "
        f"| {model} | {parent['digest']} |"
        for model, parent in zip(recipe.inputs, parents, strict=True)
    )
    aligned = ""
    if recipe.align is not None:
        block = json.dumps(recipe.align, ensure_ascii=False)
        aligned = (
            f"\nThe models were aligned to the first one before the merge: `align: {block}`.\n"
        )
    ours = str(config.get("model_type", "")).startswith("demix")
    text = _CARD.format(
        library="megamod" if ours else "transformers",
        model_type=config.get("model_type", "unknown"),
        method=record["merge_method"],
        count=len(parents),
        version=__version__,
        rows=rows,
        aligned=aligned,
        note=f"\n{note}\n" if note else "",
        how=", after `import megamod`" if ours else "",
        record=RECORD,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _make_part_record(part: RecipePart) -> dict[str, object]:
    """Make the entry of a part in merge.json: a module has "models", a slice has "sources"."""
    if part.module is not None:
        models = [[source.model, dict(source.parameters)] for source in part.sources]
        return {"name": part.module, "models": models, "parameters": dict(part.parameters)}
    sources = [
        {"model": s.model, "layers": list(s.layers), "parameters": dict(s.parameters)}
        for s in part.sources
    ]
    return {"sources": sources, "parameters": dict(part.parameters), "base": part.base}
