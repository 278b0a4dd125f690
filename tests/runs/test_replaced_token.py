"""Replaced tokens: a step by hand, what a generator draws, and models that do not fit."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from megamod.args import DataArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.batches import BatchDivision
from megamod.data.corpus.binarize import binarize
from megamod.data.lm.databin import DataBin
from megamod.data.lm.masking import (
    MaskedBatches,
    Masking,
    count_full_blocks,
    iterate_masked_eval_batches,
)
from megamod.data.lm.order import BalancedSampler
from megamod.errors import UserError
from megamod.evaluation.encoder_lm import score_encoder
from megamod.evaluation.perplexity import select_rank_share
from megamod.flags import parse_args
from megamod.models.mux.configuration import MuxElectraConfig
from megamod.models.mux.generator import MuxElectraForReplacedTokens
from megamod.runs.pretrain.encoder_lm import (
    ITEM_FIELDS,
    build_encoder_config,
    pretrain_encoder,
)
from megamod.runs.pretrain.encoder_start import (
    WeightSource,
    build_initial_encoder,
    find_weight_source,
)
from megamod.train.encoder_objective import EncoderObjective, compute_replaced_token_losses

VOCABULARY, LENGTH, INSTANCES = 45, 8, 2
MASK, CLS, PAD = 4, 2, 0
CPU = torch.device("cpu")
SMALLER = dict(hidden_size=8, intermediate_size=16, num_attention_heads=1)
PREFIX = dict(demuxing_variant="index", prefix_fill_token_id=44, prefix_first_token_id=43)
BOTH = dict(task_loss_coeff=0.25, retrieval_loss_coeff=2.0, disc_loss_weight=3.0)


class Tokens:
    """Stands for a split's tokens."""

    def __init__(self, count: int):
        self.tokens = (5 + np.arange(count) * 7 % 38).astype(np.uint16)

    def check_read_ids(self, ids: np.ndarray, start: int) -> None:
        """Expect ids as they were written."""
        assert np.array_equal(ids, self.tokens[start : start + len(ids)])


def batches_of(prefix: int = 0, micro: int = 4, pads: int = 0, blocks: int = 7) -> MaskedBatches:
    """Batches of 8 rows to a step, with many masks."""
    datasets = [Tokens(blocks * LENGTH)]
    masking = Masking(MASK, PAD, (PAD, CLS, MASK), VOCABULARY, 0.5, 0.85, 0.0, pads)
    return MaskedBatches(
        datasets,
        BalancedSampler([count_full_blocks(item, LENGTH) for item in datasets], 1),
        masking,
        BatchDivision(micro, 8, 0, 1),
        block_size=LENGTH,
        instances=INSTANCES,
        seed=1,
        prefix=prefix,
    )


def electra(**more: object) -> MuxElectraForReplacedTokens:
    """A tiny discriminator without dropout."""
    torch.manual_seed(2)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    shape = dict(hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=VOCABULARY, cls_token_id=CLS, mask_token_id=MASK, pad_token_id=PAD)
    return MuxElectraForReplacedTokens(
        MuxElectraConfig(
            **quiet,
            **shape,
            **ids,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            num_instances=INSTANCES,
            **more,
        )
    )


def objective_of(model: MuxElectraForReplacedTokens) -> EncoderObjective:
    losses = partial(compute_replaced_token_losses, device=CPU, config=model.config)
    return EncoderObjective(losses, ITEM_FIELDS["replaced_token"], "task_loss")


def step_by_hand(model: MuxElectraForReplacedTokens, batch: dict, prefix: int) -> torch.Tensor:
    """The loss of a whole step, token by token."""
    replaced, corrupted = batch["input_ids"].clone(), batch["input_ids"] == MASK
    replaced[corrupted] = batch["random_ids"][corrupted]
    fed = model.prepare_batch(replaced)
    hidden = model.encode(fed)
    logits = model.discriminator_predictions(model.demultiplex(hidden, slice(prefix, None)))
    words = model.retrieval_head.decoder(model.compute_vocabulary_states(hidden, None)).log_softmax(
        -1
    )
    output, asked = [], []
    for row in range(len(replaced)):
        group, slot = divmod(row, INSTANCES)
        for column in range(LENGTH - prefix):
            chance = torch.sigmoid(logits[group, slot, column])
            output.append(-torch.log(chance if corrupted[row, column] else 1 - chance))
    for group, slots in enumerate(batch["retrieved_instances"].tolist()):
        for column in range(prefix, LENGTH):
            target = fed.ids[group * INSTANCES + slots[column], column]
            asked.append(-words[group, slots[column], column, target])
    return 3 * (0.25 * sum(output) / len(output) + 2 * sum(asked) / len(asked))


