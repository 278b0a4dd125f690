"""Per-layer settings of a configuration move with stacked layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from megamod.errors import UserError
from megamod.merging.layer_settings import find_language_section
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
IDS = (torch.arange(24) * 7 % 29 + 3)[None]


def make(folder: Path, kind: str, fields: dict, seed: int = 0, drop: tuple[str, ...] = ()):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    if drop:  # as older programs wrote it: the class derives the rest
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in drop}
        (folder / "config.json").write_text(json.dumps(kept))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def without(model, layers: list[int], dropped: list[int]) -> torch.Tensor:
    """Logits of the model with some layers replaced by the identity."""
    stack = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(layers)
    )

    def skip(_, inputs, keywords, output):
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [stack[n].register_forward_hook(skip, with_kwargs=True) for n in dropped]
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


def stack(tmp_path: Path, *spans: tuple[str, int, int]) -> Path:
    lines = "\n".join(
        f"- sources: [{{model: {tmp_path / name}, layer_range: [{first}, {last}]}}]"
        for name, first, last in spans
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: passthrough\nslices:\n{lines}\n")
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    merge(read_recipe(recipe), output)
    return output


KINDS = {
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 1, 0, 1, 1, 0]), 1, ()),
    "smollm3-derived": ("smollm3", dict(no_rope_layer_interval=2), 1, ("no_rope_layers",)),
    "qwen2-window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=3),
        0,
        ("layer_types",),
    ),
    "gemma3": (
        "gemma3_text",
        dict(layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=4),
        2,
        (),
    ),
    "qwen2-moe": ("qwen2_moe", dict(**MOE, mlp_only_layers=[1, 4]), 0, ()),
    "glm4-moe": (
        "glm4_moe",
        dict(first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
             topk_group=1, moe_intermediate_size=8),
        1,
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_left_out_of_a_model(tmp_path, name):
    kind, fields, dropped, absent = KINDS[name]
    model = make(tmp_path / "a", kind, SMALL | dict(num_hidden_layers=6) | fields, drop=absent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    spans = [("a", 0, dropped), ("a", dropped + 1, 6)] if dropped else [("a", 1, 6)]
    output = stack(tmp_path, *spans)
    again, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = without(model, list(range(6)), [dropped])
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_gpt_neo(tmp_path):
    fields = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_heads=2, window_size=4,
        max_position_embeddings=64, num_layers=6, attention_types=[[["global", "local"], 3]],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = make(tmp_path / "a", "gpt_neo", fields)
    output = stack(tmp_path, ("a", 0, 1), ("a", 2, 6))
    again = AutoModelForCausalLM.from_pretrained(output)
    assert again.config.attention_layers == ["global", "global", "local", "global", "local"]
    torch.testing.assert_close(logits(again), without(model, list(range(6)), [1]))


def test_layers_of_two_models_bring_their_own_settings(tmp_path):
    for seed, (name, flags) in enumerate({"a": [1, 1, 0, 1], "b": [0, 1, 0, 0]}.items()):
        fields = SMALL | dict(num_hidden_layers=4, no_rope_layers=flags)
        make(tmp_path / name, "smollm3", fields, seed)
    output = stack(tmp_path, ("a", 0, 3), ("b", 2, 4))
    config = json.loads((output / "config.json").read_text())
    assert config["no_rope_layers"] == [1, 1, 0, 0, 0] and config["num_hidden_layers"] == 5


def test_a_pattern_that_cannot_be_said_is_refused(tmp_path):
    """Jamba derives the kind of a layer from its number."""
    fields = SMALL | dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
    fields |= dict(expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_dt_rank=4)
    fields |= dict(use_mamba_kernels=False, mamba_d_state=4)
    fields.pop("head_dim")
    make(tmp_path / "a", "jamba", fields)
    with pytest.raises(UserError, match="layer 2 cannot become layer 1") as error:
        stack(tmp_path, ("a", 0, 1), ("a", 2, 4))
    assert len(str(error.value).splitlines()) <= 3
    stack(tmp_path, ("a", 0, 4), ("a", 0, 2))  # the pattern goes on


def test_a_model_with_a_tower_and_a_text_config(tmp_path):
    config = CONFIG_MAPPING["gemma3"](
        text_config=SMALL
        | dict(model_type="gemma3_text", num_hidden_layers=4, sliding_window=4)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2),
        vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=4)
        | dict(num_attention_heads=2, image_size=8, patch_size=4, model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "a")
    output = stack(tmp_path, ("a", 0, 1), ("a", 2, 4))
    again, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    text = again.config.text_config
    assert text.num_hidden_layers == 3 and again.config.vision_config.num_hidden_layers == 4
    assert text.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    language = model.model.language_model
    handle = language.layers[1].register_forward_hook(
        lambda _, inputs, keywords, output: inputs[0], with_kwargs=True
    )
    expected = logits(model)
    handle.remove()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


TOY = {
    "kinds": ["p", "q", "r", "s"],
    "attention_pattern": "M*-M",
    "types": [[["g", "l"], 2]],
    "mlp_only_layers": [1, 3],
    "eos_token_id": [1, 2, 3, 4],
}


def test_of_a_type_that_is_not_known_values_tell(tmp_path):
    (tmp_path / "a").mkdir()
    state = {f"h.{n}.w": torch.full((2,), float(n)) for n in range(4)} | {
        "wte.weight": torch.ones(3, 2)
    }
    save_file(state, tmp_path / "a/model.safetensors")

    def configure(**more) -> None:
        config = {"model_type": "toy", "n_layer": 4} | TOY | more
        (tmp_path / "a/config.json").write_text(json.dumps(config))

    def config_of(output: Path) -> dict:
        return json.loads((output / "config.json").read_text())

    configure(first_k_dense_replace=2)
    result = config_of(stack(tmp_path, ("a", 1, 4)))
    assert result["kinds"] == ["q", "r", "s"] and result["attention_pattern"] == "*-M"
    assert result["types"] == [[["l", "g", "l"], 1]] and result["mlp_only_layers"] == [0, 2]
    assert result["first_k_dense_replace"] == 1 and result["eos_token_id"] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="first_k_dense_replace is 2"):
        stack(tmp_path, ("a", 2, 4), ("a", 0, 1))
    configure(attn_layer_period=2)
    with pytest.raises(UserError, match="attn_layer_period is 2"):
        stack(tmp_path, ("a", 1, 4))
    configure(text_config={"n_layer": 4, "kinds": ["p", "q", "r", "s"]}, n_layer=None)
    result = config_of(stack(tmp_path, ("a", 0, 1), ("a", 3, 4)))["text_config"]
    assert result == {"n_layer": 2, "kinds": ["p", "s"]}


def test_a_text_config_may_leave_the_number_of_layers_to_its_class():
    """As in the first LLaVA models, which store only values that differ from the defaults."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 9}}
    key, section = find_language_section(config)
    assert key == "text_config" and section["num_hidden_layers"] == 32
    assert find_language_section({"model_type": "toy"}) == (None, {})
