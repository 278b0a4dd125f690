"""What lies beside the weights of a merged model: configuration, tokenizer, card and record."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megamod.errors import UserError
from megamod.files import write_atomic, write_json
from megamod.merging.layer_settings import Origin, stacked_config
from megamod.merging.recipe import Recipe
from megamod.merging.vocabulary import FILE as VOCABULARY
from megamod.merging.vocabulary import UNION, Vocabulary
from megamod.states.forest import read_config
from megamod.states.tokenizer_files import PATTERNS, VOCABULARIES
from megamod.version import __version__

RECORD = "merge.json"
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
{note}
Load it as those it was made of{how}. `{record}` has all of this for programs.
"""


def merged_config(
    config: dict[str, object],
    recipe: Recipe,
    stored: str | None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, object]:
    """The base's configuration, with what the merge changes: dtype, domains, vocabulary.

    Args:
        stored: name of the dtype of the weights; None: as the base's.
        vocabulary: of the result; None: that of the base.
    """
    config = dict(config)
    if vocabulary is not None:
        config = vocabulary.renumbered(config)
        inner = config.get("text_config")
        if "vocab_size" in config:
            config["vocab_size"] = len(vocabulary)
        elif isinstance(inner, dict):
            inner = vocabulary.renumbered(inner) | {"vocab_size": len(vocabulary)}
            config["text_config"] = inner
    if recipe.slices:
        config = _stacked(config, recipe)
    if stored is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = stored
    if config.get("model_type") == "demix":
        if recipe.inputs[recipe.template].member is not None:
            config["untie"] = "none"
        domains = [one.domain for one in recipe.inputs]
        if config.get("untie") == "none" and None not in domains:
            config["domains"] = list(dict.fromkeys(domains))
    return config


def _stacked(config: Mapping[str, object], recipe: Recipe) -> dict[str, object]:
    """The configuration with the settings of the layers that are stacked."""
    configs = {
        number: config if number == recipe.template else read_config(one.path)
        for number, one in enumerate(recipe.inputs)
    }
    leading = [part.leading(recipe.base) for part in recipe.slices]
    origins = [
        Origin(recipe.inputs[source.model].path, configs[source.model], layer)
        for source in leading
        for layer in range(*source.layers)
    ]
    return stacked_config(config, recipe.inputs[recipe.template].path, origins)


def carry_over(
    source: Path,
    words: Path | None,
    folder: Path,
    config: Mapping[str, object],
    chat: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write config.json, and copy the files of generation and of the tokenizer.

    Of a model with code of its own (`auto_map`), the code too.

    Args:
        source: the model that the result is like; `words`: that with the tokenizer, None: none.
        chat: the chat template to write beside the tokenizer; None: the one it has.
        vocabulary: of the result; None: that of the tokenizer.
    """
    write_json(folder / "config.json", config)
    for pattern in (*_CARRIED, *(("*.py",) if "auto_map" in config else ())):
        _copy(source, pattern, folder)
    for pattern in PATTERNS if words is not None else ():
        _copy(words, pattern, folder)
    if vocabulary is not None:
        _revise(folder, words is not None, vocabulary)
    if words is not None and chat is not None:
        write_atomic(folder / _CHAT, chat)


def _revise(folder: Path, words: bool, vocabulary: Vocabulary) -> None:
    """Bring what was copied in line with the vocabulary.

    Raises:
        UserError: if generation_config.json is not JSON.
    """
    generation = folder / _CARRIED[0]
    if generation.is_file():
        try:
            content = json.loads(generation.read_text(encoding="utf-8"))
            write_json(generation, vocabulary.renumbered(content))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{_CARRIED[0]}: is not JSON: {error}") from error
    if words and vocabulary.grown:
        write_json(folder / VOCABULARY, vocabulary.tokenizer)
        # These lack the new words, and are not read where there is a tokenizer.json.
        for pattern in (*VOCABULARIES, "*.model", "added_tokens.json"):
            for file in folder.glob(pattern):
                file.unlink()


def _copy(source: Path, pattern: str, folder: Path) -> None:
    for file in sorted(source.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def commonest_chat(folders: Sequence[Path]) -> str | None:
    """The chat template that most of these models have, of equals the first; None: none has one.

    Raises:
        UserError: naming a tokenizer_config.json that is not JSON.
    """
    found = [template for folder in dict.fromkeys(folders) if (template := _chat(folder))]
    return Counter(found).most_common(1)[0][0] if found else None


def _chat(folder: Path) -> str | None:
    if (folder / _CHAT).is_file():
        return (folder / _CHAT).read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    return template if isinstance(template, str) else None


def write_record(
    folder: Path,
    recipe: Recipe,
    shares: Sequence[float | None],
    digests: Sequence[str],
    config: Mapping[str, object],
    seed: int,
    found: Mapping[str, object],
    note: str,
) -> None:
    """Write merge.json and the model card.

    Args:
        shares: factor of each model, None where it differs between tensors.
        digests: of the weights of each model.
        found: entries of merge.json that are added to these, or stand in for them.
        note: text for the card.
    """
    parents = [
        {
            "path": str(one.path),
            **({"adapter": str(one.adapter)} if one.adapter is not None else {}),
            "member": one.member,
            "domain": one.domain,
            "weight": share,
            "parameters": dict(one.parameters),
            "digest": digest,
            **({"statistics": str(one.statistics)} if one.statistics is not None else {}),
            **({"calibration": dict(one.calibration)} if one.calibration is not None else {}),
        }
        for one, share, digest in zip(recipe.inputs, shares, digests, strict=True)
    ]
    record = {"format": 1, "merge_method": recipe.method, "parameters": dict(recipe.parameters)}
    record |= {"dtype": recipe.dtype, "out_dtype": recipe.out_dtype, "parents": parents}
    record |= {"base": recipe.base, "random_seed": seed}
    for key, block in (("align", recipe.align), ("calibration", recipe.calibration)):
        if block is not None:
            record[key] = dict(block)
    if recipe.words is not None:
        source = recipe.words.source
        record["tokenizer"] = {
            "source": UNION if source is None else str(recipe.inputs[source].path),
            "tokens": {word: asdict(origin) for word, origin in recipe.words.origins.items()},
        }
    if recipe.modules:
        record["modules"] = [asdict(part) for part in recipe.modules]
    if recipe.slices:
        record["slices"] = [asdict(part) for part in recipe.slices]
    record["megamod"] = __version__
    write_json(folder / RECORD, {**record, **found})
    rows = "\n".join(
        f"| {'by tensor' if share is None else format(share, '.6g')} | {one} | {digest} |"
        for one, share, digest in zip(recipe.inputs, shares, digests, strict=True)
    )
    ours = str(config.get("model_type", "")).startswith("demix")
    text = _CARD.format(
        library="megamod" if ours else "transformers",
        model_type=config.get("model_type", "unknown"),
        method=found.get("merge_method", recipe.method),
        count=len(parents),
        version=__version__,
        rows=rows,
        note=f"\n{note}\n" if note else "",
        how=", after `import megamod`" if ours else "",
        record=RECORD,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