@pytest.mark.parametrize("more", [{}, PREFIX])
def test_the_micro_batches_of_a_step_make_its_loss_and_gradient(more):
    model = electra(**BOTH, **more)
    prefix, objective = model.config.prefix_length, objective_of(model)
    micro = [batches_of(prefix)[number] for number in range(2)]
    items = [sum(counts) / 2 for counts in zip(*map(objective.count_items, micro), strict=True)]
    scored = [objective.compute_loss(model, batch, items) for batch in micro]
    (sum(entry.loss for entry in scored) / 2).backward()
    result = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = step_by_hand(model, batches_of(prefix, micro=8)[0], prefix)
    loss.backward()
    assert sum(entry.loss.item() for entry in scored) / 2 == pytest.approx(loss.item(), rel=1e-5)
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    assert result.keys() == trained.keys() and len(result) > 30
    for name, parameter in trained.items():
        # The order of sums is another; single values of a gradient may nearly cancel.
        bound = 1e-5 * parameter.grad.abs().max().item() + 1e-7
        assert torch.allclose(result[name], parameter.grad, rtol=1e-4, atol=bound), name


@pytest.mark.parametrize("more", [{}, PREFIX])
def test_a_generator_retrieves_as_many_tokens_as_are_counted(more):
    model = electra(
        **{**BOTH, **more}, generator="multiplexed", generator_config=SMALLER, gen_loss_weight=0.5
    )
    prefix, objective = model.config.prefix_length, objective_of(model)
    seen, fewer = [], 0
    whole = model.generator.add_retrieval_loss

    def retrieve(output, *args):
        whole(output, *args)
        seen.append((output.retrieval_loss, output.retrieval_count.item()))

    model.generator.add_retrieval_loss = retrieve
    for number in range(12):
        batch = batches_of(prefix, pads=LENGTH)[number]
        counts = dict(zip(ITEM_FIELDS["replaced_token"], objective.count_items(batch), strict=True))
        by_hand = 0
        for group, slots in enumerate(batch["retrieved_instances"].tolist()):
            for column in range(prefix, LENGTH):
                row = batch["input_ids"][group * INSTANCES + slots[column]]
                overwritten = not prefix and column == 0
                by_hand += overwritten or row[column - prefix].item() != PAD
        objective.compute_loss(model, batch, [1.0, 1.0, 1.0, 10.0])
        objective.compute_loss(model, batch, [1.0, 1.0, 1.0, 20.0])
        (ten, count), (twenty, again) = seen[-2:]
        assert count == again == counts["readable"] == by_hand
        fewer += count < counts["positions"]
        assert ten.item() == pytest.approx(2 * twenty.item(), rel=1e-6)
    assert fewer > 6


