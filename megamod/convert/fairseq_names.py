"""Names and shapes of the tensors of fairseq's causal language models, and our names for them."""

from collections.abc import Iterator, Mapping

from megamod.dist.scope import EXPERTS_COMPONENT

# Names of tensors outside of blocks and inside of one, by name in fairseq.
_OUTSIDE = {
    "embed_tokens.weight": "embeddings.tokens.weight",
    "embed_positions.weight": "embeddings.positions.weight",
    "layer_norm.weight": "final_norm.weight",
    "layer_norm.bias": "final_norm.bias",
}
_INSIDE = {
    **{f"self_attn.{which}_proj": f"attention.{which}_proj" for which in ("q", "k", "v", "out")},
    "self_attn_layer_norm": "attention_norm",
    "fc1": "feed_forward.fc1",
    "fc2": "feed_forward.fc2",
    "final_layer_norm": "feed_forward_norm",
}
EXTRA_POSITIONS = 2  # rows of the position table before that of position 0, one for padding


def build_key_map(layer_count: int) -> dict[str, str]:
    """Map fairseq's key of every tensor of a dense model with `layer_count` blocks to our name."""
    names = {f"decoder.{theirs}": f"model.{ours}" for theirs, ours in _OUTSIDE.items()}
    for layer in range(layer_count):
        for theirs, ours in _INSIDE.items():
            for kind in ("weight", "bias"):
                key = f"decoder.layers.{layer}.{theirs}.{kind}"
                names[key] = f"model.layers.{layer}.{ours}.{kind}"
    return names


def iterate_expected_shapes(
    names: Mapping[str, str], config: Mapping[str, object]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield fairseq's key and the expected shape of every tensor of a dense model.

    Args:
        names: mapping whose keys are those of fairseq, see `build_key_map`.
        config: fields of our config.json.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    matrices = {"fc1": (inner, width), "fc2": (width, inner)}
    for key in names:
        part, kind = key.split(".")[-2:]
        if part == "embed_tokens":
            yield key, (config["vocab_size"], width)
        elif part == "embed_positions":
            yield key, (config["max_position_embeddings"] + EXTRA_POSITIONS, width)
        else:
            square = matrices.get(part, (width, width))
            vector = kind == "bias" or part.endswith("layer_norm")
            yield key, square[:1] if vector else square


def insert_domain(name: str, domain: str) -> str:
    """Return the name that a feed-forward tensor of a dense model has in the expert of `domain`.

    Args:
        name: name of the tensor in a dense model.
    """
    return name.replace(".feed_forward.", f".feed_forward.{EXPERTS_COMPONENT}.{domain}.", 1)
