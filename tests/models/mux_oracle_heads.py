"""Heads of the naive multiplexed models; see `mux_oracle.py`."""

import torch
from mux_oracle import Weights, blocks, embed, encode, gelu, linear, norm
from torch import Tensor


def per_instance(w: Weights, name: str, instance: int, h: Tensor, c: dict) -> Tensor:
    x = gelu(linear(w, f"{name}.demux_module.dense_{instance}", h))
    return norm(w, f"{name}.demux_module.layer_norm_{instance}", x, c["layer_norm_eps"])


def by_prefix(w: Weights, name: str, instance: int, hidden: Tensor, t: int, c: dict) -> Tensor:
    x = gelu(linear(w, f"{name}.dense", torch.cat([hidden[instance], hidden[t]])))
    return norm(w, f"{name}.layer_norm", x, c["layer_norm_eps"])


def demultiplex(w: Weights, hidden: Tensor, instance: int, t: int, c: dict) -> Tensor:
    """State of one instance at one position of a mixed sequence [T, H]."""
    if c["demuxing_variant"] == "index":
        return by_prefix(w, "demultiplexer", instance, hidden, t, c)
    if c["demuxing_variant"] == "mlp":
        return per_instance(w, "demultiplexer", instance, hidden[t], c)
    key = w["demux_module.demux_instance_embedding"][instance]
    x = gelu(linear(w, "demux_module.dense_1", torch.cat([key, hidden[t]])))
    for layer in range(2, c["num_hidden_demux_layers"]):
        x = gelu(linear(w, f"demux_module.dense_{layer}", x)) + x
    last = gelu(linear(w, "demultiplexer.pre_decoder", x))
    return norm(w, "demultiplexer.pre_decoder_layer_norm", last, c["layer_norm_eps"]) + x


def token_logits(w: Weights, hidden: Tensor, instance: int, t: int, c: dict) -> Tensor:
    """Logits of the retrieval head for one instance at one position, [V]."""
    head, eps = "retrieval_head", c["layer_norm_eps"]
    if c["demuxing_variant"] == "index":
        x = by_prefix(w, head, instance, hidden, t, c)
    elif c["demuxing_variant"] == "mlp":
        x = per_instance(w, head, instance, hidden[t], c)
        x = norm(
            w, f"{head}.layer_norm_pre_vocab", gelu(linear(w, f"{head}.dense_pre_vocab", x)), eps
        )
    else:
        electra = c["model_type"] == "mux_electra"
        key = w["demux_module.demux_instance_embedding"][instance]
        x = gelu(linear(w, "demux_module.dense_1", torch.cat([key, hidden[t]])))
        x = norm(w, "demux_module.layer_norm_1", x, eps)
        for layer in range(2, (c["num_hidden_demux_layers"] if electra else 2) + 1):
            new = gelu(linear(w, f"demux_module.dense_{layer}", x))
            new = norm(w, f"demux_module.layer_norm_{layer}", new, eps)
            x = new + x if electra else new
        new = gelu(linear(w, f"{head}.pre_decoder", x))
        new = norm(w, f"{head}.pre_decoder_layer_norm", new, eps)
        x = new + x if electra else new
    matrix = w.get(f"{head}.decoder.weight")
    if matrix is None:
        matrix = w["bert.embeddings.word_embeddings.weight"]
    return matrix @ x + w[f"{head}.decoder.bias"]


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return logits.logsumexp(0) - logits[label]


def mean(losses: list[Tensor]) -> Tensor:
    return sum(losses) / max(len(losses), 1) + torch.zeros(())


def retrieval(w: Weights, head: str, hidden: Tensor, ids: Tensor, slots: Tensor, c: dict) -> Tensor:
    """Mean loss of saying what the asked instance has at each position."""
    N, family = c["num_instances"], c["model_type"]
    start = 1 if head == "sequence" and family != "mux_bert" else 0
    if c["demuxing_variant"] == "index":
        start = N + 1
    everything = head == "discriminator" or (head == "mlm" and family == "mux_bert")
    losses = []
    for group in range(len(hidden)):
        for t in range(start, hidden.shape[1]):
            slot = int(slots[group, t])
            target = int(ids[group * N + slot, t])
            if everything or target != c["pad_token_id"]:
                logits = token_logits(w, hidden[group], slot, t, c)
                losses.append(cross_entropy(logits, target))
    return mean(losses)