@pytest.mark.parametrize("kind", ["plain", "multiplexed"])
def test_held_out_text_is_scored_the_same_at_every_call(kind):
    model = electra(**BOTH, generator=kind, generator_config=SMALLER)
    losses = partial(compute_replaced_token_losses, device=CPU, config=model.config)

    def scores(part: int, parts: int, total: list[torch.Tensor]) -> dict[str, float]:
        return score_encoder(
            model,
            select_rank_share(iterate_masked_eval_batches(batches_of(blocks=9)), part, parts),
            lambda module, batch: losses(module, batch, [1.0] * 4),
            CPU,
            total.append,
            perplexity=False,
        )

    sums: list[torch.Tensor] = []
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = scores(0, 1, sums)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert scores(0, 1, sums) == first and first["generator_loss"] > 0
    for part in range(2):
        scores(part, 2, sums)
    assert torch.allclose(sums[2] + sums[3], sums[0], rtol=1e-5)
    assert math.isfinite(first["task_loss"]) and model.training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data-bin whose held-out text is shorter than a group, and models of several kinds."""
    folder = tmp_path_factory.mktemp("replaced")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(40))]
    for name in ("tokenizer", "text"):
        (folder / name).mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "tokenizer" / "vocab.txt")).save_pretrained(
        folder / "tokenizer"
    )
    for split, count in (("train", 40), ("valid", 8), ("test", 40)):
        (folder / "text" / f"{split}.txt").write_text(" ".join(words[5 : 5 + count]) + "\n")
    binarize({"text": folder / "text"}, str(folder / "tokenizer"), folder / "bin", add_bos=True)
    electra().save_pretrained(folder / "electra")
    electra(num_hidden_demux_layers=2).save_pretrained(folder / "two-layers")
    other = electra().config
    other.mask_token_id = 7
    other.save_pretrained(folder / "other-mask")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    BertForMaskedLM(BertConfig(**shape, **sizes)).save_pretrained(folder / "bert")
    return folder


def parsed(folder: Path, model: str, *flags: str) -> tuple:
    argv = [
        *("--objective", "replaced_token", "--num_instances", "2", "--max_seq_length", "8"),
        *("--model", str(folder / model), "--data", str(folder / "bin"), *flags),
        *("--output_dir", str(folder / "run")),
    ]
    return parse_args(RunArgs, SafetyArgs, ModelArgs, OptimArgs, MuxArgs, DataArgs, argv=argv)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("other-mask", (), "its mask_token_id 7 is not the 4 of the tokenizer in --data"),
        ("electra", ("--generator", "plain"), "--generator plain: cannot .* which has none"),
        ("electra", ("--demuxing_variant", "index"), "--demuxing_variant .* has index_pos"),
        ("two-layers", ("--num_hidden_demux_layers", "3"), "layers 3: cannot .* which has 2"),
    ],
)
def test_folders_that_contradict_flags_or_data(folder, model, flags, message):
    _, _, chosen, _, mux, _ = parsed(folder, model, *flags)
    with pytest.raises(UserError, match=message):
        build_encoder_config(chosen, mux, DataBin(folder / "bin"), LENGTH)


def test_a_flag_that_says_what_the_folder_says(folder):
    _, _, chosen, _, mux, _ = parsed(folder, "electra", "--demuxing_variant", "index_pos")
    assert build_encoder_config(chosen, mux, DataBin(folder / "bin"), LENGTH).num_instances == 2
    _, _, chosen, _, mux, _ = parsed(
        folder, "two-layers"
    )  # the default is 3, and was not asked for
    config = build_encoder_config(chosen, mux, DataBin(folder / "bin"), LENGTH)
    assert config.num_hidden_demux_layers == 2


def test_weights_to_start_from_must_fit(folder):
    config = electra().config
    result = build_initial_encoder(
        config, 1, WeightSource(str(folder / "electra"), "--init_from"), "replaced_token"
    )
    key = "electra.embeddings.word_embeddings.weight"
    assert torch.equal(result.state_dict()[key], electra().state_dict()[key])
    with pytest.raises(UserError, match=r"model of type 'bert'; needed is electra or mux_elec"):
        find_weight_source(ModelArgs(init_from=str(folder / "bert")), config)
    wider = electra(num_hidden_demux_layers=2).config
    wider.hidden_size = wider.embedding_size = 32
    with pytest.raises(UserError, match=r"has shape \(.*16.*\), in this model \(.*32.*\)"):
        build_initial_encoder(
            wider, 1, WeightSource(str(folder / "electra"), "--init_from"), "replaced_token"
        )


def test_held_out_text_must_fill_a_group(folder):
    message = "--eval_split valid: 1 sequences of --max_seq_length 8, .* takes --num_instances 2"
    with pytest.raises(UserError, match=message):
        pretrain_encoder(*parsed(folder, "electra"))
    assert not (folder / "run").exists()
