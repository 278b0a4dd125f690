"""Causal language models of fairseq: dense ones, ELMs, and DEMix in shared and per-rank files.

    dense, ELM    a .pt or .safetensors, or a folder that holds one
    DEMix         a folder with NAME-shared.* and NAME-rank-<r>.* for every rank

The architecture is that of the `transformer_lm_gpt3` presets of fairseq's TransformerLanguageModel.
A DEMix rank file holds the feed-forwards of the rank's domain; ranks of one domain are consecutive
and hold the same.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megamod.convert import NO_OPTIONS, ConvertedModel, ConvertOptions
from megamod.convert.fairseq_names import (
    EXTRA_POSITIONS,
    build_key_map,
    insert_domain,
    iterate_expected_shapes,
)
from megamod.convert.reading import Checkpoint, read_checkpoint
from megamod.dist.scope import parse_expert_domain
from megamod.errors import UserError
from megamod.files import write_json
from megamod.schemas import read_json_object
from megamod.states.config_file import read_config_file
from megamod.states.weights import extract_expert_weights, read_weights, write_tensors

_TOKENS, _POSITIONS = "decoder.embed_tokens.weight", "decoder.embed_positions.weight"
_OUTPUT, _VERSION = "decoder.output_projection.weight", "decoder.version"
_SETTINGS = {
    "activation_fn": "gelu",
    "decoder_normalize_before": True,
    "decoder_learned_pos": True,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
}
"""Settings with the only value that our model has; the weights do not show them."""
# Settings that may hold the number of attention heads.
_HEADS = ("decoder_attention_heads", "num_attention_heads", "heads")
# Names of files that are preferred where a folder has several.
_DENSE_FILES = ("model.safetensors", "pytorch_model.bin")
_STEMS = ("checkpoint_last", "checkpoint_best")
_ENDINGS = (".pt", ".safetensors")


def convert(source: Path, options: ConvertOptions) -> ConvertedModel:
    """Read a checkpoint and give its tensors our names, in the dtype they are stored in.

    Args:
        source: see the head of this module; a file `NAME-shared.*` selects that DEMix checkpoint.
        options: `domains` names the experts in rank order, and `num_attention_heads` the heads of a
            layer; both override the settings of the checkpoint.
    Raises:
        UserError: for a file that is missing or cannot be selected, for settings that our model
            does not have, for a tensor that is unexpected, missing or of a wrong shape, for an
            output matrix that differs from the embeddings, and for ranks of one domain that differ.
    """
    source = Path(source)
    shared_file = _find_shared_file(source)
    if shared_file is None:
        file = _find_dense_file(source)
        shared, ranks = read_checkpoint(file), []
        folder = file.parent
    else:
        shared, folder = read_checkpoint(shared_file), shared_file.parent
        ranks = [read_checkpoint(file) for file in _find_rank_files(shared_file)]
        file = shared_file
    settings = _read_settings(folder, shared)
    _check_settings(settings, file)
    # After adapting the feed-forwards of a DEMix model, fairseq has everything in the shared file.
    has_rank_weights = any(rank.tensors for rank in ranks)
    domains = options.domains or tuple(settings.get("domains", ()))
    experts = _collect_experts(ranks, domains, shared_file) if has_rank_weights else {}
    any_expert = next(iter(experts.values()), {})
    if both := sorted(any_expert.keys() & shared.tensors.keys()):
        raise UserError(f"{file}: {both[0]} is also in the rank files")
    dense = shared.tensors | any_expert
    config = _detect_config(dense, settings, options, file)
    layers = config["num_hidden_layers"]
    names = build_key_map(layers)
    _check_tensors(dense, names, config, file)
    untie = _detect_untie(any_expert, layers, file) if has_rank_weights else "none"

    dropped, missing = {}, {}
    if _VERSION in dense:
        dropped[_VERSION] = "a version number"
    if _OUTPUT in dense:
        dropped[_OUTPUT] = f"equal to {_TOKENS}, to which it is tied"
    else:
        missing[_OUTPUT] = f"tied to {_TOKENS}"
    state = {names[key]: t for key, t in shared.tensors.items() if key in names}
    for domain, tensors in experts.items():
        state |= {insert_domain(names[key], domain): tensor for key, tensor in tensors.items()}
    used = [key for key in dense if key in names]
    return ConvertedModel(
        {**config, "domains": list(domains), "untie": untie}, state, used, dropped, missing
    )


def export(source: Path, folder: Path, options: ConvertOptions = NO_OPTIONS) -> list[Path]:
    """Write a model folder of ours in fairseq's keys, as safetensors with settings in config.json.

    A dense model becomes model.safetensors. A model with experts becomes
    checkpoint_last-shared.safetensors and checkpoint_last-rank-<r>.safetensors, one for each
    domain. `convert` reads both back, tensor for tensor.

    Args:
        source: model folder.
        folder: existing folder that the files are written into.
        options: must not name domains, because all experts are exported.
    Returns:
        paths of the written files.
    Raises:
        UserError: if `source` is not a language model of ours, if it has experts outside of
            feed-forwards or a tensor that fairseq lacks, or if `options` names domains.
    """
    if options.domains:
        raise UserError("--domains: all experts are exported to fairseq, there is no choice")
    try:
        config = read_config_file(source)
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        domains, untie = config["domains"], config["untie"]
    except KeyError as error:
        raise UserError(
            f"{source}: is not a language model of megamod: config.json has no {error}"
        ) from error
    if untie != "none" and not untie.startswith("feedforward"):
        raise UserError(
            f"{source}: untie is {untie!r}; rank files of fairseq hold feed-forwards only"
        )
    state = read_weights(source)
    keys = {ours: key for key, ours in build_key_map(layers).items()}
    files: dict[str, dict[str, Tensor]] = {}
    if untie == "none":
        files["model.safetensors"] = _rename_to_fairseq(state, keys, source)
    else:
        shared_state = {name: t for name, t in state.items() if parse_expert_domain(name) is None}
        files["checkpoint_last-shared.safetensors"] = _rename_to_fairseq(shared_state, keys, source)
        for rank, domain in enumerate(domains):
            expert = {
                name: t
                for name, t in extract_expert_weights(state, domain).items()
                if name not in shared_state
            }
            files[f"checkpoint_last-rank-{rank}.safetensors"] = _rename_to_fairseq(
                expert, keys, source
            )
    for name, tensors in files.items():
        write_tensors(folder / name, tensors, {"format": "pt"})
    settings = {**_SETTINGS, "decoder_attention_heads": heads, "domains": domains}
    write_json(folder / "config.json", settings)
    return [*(folder / name for name in files), folder / "config.json"]


def _rename_to_fairseq(
    state: Mapping[str, Tensor], keys: Mapping[str, str], source: Path
) -> dict[str, Tensor]:
    """Rename tensors to fairseq's keys.

    Args:
        state: tensors by our name.
        keys: fairseq's key by our name.
        source: our model folder, for the message.
    Raises:
        UserError: for a tensor that fairseq lacks.
    """
    unknown = sorted(name for name in state if name not in keys)
    if unknown:
        raise UserError(f"{source}: {unknown[0]} has no counterpart in fairseq")
    return {keys[name]: tensor for name, tensor in state.items()}


def _find_shared_file(source: Path) -> Path | None:
    """Find the shared file of a DEMix checkpoint; None if `source` is not one.

    In a folder checkpoint_last is preferred, then checkpoint_best. Raise UserError if `source` does
    not exist, has several other shared files, or has rank files without a shared file.
    """
    if source.is_file():
        return source if source.stem.endswith("-shared") else None
    if not source.is_dir():
        raise UserError(f"--input {source} does not exist")
    files = {file.stem: file for ending in _ENDINGS for file in source.glob(f"*-shared{ending}")}
    for stem in _STEMS:
        if f"{stem}-shared" in files:
            return files[f"{stem}-shared"]
    if len(files) > 1:
        raise UserError(f"--input {source}: name one of {', '.join(map(str, files.values()))}")
    if not files and any(source.glob("*-rank-[0-9]*")):
        raise UserError(f"--input {source}: has rank files, but no NAME-shared.pt")
    return next(iter(files.values()), None)


def _find_rank_files(shared_file: Path) -> list[Path]:
    """Find the rank files that belong to the shared file of a DEMix checkpoint, in rank order.

    Raise UserError if there is none, or a number between 0 and the largest rank is missing.
    """
    stem, ending = shared_file.stem.removesuffix("-shared"), shared_file.suffix
    files = {}
    for file in shared_file.parent.glob(f"{stem}-rank-*{ending}"):
        if number := re.fullmatch(rf"{re.escape(stem)}-rank-(\d+)", file.stem):
            files[int(number[1])] = file
    if not files:
        raise UserError(f"{shared_file}: there is no {stem}-rank-0{ending} in its folder")
    absent = sorted(set(range(max(files) + 1)) - files.keys())
    if absent:
        raise UserError(f"{shared_file}: {stem}-rank-{absent[0]}{ending} is missing in its folder")
    return [files[rank] for rank in range(len(files))]


def _find_dense_file(source: Path) -> Path:
    """Find the weight file of a dense checkpoint: `source` itself, or a file of this folder.

    Raise UserError if the folder has no such file, or several without one of the usual names.
    """
    if source.is_file():
        return source
    expected = [*_DENSE_FILES, *(stem + ending for stem in _STEMS for ending in _ENDINGS)]
    files = [source / name for name in expected if (source / name).exists()]
    files = files or sorted(f for ending in _ENDINGS for f in source.glob(f"*{ending}"))
    if not files or (len(files) > 1 and files[0].name not in expected):
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"--input {source}: cannot tell which file to read (there are: {names}); expected is "
            f"one of {', '.join(expected)}, or a single other .pt or .safetensors"
        )
    return files[0]


def _read_settings(folder: Path, checkpoint: Checkpoint) -> dict[str, object]:
    """Merge the settings of `folder`/config.json, if it exists, with those in the checkpoint.

    The checkpoint's are `cfg.model`, or `args` if there is no `cfg.model`. They win over
    config.json; null counts as absent. Raise UserError if config.json is malformed.
    """
    file = folder / "config.json"
    in_folder = read_json_object(file) if file.exists() else {}
    cfg = checkpoint.settings.get("cfg")
    stored = cfg.get("model") if isinstance(cfg, dict) else None
    stored = stored if isinstance(stored, dict) else checkpoint.settings.get("args")
    return {
        key: value
        for settings in (in_folder, stored)
        if isinstance(settings, dict)
        for key, value in settings.items()
        if value is not None
    }


def _check_settings(settings: Mapping[str, object], file: Path) -> None:
    """Raise UserError for a setting that differs from the only value of our model, in `_SETTINGS`.

    Args:
        settings: see `_read_settings`; a setting that is missing passes.
        file: the checkpoint, for messages.
    """
    for key, needed in _SETTINGS.items():
        if settings.get(key, needed) != needed:
            raise UserError(
                f"{file}: was trained with {key} {settings[key]!r}; only {needed!r}, which the "
                "transformer_lm_gpt3 presets have, can be converted"
            )


def _collect_experts(
    ranks: Sequence[Checkpoint], domains: Sequence[str], shared_file: Path
) -> dict[str, dict[str, Tensor]]:
    """Collect the tensors of each domain's expert from the first of its ranks.

    Raise UserError if the number of domains does not divide the number of ranks, if keys or shapes
    differ between ranks, or if ranks of one domain hold different values.

    Args:
        ranks: content of the rank files, in rank order.
        domains: names of the experts in rank order.
        shared_file: shared file of the checkpoint, for messages.
    """
    where = shared_file.parent
    if not domains or len(ranks) % len(domains):
        listed = f"{len(domains)} names ({', '.join(domains)})" if domains else "nothing"
        raise UserError(
            f"--domains: {where} has rank files of {len(ranks)} ranks, given is {listed}; name the "
            "domains in rank order, as many as divide the ranks evenly"
        )
    group = len(ranks) // len(domains)
    experts = {}
    for index, domain in enumerate(domains):
        first = ranks[index * group].tensors
        for rank in range(index * group, (index + 1) * group):
            tensors = ranks[rank].tensors
            if tensors.keys() != ranks[0].tensors.keys():
                differing = sorted(tensors.keys() ^ ranks[0].tensors.keys())
                raise UserError(f"{where}: ranks 0 and {rank} do not both hold {differing[0]}")
            for key, tensor in tensors.items():
                if tensor.shape != ranks[0].tensors[key].shape:
                    raise UserError(f"{where}: {key} has other shapes on ranks 0 and {rank}")
                if not torch.equal(tensor, first[key]):
                    raise UserError(
                        f"{where}: {key} differs between ranks {index * group} and {rank}, which "
                        f"both belong to domain {domain}"
                    )
        experts[domain] = first
    return experts


def _detect_config(
    dense: Mapping[str, Tensor], settings: Mapping[str, object], options: ConvertOptions, file: Path
) -> dict[str, object]:
    """Detect the fields of our config.json, without `domains` and `untie`.

    Sizes are those of the weights. The number of heads is that of `options`, or else of `settings`.

    Args:
        dense: all tensors of a dense model, or of a DEMix model with one of its experts, by
            fairseq's keys.
        settings: see `_read_settings`.
        file: weight file of the checkpoint, for messages.
    Raises:
        UserError: if a weight that shows a size is missing or no matrix, or if the number of heads
            is unknown or does not divide the hidden size.
    """
    for key in (_TOKENS, _POSITIONS, "decoder.layers.0.fc1.weight"):
        if key not in dense:
            raise UserError(f"{file}: {key} is missing, so this is no language model of fairseq")
        if dense[key].dim() != 2:
            raise UserError(f"{file}: {key} has shape {tuple(dense[key].shape)}, not a matrix's")
    numbers = [re.match(r"decoder\.layers\.(\d{1,4})\.", key) for key in dense]
    layers = 1 + max(int(number[1]) for number in numbers if number)
    vocab, width = dense[_TOKENS].shape
    stored_heads = next((settings[key] for key in _HEADS if key in settings), None)
    heads = options.num_attention_heads or stored_heads
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"--num_attention_heads: {heads!r} does not divide the width {width} of {file}"
            if heads is not None
            else f"--num_attention_heads is needed: {file} holds no settings that tell, and no "
            "config.json lies in its folder"
        )
    return {
        "model_type": "demix",
        "architectures": ["DemixForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": dense["decoder.layers.0.fc1.weight"].shape[0],
        "max_position_embeddings": dense[_POSITIONS].shape[0] - EXTRA_POSITIONS,
    }


def _check_tensors(
    dense: Mapping[str, Tensor], names: Mapping[str, str], config: Mapping[str, object], file: Path
) -> None:
    """Check that a checkpoint has the tensors that `config` implies, and no others.

    Shapes must fit, dtypes must be floating-point, and a stored output matrix must equal the
    embeddings.

    Args:
        dense: tensors of a dense model by fairseq's key.
        names: our name by expected key of fairseq, see `build_key_map`.
        config: fields of our config.json.
        file: the checkpoint, for messages.
    Raises:
        UserError: naming the first tensor that is unexpected, missing or does not fit.
    """
    if unexpected := sorted(dense.keys() - names.keys() - {_OUTPUT, _VERSION}):
        raise UserError(f"{file}: {unexpected[0]} is unexpected (of {len(unexpected)} such keys)")
    if missing := sorted(names.keys() - dense.keys()):
        raise UserError(f"{file}: {missing[0]} is missing (of {len(missing)} such keys)")
    for key, expected in iterate_expected_shapes(names, config):
        if tuple(dense[key].shape) != expected:
            raise UserError(f"{file}: {key} has shape {tuple(dense[key].shape)}, not {expected}")
        if not dense[key].is_floating_point():
            raise UserError(f"{file}: {key} has dtype {dense[key].dtype}, not one of weights")
    if _OUTPUT in dense and not torch.equal(dense[_OUTPUT], dense[_TOKENS]):
        raise UserError(f"{file}: {_OUTPUT} differs from {_TOKENS}, to which it should be tied")


def _detect_untie(expert_tensors: Mapping[str, Tensor], layer_count: int, file: Path) -> str:
    """Detect our field `untie`, the layers with experts, from the tensors of one rank file.

    Raise UserError if these are not the feed-forwards of all layers, every second or the last.

    Args:
        expert_tensors: tensors of one expert, or of its rank file, by fairseq's key.
        layer_count: number of layers of the model.
        file: weight file of the checkpoint, for messages.
    """
    kinds = {
        "feedforward": range(layer_count),
        "feedforward_every_other": range(1, layer_count, 2),
        "feedforward_top": range(layer_count - 1, layer_count),
    }
    for untie, untied_layers in kinds.items():
        parts = {
            f"decoder.layers.{layer}.{part}.{kind}"
            for layer in untied_layers
            for part in ("fc1", "fc2")
            for kind in ("weight", "bias")
        }
        if expert_tensors.keys() == parts:
            return untie
    raise UserError(
        f"{file}: the rank files hold {', '.join(sorted(expert_tensors)[:3])}, ...; expected are "
        "fc1 and fc2 of every layer, of every second or of the last"
    )
