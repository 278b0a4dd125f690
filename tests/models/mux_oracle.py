"""Multiplexed models written naively, to compare ours with.

One row, one instance, one head after the other; concatenations are built, nothing is shared or left
out. Weights are a dictionary by the names of the published checkpoints, of which tied ones appear
once; the configuration is a dictionary of its fields. Evaluation mode.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]
BACKBONES = {"mux_bert": "bert", "mux_electra": "electra", "mux_roberta": "roberta"}
OVERWRITING = {  # heads whose RSA or per-instance form always starts with [CLS]
    "mux_bert": ("mlm", "sequence", "token"),
    "mux_electra": ("mlm", "discriminator"),
    "mux_roberta": ("sequence", "token"),
}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def block(w: Weights, name: str, x: Tensor, c: dict, seen: Tensor | None = None) -> Tensor:
    """Attention and feed-forward of one sequence [L, D]; `seen` [L] is 0 at masked keys."""
    heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
    query, key, value = (
        linear(w, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value")
    )
    width, mixed = x.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(width)
        if seen is not None:
            scores = scores - 10000.0 * (seen == 0)
        mixed.append(scores.softmax(1) @ value[:, part])
    mixed = linear(w, f"{name}.attention.output.dense", torch.cat(mixed, 1))
    x = norm(w, f"{name}.attention.output.LayerNorm", mixed + x, eps)
    inner = gelu(linear(w, f"{name}.intermediate.dense", x))
    return norm(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", inner) + x, eps)


def looked_up(table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
    """Rows of a table; that of padding gets no gradient from here."""
    return torch.stack([table[i].detach() if i == padding else table[i] for i in ids.tolist()])


def embed(
    w: Weights, name: str, words: Tensor, types: Tensor | None, positions: Tensor, c: dict
) -> Tensor:
    """Embeddings of one row: ids [T], or vectors [T, D] in their place."""
    padding = c["pad_token_id"]
    if not words.is_floating_point():
        words = looked_up(w[f"{name}.word_embeddings.weight"], words, padding)
    types = torch.zeros(len(words), dtype=torch.long) if types is None else types
    x = words + looked_up(w[f"{name}.token_type_embeddings.weight"], types, None)
    padding = padding if c["model_type"] == "mux_roberta" else None
    x = x + looked_up(w[f"{name}.position_embeddings.weight"], positions, padding)
    return norm(w, f"{name}.LayerNorm", x, c["layer_norm_eps"])


def counted(ids: Tensor, c: dict) -> Tensor:
    """Positions of the first embedding of a row, if none are given."""
    if c["model_type"] != "mux_roberta":
        return torch.arange(len(ids))
    positions, seen = [], 0
    for token in ids.tolist():
        seen += token != c["pad_token_id"]
        positions.append(c["pad_token_id"] + (seen if token != c["pad_token_id"] else 0))
    return torch.tensor(positions)


def multiplex(w: Weights, x: Tensor, mask: Tensor | None, head: str, c: dict) -> Tensor:
    """One group: [N, T, D], mask [N, T] -> [T, D]."""
    variant, key, N = c["muxing_variant"], w["instance_embedding"], len(x)
    if variant.startswith("random_ortho"):
        parts = [torch.stack([key[i] @ x[i, t] for t in range(x.shape[1])]) for i in range(N)]
        return sum(parts) / math.sqrt(N)
    if variant == "gaussian_attention":
        marked = [x[i] * key[i] for i in range(N)]
        common = gelu(linear(w, "cross_instances_linear", sum(marked) / N))
        common = norm(w, "cross_instances_layernorm", common, 1e-5)
        return sum(block(w, "muxing_attention", m, c) + common for m in marked) / N
    if variant == "gaussian_attention_v2":
        marked = []
        for i in range(N):
            seen = None if mask is None else mask[i]
            marked.append((block(w, "muxing_attention", x[i], c, seen) + x[i]) * key[i])
        columns = []
        for t in range(x.shape[1]):
            slots = torch.stack([m[t] for m in marked])
            seen = mask[:, t] if mask is not None and head == "sequence" else None
            columns.append((block(w, "muxing_attention_2", slots, c, seen) + slots).sum(0) / N)
        return torch.stack(columns)
    return sum(x[i] * key[i] for i in range(N)) / N


def prefix(slot: int, c: dict) -> list[int]:
    """Tokens in front of a row."""
    fill, N = c["prefix_fill_token_id"], c["num_instances"]
    first = c["prefix_first_token_id"]
    return [first - slot if i == slot else fill for i in range(N)] + [c["cls_token_id"]]


def fed_ids(ids: Tensor, head: str, c: dict) -> Tensor:
    """Ids to embed: [R, S] -> [R, T]."""
    N = c["num_instances"]
    if c["demuxing_variant"] == "index":
        rows = [prefix(r % N, c) + row for r, row in enumerate(ids.tolist())]
        if head in ("mlm", "discriminator"):
            rows = [row[: ids.shape[1]] for row in rows]
        return torch.tensor(rows)
    ids = ids.clone()
    if head in OVERWRITING[c["model_type"]]:
        ids[:, 0] = c["cls_token_id"]
    return ids


def encode(
    w: Weights, head: str, inputs: dict, c: dict, embeddings: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """Mixed hidden states [B, T, H], and the ids that were embedded [R, T]."""
    N, backbone = c["num_instances"], BACKBONES[c["model_type"]]
    ids = fed_ids(inputs["input_ids"], head, c)
    T, table = ids.shape[1], embeddings or w
    mask, types, positions = (
        inputs.get(name) for name in ("attention_mask", "token_type_ids", "position_ids")
    )
    pretraining = head in ("mlm", "discriminator")
    of_tokens = pretraining or c["model_type"] == "mux_roberta"
    if types is not None and ids.shape[1] > types.shape[1]:
        types = torch.cat([types.new_zeros(len(types), T - types.shape[1]), types], 1)
    hidden = []
    for group in range(len(ids) // N):
        rows = range(group * N, (group + 1) * N)
        embedded = []
        for r in rows:
            places = counted(ids[r], c)
            if of_tokens and positions is not None:
                places = positions[r if len(positions) > 1 else 0]
            row_types = types[r] if of_tokens and types is not None else None
            embedded.append(embed(table, f"{backbone}.embeddings", ids[r], row_types, places, c))
        rows_mask = None if mask is None else mask[list(rows)]
        mixed = multiplex(w, torch.stack(embedded), rows_mask, head, c)
        places = torch.arange(T) + (2 if c["model_type"] == "mux_roberta" else 0)
        if not of_tokens and positions is not None:
            places = positions[group if len(positions) > 1 else 0]
        mixed = embed(table, f"{backbone}.embeddings", mixed, None, places, c)
        hidden.append(blocks(w, f"{backbone}.", mixed, c))
    return torch.stack(hidden), ids


def blocks(w: Weights, name: str, x: Tensor, c: dict, seen: Tensor | None = None) -> Tensor:
    """Projection where there is one, and the encoder's blocks, of one sequence."""
    if f"{name}embeddings_project.weight" in w:
        x = linear(w, f"{name}embeddings_project", x)
    for number in range(c["num_hidden_layers"]):
        x = block(w, f"{name}encoder.layer.{number}", x, c, seen)
    return x
