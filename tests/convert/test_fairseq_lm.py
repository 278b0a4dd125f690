import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamod.convert import FORMATS, ConvertOptions, import_format
from megamod.convert.fairseq_lm import convert, export
from megamod.convert.fairseq_names import build_key_map
from megamod.errors import UserError
from megamod.states.output_folder import create_new_folder
from megamod.states.weights import write_index, write_weights

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "demix_btm"
WIDTH, INNER, VOCAB, ROWS, LAYERS = 8, 12, 20, 10, 3


def fairseq_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A dense model by fairseq's names, spelled out here once more."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (VOCAB, WIDTH),
        "embed_positions.weight": (ROWS, WIDTH),
        "layer_norm.weight": (WIDTH,),
        "layer_norm.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{i}.{norm}.weight"] = shapes[f"layers.{i}.{norm}.bias"] = (WIDTH,)
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"layers.{i}.self_attn.{p}.weight"] = (WIDTH, WIDTH)
            shapes[f"layers.{i}.self_attn.{p}.bias"] = (WIDTH,)
        shapes[f"layers.{i}.fc1.weight"], shapes[f"layers.{i}.fc1.bias"] = (INNER, WIDTH), (INNER,)
        shapes[f"layers.{i}.fc2.weight"], shapes[f"layers.{i}.fc2.bias"] = (WIDTH, INNER), (WIDTH,)
    state = {f"decoder.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
    return {**state, "decoder.version": torch.tensor([3.0])}


def is_expert(key: str, layers: tuple[int, ...] = tuple(range(LAYERS))) -> bool:
    return ".fc" in key and int(key.split(".")[2]) in layers


def demix_folder(path: Path, ranks: int, domains: int, layers=tuple(range(LAYERS))) -> Path:
    """Rank r of W holds the expert of domain r * E // W."""
    path.mkdir()
    shared = {k: t for k, t in fairseq_state().items() if not is_expert(k, layers)}
    save_file(shared, path / "checkpoint_last-shared.safetensors")
    for rank in range(ranks):
        expert = fairseq_state(100 + rank * domains // ranks)
        own_values = {k: t for k, t in expert.items() if is_expert(k, layers)}
        save_file(own_values, path / f"checkpoint_last-rank-{rank}.safetensors")
    return path


def dense_file(path: Path, **changes: object) -> Path:
    """A model file; a change to None removes a key, dots written as __."""
    state = fairseq_state()
    for key, tensor in changes.items():
        name = f"decoder.{key.replace('__', '.')}"
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, path / "elm.safetensors")
    return path / "elm.safetensors"


HEADS = ConvertOptions(num_attention_heads=2)


def test_every_format_is_a_module_with_a_way():
    for name in FORMATS:
        assert {"convert", "export"} & vars(import_format(name)).keys()


def test_names_of_the_golden_model_are_those_of_the_map():
    if not GOLDEN.is_dir():
        pytest.skip(f"recorded tensors are not at {GOLDEN}")
    keys = load_file(GOLDEN / "dense_lm" / "model.safetensors").keys()
    assert keys == build_key_map(2).keys() | {"decoder.version"}


def test_dense_shape_and_lists(tmp_path):
    converted = convert(dense_file(tmp_path), ConvertOptions(("law",), 2))
    assert converted.config == {
        "model_type": "demix",
        "architectures": ["DemixForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": ROWS - 2,
        "domains": ["law"],
        "untie": "none",
    }
    theirs = fairseq_state()
    assert len(converted.used) == len(converted.state) == len(theirs) - 1
    assert list(converted.dropped) == ["decoder.version"]
    assert list(converted.missing) == ["decoder.output_projection.weight"]
    name = "model.layers.1.attention.out_proj.bias"
    assert torch.equal(converted.state[name], theirs["decoder.layers.1.self_attn.out_proj.bias"])
    assert "missing   decoder.output_projection.weight: tied" in converted.format_report()


def test_an_equal_output_matrix_is_dropped(tmp_path):
    tied = {"output_projection__weight": fairseq_state()["decoder.embed_tokens.weight"].clone()}
    converted = convert(dense_file(tmp_path, **tied), HEADS)
    assert set(converted.dropped) == {"decoder.version", "decoder.output_projection.weight"}
    assert not converted.missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output_projection__weight": torch.ones(VOCAB, WIDTH)},
            "output_projection.weight differs",
        ),
        ({"output_projection__weight": torch.ones(2, WIDTH)}, "output_projection.weight differs"),
        ({"layernorm_embedding__weight": torch.ones(WIDTH)}, "layernorm_embedding.weight is unexp"),
        ({"layers__9__fc1__weight": torch.ones(INNER, WIDTH)}, "decoder.layers.3.fc1.bias is miss"),
        # Neither a layer beyond any model nor the last possible one takes time or memory.
        ({"layers__999999999__fc1__weight": torch.ones(INNER, WIDTH)}, "is unexpected"),
        (
            {"layers__9999__fc1__weight": torch.ones(INNER, WIDTH)},
            "decoder.layers.10.fc1.bias is missing",
        ),
        ({"layers__2__fc2__bias": None}, "decoder.layers.2.fc2.bias is missing"),
        ({"embed_positions__weight": None}, "no language model of fairseq"),
        ({"embed_tokens__weight": torch.ones(3)}, "embed_tokens.weight has shape (3,), not a mat"),
        (
            {"layers__1__fc1__weight": torch.ones(INNER, 9)},
            "decoder.layers.1.fc1.weight has shape (12, 9), not (12, 8)",
        ),
        (
            {"layers__0__self_attn__k_proj__bias": torch.ones(4)},
            "decoder.layers.0.self_attn.k_proj.bias has shape (4,), not (8,)",
        ),
        (
            {"layers__0__final_layer_norm__weight": torch.ones(WIDTH, WIDTH)},
            "final_layer_norm.weight has shape (8, 8), not (8,)",
        ),
        ({"layer_norm__bias": torch.ones(WIDTH).long()}, "layer_norm.bias has dtype torch.int64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        convert(dense_file(tmp_path, **changes), HEADS)
    assert message in str(caught.value) and "elm.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "heads", "message"),
    [
        ({}, None, "--num_attention_heads is needed"),
        ({}, 3, "--num_attention_heads: 3 does not divide the width 8"),
        ({"heads": 0}, None, "0 does not divide"),
        ({"activation_fn": "relu"}, 2, "activation_fn 'relu'; only 'gelu'"),
        ({"decoder_normalize_before": False}, 2, "decoder_normalize_before False; only True"),
        ({"no_scale_embedding": True}, 2, "no_scale_embedding True"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, heads, message):
    file = dense_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        convert(file, ConvertOptions(num_attention_heads=heads))
    assert message in str(caught.value)


def test_heads_from_the_settings_of_a_pt_file(tmp_path):
    (tmp_path / "config.json").write_text('{"heads": 8}')
    cfg = {"model": {"decoder_attention_heads": 4, "activation_fn": "gelu"}}
    torch.save(
        {"cfg": cfg, "args": None, "model": fairseq_state()}, tmp_path / "checkpoint_last.pt"
    )
    assert convert(tmp_path, ConvertOptions()).config["num_attention_heads"] == 4
    assert convert(tmp_path, HEADS).config["num_attention_heads"] == 2


def test_which_file_of_a_folder(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(dense_file(tmp_path), tmp_path / name)
    (tmp_path / "elm.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot tell.*a\.safetensors, b\.safetensors"):
        convert(tmp_path, HEADS)
    (tmp_path / "b.safetensors").rename(tmp_path / "checkpoint_best.safetensors")
    assert convert(tmp_path, HEADS).config["vocab_size"] == VOCAB
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "none", HEADS)


@pytest.mark.parametrize(("ranks", "domains"), [(2, 2), (4, 2), (3, 3), (4, 1)])
def test_demix_ranks_to_domains(tmp_path, ranks, domains):
    names = tuple(f"d{number}" for number in range(domains))[::-1]  # order of ranks, not of names
    folder = demix_folder(tmp_path / "in", ranks, domains)
    converted = convert(folder, ConvertOptions(names, 2))
    assert converted.config["domains"] == list(names)
    assert converted.config["untie"] == "feedforward"
    shared = sum(not is_expert(key) for key in fairseq_state()) - 1
    assert len(converted.state) == shared + domains * 4 * LAYERS
    for number, domain in enumerate(names):
        expected = fairseq_state(100 + number)["decoder.layers.1.fc2.weight"]
        name = f"model.layers.1.feed_forward.experts.{domain}.fc2.weight"
        assert torch.equal(converted.state[name], expected)


@pytest.mark.parametrize(
    ("layers", "untie"), [((1,), "feedforward_every_other"), ((2,), "feedforward_top")]
)
def test_which_layers_have_experts_is_seen(tmp_path, layers, untie):
    folder = demix_folder(tmp_path / "in", 2, 2, layers)
    assert convert(folder, ConvertOptions(("a", "b"), 2)).config["untie"] == untie


def spoil(folder: Path, name: str, key: str, tensor: torch.Tensor | None) -> None:
    state = load_file(folder / f"checkpoint_last-{name}.safetensors")
    state.pop(key, None)
    if tensor is not None:
        state[key] = tensor
    save_file(state, folder / f"checkpoint_last-{name}.safetensors")


def test_what_is_wrong_with_a_demix_folder_is_told(tmp_path):
    def told(domains: tuple[str, ...], change=lambda folder: None) -> str:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        folder = demix_folder(tmp_path / "in", 4, 2)
        change(folder)
        with pytest.raises(UserError) as caught:
            convert(folder, ConvertOptions(domains, 2))
        return str(caught.value)

    fc1, two = "decoder.layers.0.fc1.weight", ("law", "med")
    other = torch.zeros(INNER, WIDTH)
    assert "given is nothing" in told(())
    assert "4 ranks, given is 3 names" in told(("a", "b", "c"))
    assert f"{fc1} differs between ranks 2 and 3, which both belong to domain med" in told(
        two, lambda folder: spoil(folder, "rank-3", fc1, other)
    )
    assert f"ranks 0 and 1 do not both hold {fc1}" in told(
        two, lambda folder: spoil(folder, "rank-1", fc1, None)
    )
    assert f"{fc1} has other shapes on ranks 0 and 2" in told(
        two, lambda folder: spoil(folder, "rank-2", fc1, torch.zeros(1))
    )
    assert f"{fc1} is also in the rank files" in told(
        two, lambda folder: spoil(folder, "shared", fc1, other)
    )
    assert "checkpoint_last-rank-1.safetensors is missing" in told(
        two, lambda folder: (folder / "checkpoint_last-rank-1.safetensors").unlink()
    )
    assert "no NAME-shared.pt" in told(
        two, lambda folder: (folder / "checkpoint_last-shared.safetensors").unlink()
    )
    moved = "decoder.layers.0.self_attn.q_proj.bias"
    assert "expected are fc1 and fc2" in told(
        two,
        lambda folder: [
            spoil(folder, "shared", moved, None),
            *(spoil(folder, f"rank-{r}", moved, torch.zeros(WIDTH)) for r in range(4)),
        ],
    )


def test_an_adapted_demix_model_has_everything_in_the_shared_file(tmp_path):
    torch.save({"model": fairseq_state()}, tmp_path / "checkpoint_last-shared.pt")
    torch.save({"model": {}}, tmp_path / "checkpoint_last-rank-0.pt")
    converted = convert(tmp_path, ConvertOptions(("news",), 2))
    assert converted.config["untie"] == "none" and len(converted.state) == 4 + 16 * LAYERS


def model_folder(path: Path, converted) -> Path:
    path.mkdir()
    apart = converted.config["untie"] != "none"
    write_weights(path, converted.state, has_experts=apart)
    if apart:
        write_index(path, converted.state, 0)
    (path / "config.json").write_text(json.dumps(converted.config))
    return path


@pytest.mark.parametrize(
    "layers", [None, (0, 1, 2), (1,)], ids=["dense", "feedforward", "every_other"]
)
def test_export_is_the_way_back(tmp_path, layers):
    dense = layers is None
    source = dense_file(tmp_path) if dense else demix_folder(tmp_path / "in", 2, 2, layers)
    converted = convert(source, ConvertOptions(("b", "a"), 2))
    (tmp_path / "back").mkdir()
    files = export(model_folder(tmp_path / "ours", converted), tmp_path / "back")
    assert sorted(files) == sorted((tmp_path / "back").iterdir())
    for file in files:
        if file.suffix == ".safetensors":
            original = load_file(source if dense else source / file.name)
            original.pop("decoder.version", None)
            written = load_file(file)
            assert written.keys() == original.keys()
            assert all(torch.equal(written[key], original[key]) for key in original)
    again = convert(tmp_path / "back", ConvertOptions())  # the settings beside it are enough
    assert again.config == converted.config
    assert all(torch.equal(again.state[name], t) for name, t in converted.state.items())
    assert again.state.keys() == converted.state.keys()


def test_export_refuses_what_fairseq_has_no_files_for(tmp_path):
    with pytest.raises(UserError, match="there is no model"):
        export(tmp_path, tmp_path)
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "domains": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "untie": "transformer"}))
    with pytest.raises(UserError, match="hold feed-forwards only"):
        export(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "untie": "none"}))
    save_file({"odd": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="odd has no counterpart"):
        export(tmp_path, tmp_path)


def test_new_folder_is_whole_or_absent(tmp_path):
    (tmp_path / "empty").mkdir()
    with create_new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "empty" / "x").read_text() == "1"
    with pytest.raises(UserError, match="exists already"), create_new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(RuntimeError), create_new_folder(tmp_path / "failed") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        create_new_folder(tmp_path / "file" / "x"),
    ):
        pass