def masked_lm(w: Weights, inputs: dict, c: dict, embeddings: Weights | None = None) -> dict:
    N, T = c["num_instances"], inputs["input_ids"].shape[1]
    hidden, ids = encode(w, "mlm", inputs, c, embeddings)
    logits = [
        torch.stack([token_logits(w, hidden[r // N], r % N, t, c) for t in range(T)])
        for r in range(len(ids))
    ]
    shift = N + 1 if c["demuxing_variant"] == "index" else 0
    losses = []
    for r, row in enumerate(inputs["labels"].tolist()):
        for t in range(shift, T):
            if row[t - shift] != -100:
                losses.append(cross_entropy(logits[r][t], row[t - shift]))
    return finished("mlm", torch.stack(logits), mean(losses), w, hidden, ids, inputs, c)


def discriminator(w: Weights, inputs: dict, c: dict) -> dict:
    N = c["num_instances"]
    hidden, ids = encode(w, "discriminator", inputs, c)
    start = N + 1 if c["demuxing_variant"] == "index" else 0
    logits, losses = [], []
    for r in range(len(ids)):
        row = []
        for t in range(start, ids.shape[1]):
            x = demultiplex(w, hidden[r // N], r % N, t, c)
            x = gelu(linear(w, "discriminator_predictions.dense", x))
            row.append(linear(w, "discriminator_predictions.dense_prediction", x)[0])
            if inputs.get("attention_mask") is None or inputs["attention_mask"][r, t - start]:
                sign = 2 * int(inputs["labels"][r, t - start]) - 1
                losses.append(torch.log1p(torch.exp(-sign * row[-1])))
        logits.append(torch.stack(row))
    return finished("discriminator", torch.stack(logits), mean(losses), w, hidden, ids, inputs, c)


def filled(inputs: dict, N: int) -> dict:
    """The last group filled up with the first rows."""
    rows = len(inputs["input_ids"])
    order = [r if r < rows else (r - rows) % rows for r in range(-(-rows // N) * N)]
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    return inputs | {
        name: inputs[name][order]
        for name in names
        if inputs.get(name) is not None and len(inputs[name]) == rows
    }


def class_logits(w: Weights, x: Tensor, head: str, c: dict) -> Tensor:
    eps = c["layer_norm_eps"]
    if c["model_type"] == "mux_roberta":
        if head == "token" and c["demuxing_variant"] == "index":
            return linear(w, "demultiplexer.decoder", x)
        x = gelu(linear(w, "demultiplexer.dense_before_out_proj", x))
        if c["demuxing_variant"] == "mlp":
            x = norm(w, "demultiplexer.layernorm_presoftmax", x, eps)
        return linear(w, "demultiplexer.out_proj", x)
    if c["model_type"] == "mux_electra" and head == "sequence":
        return linear(w, "classifier.out_proj", gelu(linear(w, "classifier.dense", x)))
    return linear(w, "classifier", x)


def classifier(w: Weights, head: str, inputs: dict, c: dict) -> dict:
    N, rows = c["num_instances"], len(inputs["input_ids"])
    inputs = filled(inputs, N)
    hidden, ids = encode(w, head, inputs, c)
    prefixed = c["demuxing_variant"] == "index"
    columns = range(N + 1 if prefixed else 0, ids.shape[1])
    if head == "sequence":
        columns = [N if prefixed else 0]
    logits = [
        torch.stack(
            [class_logits(w, demultiplex(w, hidden[r // N], r % N, t, c), head, c) for t in columns]
        )
        for r in range(rows)
    ]
    labels = inputs["labels"].view(rows, -1).tolist()
    if c["num_labels"] == 1:
        losses = [(logits[r][0, 0] - labels[r][0]) ** 2 for r in range(rows)]
    else:
        losses = [
            cross_entropy(logits[r][t], label)
            for r in range(rows)
            for t, label in enumerate(labels[r])
            if label != -100
        ]
    logits = torch.stack(logits) if head == "token" else torch.cat(logits)
    return finished(head, logits, mean(losses), w, hidden, ids, inputs, c)


def finished(
    head: str,
    logits: Tensor,
    task: Tensor,
    w: Weights,
    hidden: Tensor,
    ids: Tensor,
    inputs: dict,
    c,
) -> dict:
    """Logits and weighted losses."""
    output = {"logits": logits, "task_loss": task, "loss": c["task_loss_coeff"] * task}
    if c["retrieval_loss_coeff"] > 0:
        lost = retrieval(w, head, hidden, ids, inputs["retrieved_instances"], c)
        output["retrieval_loss"] = lost
        output["loss"] = output["loss"] + c["retrieval_loss_coeff"] * lost
    return output


def plain_generator(w: Weights, inputs: dict, c: dict, embeddings: Weights) -> Tensor:
    """Mean loss of an ordinary masked language model; `w` without its prefix."""
    losses = []
    words = w.get("generator_lm_head.weight")
    if words is None:
        words = embeddings["electra.embeddings.word_embeddings.weight"]
    for r, row in enumerate(inputs["labels"].tolist()):
        ids, types, mask, places = (
            None if inputs.get(name) is None else inputs[name][r]
            for name in ("input_ids", "token_type_ids", "attention_mask", "position_ids")
        )
        places = torch.arange(len(ids)) if places is None else places
        x = embed(embeddings, "electra.embeddings", ids, types, places, c)
        x = blocks(w, "electra.", x, c, mask)
        x = gelu(linear(w, "generator_predictions.dense", x))
        x = norm(w, "generator_predictions.LayerNorm", x, c["layer_norm_eps"])
        for t, label in enumerate(row):
            if label != -100:
                losses.append(cross_entropy(words @ x[t] + w["generator_lm_head.bias"], label))
    return mean(losses)


def replaced_tokens(w: Weights, inputs: dict, c: dict, generator: dict, replaced: Tensor) -> dict:
    """The wrapper. `generator` has the generator's fields, `replaced` the discriminator's ids."""
    inner = {k.removeprefix("generator."): v for k, v in w.items() if k.startswith("generator.")}
    embeddings = inner if "electra.embeddings.LayerNorm.weight" in inner else w
    corrupted = inputs["input_ids"] == c["mask_token_id"]
    generated = None
    if c["generator"] != "none":
        corrupted = corrupted & (replaced != inputs["labels"])
        if c["generator"] == "plain":
            generated = plain_generator(inner, inputs, generator, embeddings)
        else:
            slots = inputs.get("generator_retrieved_instances")
            generated = masked_lm(
                inner, inputs | {"retrieved_instances": slots}, generator, embeddings
            )["loss"]
    detected = discriminator(w, inputs | {"input_ids": replaced, "labels": corrupted}, c)
    loss = c["disc_loss_weight"] * detected["loss"]
    if generated is not None:
        loss = loss + c["gen_loss_weight"] * generated
    return detected | {
        "loss": loss,
        "discriminator_loss": detected["loss"],
        "generator_loss": generated,
    }
