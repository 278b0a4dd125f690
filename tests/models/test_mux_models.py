"""Multiplexed models beyond their formulas: any number of rows, files, errors, precision."""

import pytest
import torch
from tiny_mux import LENGTH, batch, build_model
from torch.nn import functional as F

from megamod.models.mux.bert import MuxBertConfig, MuxBertForSequenceClassification
from megamod.models.mux.generator import sample_tokens
from megamod.models.mux.roberta import MuxRobertaConfig

GAUSS, V2 = "gaussian_hadamard", "gaussian_attention_v2"


def bert(head: str, demux: str = "index_pos", mux: str = GAUSS, **fields):
    """A MUX-BERT of two layers."""
    return build_model("bert", head, demux, mux, fields).eval()


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("filler", ["deterministic", "random"])
def test_filler_rows_are_whole_rows_of_the_batch(rows, filler):
    model = bert("sequence", "index", num_instances=3, filler=filler, use_token_type_ids=True)
    inputs = batch("sequence", model.config, rows, False)
    names = ("input_ids", "attention_mask", "token_type_ids")
    pairs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        fed = model.prepare_batch(*(inputs[name] for name in names))
        assert fed.rows == rows and len(fed.ids) == -(-rows // 3) * 3
        prefix = model.config.prefix_length
        for number in range(rows, len(fed.ids)):
            same = [
                r
                for r in range(rows)
                if torch.equal(fed.ids[number, prefix:], inputs["input_ids"][r])
                and torch.equal(fed.mask[number], inputs["attention_mask"][r])
                and torch.equal(fed.token_type_ids[number, prefix:], inputs["token_type_ids"][r])
            ]
            assert same
            pairs.add((number, same[0]))
    if filler == "deterministic":
        assert pairs == {(n, (n - rows) % rows) for n in range(rows, len(fed.ids))}
    elif rows % 3:
        assert {row for _, row in pairs} == set(range(rows))


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("filler", ["deterministic", "random"])
def test_filler_rows_have_no_part_in_the_loss(head, filler):
    model = bert(head, num_instances=3, filler=filler, retrieval_loss_coeff=0.0)
    inputs = batch(head, model.config, 4, False)
    output = model(**inputs)
    assert len(output.logits) == 4
    expected = F.cross_entropy(output.logits.flatten(0, -2), inputs["labels"].flatten())
    torch.testing.assert_close(output.task_loss.double(), expected, atol=1e-6, rtol=0)


def test_a_repeated_group_is_the_same_group():
    """Five rows of N = 2 are as six, of which the last is the first again."""
    model = bert("sequence", num_instances=2)
    inputs = batch("sequence", model.config, 5, True)
    whole = torch.cat([inputs["input_ids"], inputs["input_ids"][:1]])
    torch.testing.assert_close(model(inputs["input_ids"]).logits, model(whole).logits[:5])


@pytest.mark.parametrize("demux", ["index_pos", "index"])
@pytest.mark.parametrize("head", ["mlm", "discriminator"])
def test_pretraining_heads_take_any_number_of_rows(head, demux):
    """Five rows of N = 2 are as six, of which the last is a copy without labels."""
    family = "bert" if head == "mlm" else "electra"
    fields = {"num_instances": 2, "retrieval_loss_coeff": 0.0}
    model = build_model(family, head, demux, GAUSS, fields).eval()
    inputs = batch(head, model.config, 5, False)
    whole = {k: torch.cat([v, v[:1]]) for k, v in inputs.items() if k != "retrieved_instances"}
    if head == "mlm":
        whole["labels"][5] = -100
    five, six = model(**inputs), model(**whole)
    torch.testing.assert_close(five.logits, six.logits[:5])
    if head == "mlm":
        torch.testing.assert_close(five.loss, six.loss)
    else:
        length, mask = five.logits.shape[1], inputs["attention_mask"]
        scores = F.binary_cross_entropy_with_logits(
            five.logits, inputs["labels"][:, :length].double(), reduction="none"
        )
        counted = mask[:, :length].bool()
        expected = 0.75 * scores[counted].mean()
        torch.testing.assert_close(five.loss.double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="the batch has no rows"):
        model(torch.ones(0, LENGTH).long())


def test_a_masked_lm_with_a_prefix_sees_all_tokens_if_there_is_room():
    """Without labels nothing is dropped, and logits stand at the columns of the tokens."""
    model = bert("mlm", "index", num_instances=2).eval()
    ids = batch("mlm", model.config, 2, True)["input_ids"]  # 7 + 3 tokens
    padded = torch.cat([ids, torch.zeros(2, 3).long()], 1)
    labels = ids.masked_fill(torch.arange(10) != 4, -100)
    both = model(padded, labels=F.pad(labels, (0, 3), value=-100))
    logits = model(ids).logits
    torch.testing.assert_close(logits, both.logits[:, :10])
    expected = F.cross_entropy(logits[:, 4].float(), ids[:, 4])
    torch.testing.assert_close(both.task_loss.double(), expected.double(), rtol=1e-6, atol=0)
    faster = model(padded, labels=F.pad(labels, (0, 3), value=-100), output_logits=False)
    assert faster.logits is None
    torch.testing.assert_close(faster.task_loss, both.task_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("head", "length", "message"),
    [
        ("sequence", 14, r"14 tokens after a prefix of 3 need more than the 16 positions"),
        ("mlm", 17, r"17 tokens need more than the 16 positions of max_position_embeddings 16"),
    ],
)
def test_lengths_that_do_not_fit(head, length, message):
    model = bert(head, "index", num_instances=2)
    with pytest.raises(ValueError, match=message):
        model(torch.ones(2, length).long())
    assert model(torch.ones(2, 13).long()).logits.isfinite().all()  # 13 + 3 is the most


def test_prefixes_of_the_release():
    ids = torch.arange(12).view(4, 3) + 200
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    model = MuxBertForSequenceClassification(MuxBertConfig(**sizes, demuxing_variant="index"))
    assert model.prepare_ids(ids).tolist() == [
        [678, 680, 101, 200, 201, 202],
        [680, 677, 101, 203, 204, 205],
        [678, 680, 101, 206, 207, 208],
        [680, 677, 101, 209, 210, 211],
    ]
    config = MuxRobertaConfig(num_instances=3)
    ids = (config.prefix_fill_token_id, config.prefix_first_token_id, config.cls_token_id)
    assert ids == (50000, 50263, 49923) and config.prefix_length == 4


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_retrieval_head_only_where_it_is_trained(family, head):
    demux = "mlp" if family == "roberta" else "index_pos"
    with_head = build_model(family, head, demux, GAUSS, {})
    without = build_model(family, head, demux, GAUSS, {"retrieval_loss_coeff": 0.0})
    assert hasattr(with_head, "retrieval_head") and not hasattr(without, "retrieval_head")
    inputs = batch(head, without.config, 4, False)
    output = without(**inputs)
    assert output.retrieval_loss is None
    torch.testing.assert_close(output.loss, 0.75 * output.task_loss)
    without.config.retrieval_loss_coeff = 0.1
    with pytest.raises(ValueError, match="retrieval_loss_coeff was 0 when this model was made"):
        without(**inputs)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_to_retrieve_is_no_nan(training):
    model = bert("sequence", retrieval_percentage=0.0).train(training)
    output = model(**batch("sequence", model.config, 4, False))
    assert output.retrieval_loss == 0 and output.retrieval_count == 0
    torch.testing.assert_close(output.loss, 0.75 * output.task_loss)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", ["mlm", "token"])
def test_nothing_labelled_is_no_nan(head):
    model = bert(head).train()
    inputs = batch(head, model.config, 4, False)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs)
    assert output.task_loss == 0 and output.loss.isfinite() and output.retrieval_loss > 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_share_of_tokens_to_retrieve():
    model = bert("sequence", retrieval_percentage=0.25, max_position_embeddings=500)
    torch.manual_seed(3)
    ids = torch.randint(1, 30, (8, 500))
    ids[:, 400:] = 0  # padding is no target
    count = model(ids, labels=torch.zeros(8).long()).retrieval_count
    assert abs(count - 0.25 * 4 * 400) < 5 * (0.25 * 0.75 * 1600) ** 0.5


