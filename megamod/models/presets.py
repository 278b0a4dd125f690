"""Named sizes of all models, by family."""

SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
"""Fields of a configuration that a preset sets and flags may change."""


def _make_sizes(**shapes: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Make the fields of named sizes from tuples in the order of `SHAPE`."""
    return {name: dict(zip(SHAPE, shape, strict=True)) for name, shape in shapes.items()}


_ENCODERS = _make_sizes(base=(12, 768, 12, 3072), large=(24, 1024, 16, 4096)) | {
    "1.3b": dict(zip(SHAPE, (24, 2048, 32, 8192), strict=True))
}

PRESETS: dict[str, dict[str, dict[str, int]]] = {
    "demix": {
        "tiny": dict(zip(SHAPE[:3], (2, 64, 4), strict=True)),
        "125m": dict(zip(SHAPE[:3], (12, 768, 12), strict=True)),
        "350m": dict(zip(SHAPE[:3], (24, 1024, 16), strict=True)),
        "750m": dict(zip(SHAPE[:3], (24, 1536, 16), strict=True)),
        "1.3b": dict(zip(SHAPE[:3], (24, 2048, 32), strict=True)),
    },
    "bert": _make_sizes(
        bert_tiny=(2, 128, 2, 512),
        bert_mini=(4, 256, 4, 1024),
        bert_small=(4, 512, 8, 2048),
        bert_base=(12, 768, 12, 3072),
        bert_large=(24, 1024, 16, 4096),
    ),
    "mux_bert": _make_sizes(small=(4, 512, 8, 2048)) | _ENCODERS,
    "mux_electra": {
        size: shape | {"embedding_size": 128 if size == "small" else shape["hidden_size"]}
        for size, shape in (_make_sizes(small=(12, 256, 4, 1024)) | _ENCODERS).items()
    },
    "mux_roberta": _make_sizes(small=(4, 512, 8, 3072)) | _ENCODERS,
}
"""Causal language models (demix): Gururangan et al. 2022, table 1; the feed-forward is four times
as wide. BERTs of --config_name: Turc et al. 2019. Multiplexed encoders: BERT and ELECTRA as
published, small as in the release of Murahari et al. 2023, 1.3b with the shape of GPT-3 XL."""