def test_items_of_a_larger_batch():
    """Losses of two micro-batches that are divided by the items of both add up to the whole."""
    model = bert("mlm").train()
    inputs = batch("mlm", model.config, 8, False)
    whole = model(**inputs)
    items = (inputs["labels"] != -100).sum()
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        of_groups = slice(part.start // 2, part.stop // 2)
        half = {k: v[of_groups if k == "retrieved_instances" else part] for k, v in inputs.items()}
        count = 4 * LENGTH  # one of each mixed position
        halves.append(model(**half, num_items_in_batch=items, num_retrieval_items=count).loss)
    torch.testing.assert_close(sum(halves), whole.loss)


@pytest.mark.parametrize("demux", ["index_pos", "index"])
def test_masks_change_nothing(demux):
    """The encoder sees padding as any token, as in the release."""
    model = bert("token", demux, padding_logits=True)
    inputs = batch("token", model.config, 4, False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(model(ids, mask).logits, model(ids).logits)
    assert torch.equal(model(ids, torch.zeros_like(mask)).logits, model(ids).logits)


@pytest.mark.parametrize("demux", ["index_pos", "index"])
def test_padding_of_all_instances_can_be_masked(demux):
    """Then columns of padding behind all rows change nothing."""
    model = bert("sequence", demux, mask_padding=True)
    ids = batch("sequence", model.config, 4, True)["input_ids"][:, :4]
    longer = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 3))
    expected = model(ids).logits
    torch.testing.assert_close(model(longer, mask).logits, expected)
    assert (model(longer).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("used", [False, True])
def test_segments_of_classifiers(used):
    model = bert("sequence", use_token_type_ids=used)
    ids = batch("sequence", model.config, 4, True)["input_ids"]
    plain = model(ids).logits
    assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids)).logits, plain)
    segments = model(ids, token_type_ids=torch.ones_like(ids)).logits
    assert torch.equal(segments, plain) != used


def test_logits_at_real_tokens_alone():
    model = bert("token", padding_logits=False)
    inputs = batch("token", model.config, 5, False)
    real = (inputs["attention_mask"] != 0) | (inputs["labels"] != -100)
    some = model(**inputs)
    model.config.padding_logits = True
    every = model(**inputs)
    torch.testing.assert_close(some.logits[real], every.logits[real])
    assert not some.logits[~real].any() and every.logits[~real].all()
    torch.testing.assert_close(some.loss, every.loss)


@pytest.mark.parametrize("demux", ["index_pos", "index"])
def test_the_last_block_computes_what_is_read(demux):
    model = bert("sequence", demux)
    fed = model.prepare_batch(batch("sequence", model.config, 4, True)["input_ids"])
    first = model.config.prefix_length or 1
    some = model.encode(fed, first).apply_norm()
    assert some.shape[1] == first
    torch.testing.assert_close(some, model.encode(fed).apply_norm()[:, :first])


@pytest.mark.parametrize(("head", "mux"), [("mlm", GAUSS), ("token", V2), ("sequence", GAUSS)])
def test_gradient_checkpointing_changes_nothing(head, mux):
    gradients = []
    for checkpointing in (False, True):
        model = bert(head, mux=mux).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(head, model.config, 4, False)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", ["mlm", "sequence", "token", "discriminator"])
def test_bfloat16(head, autocast):
    """Close to float64 as far as 8 bits go, and gradients in the parameters' dtype."""
    family = "electra" if head == "discriminator" else "bert"
    exact = build_model(family, head, "index_pos", GAUSS, {"num_instances": 3}).train()
    inputs = batch(head, exact.config, 6, False)
    expected = exact(**inputs)
    expected.loss.backward()
    model = build_model(family, head, "index_pos", GAUSS, {"num_instances": 3}).train()
    model = model.float() if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs)
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - expected.loss) < 0.05 * expected.loss
    output.loss.backward()
    exact_gradients = {name: p.grad for name, p in exact.named_parameters()}
    ours, theirs = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype
            ours.append(parameter.grad.double().flatten())
            theirs.append(exact_gradients[name].flatten())
    assert F.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0) > 0.98


def test_outputs_as_a_tuple():
    model = bert("sequence")
    inputs = batch("sequence", model.config, 4, True)
    loss, logits, task, *_ = model(**inputs, return_dict=False)
    output = model(**inputs)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert torch.equal(task, output.task_loss)


@pytest.mark.parametrize("demux", ["index_pos", "index"])
@pytest.mark.parametrize("generator", ["none", "plain", "multiplexed"])
def test_masks_are_replaced_and_nothing_else(generator, demux):
    model = build_model("electra", "wrapper", demux, GAUSS, {"generator": generator}).eval()
    inputs = batch("wrapper", model.config, 4, False)
    masked = inputs["input_ids"] == model.config.mask_token_id
    assert masked.any()
    output = model(**inputs)
    assert torch.equal(output.input_ids[~masked], inputs["input_ids"][~masked])
    changed = output.input_ids != inputs["labels"]
    expected = masked if generator == "none" else masked & changed
    assert torch.equal(output.corrupted, expected)
    assert output.input_ids.max() < model.config.vocab_size and output.input_ids.min() >= 0
    again = model(**inputs, random_ids=output.input_ids)
    assert torch.equal(again.input_ids, output.input_ids)
    torch.testing.assert_close(again.loss, output.loss)


def test_tokens_are_drawn_from_the_softmax():
    states = torch.zeros(20000, 2)
    states[:, 0] = 1.0
    decoder = torch.nn.Linear(2, 4)
    decoder.weight.data = torch.tensor([[1.0, 9.0], [0.0, 9.0], [-1.0, 9.0], [2.0, 9.0]])
    decoder.bias.data = torch.tensor([0.0, 0.5, 1.0, -1.0])
    torch.manual_seed(0)
    shares = sample_tokens(states, decoder).bincount(minlength=4) / len(states)
    expected = (decoder.weight[:, 0] + decoder.bias).softmax(0)
    assert (shares - expected).abs().max() < 5 * (0.25 / len(states)) ** 0.5


def test_a_generator_needs_labels():
    model = build_model("electra", "wrapper", "index_pos", GAUSS, {"generator": "plain"})
    with pytest.raises(ValueError, match="labels are missing: the generator must know"):
        model(torch.ones(2, LENGTH).long())


@pytest.mark.parametrize("mux", ["gaussian_hadamard", "binary_hadamard", V2])
@pytest.mark.parametrize("head", ["sequence", "token", "mlm"])
def test_kernels_compute_what_plain_torch_does(mux, head):
    """Loss, logits and every gradient, in training form."""
    model = bert(head, mux=mux, retrieval_loss_coeff=0.5, kernels="reference").float()
    inputs = batch(head, model.config, 4, True)
    losses = {}
    for kernels in ("reference", "triton"):
        model.config.kernels = kernels
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        losses[kernels] = (output.loss.detach(), grads)
    torch.testing.assert_close(losses["triton"][0], losses["reference"][0], rtol=1e-5, atol=1e-6)
    assert losses["triton"][1].keys() == losses["reference"][1].keys()
    for name, grad in losses["reference"][1].items():
        off = (losses["triton"][1][name] - grad).abs().max()
        assert off <= 1e-4 * grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_compiles_without_a_break(head, kernels):
    model = bert(head, kernels=kernels).float()
    inputs = batch(head, model.config, 4, False)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain = model(**ids).logits
    plain.sum().backward()
    expected = model.demultiplexer.pre_decoder.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(**ids).logits
    result.sum().backward()
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(model.demultiplexer.pre_decoder.weight.grad, expected)
