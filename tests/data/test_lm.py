"""Data-bins, and which sequences make up the micro-batches of each rank."""

import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megamod.data.batches import BatchDivision
from megamod.data.corpus.indexed import Dictionary, IndexedDataset, IndexedWriter
from megamod.data.lm.batches import TrainBatches, iterate_eval_batches, iterate_train_batches
from megamod.data.lm.blocks import IGNORE, TokenBlocks
from megamod.data.lm.databin import DataBin
from megamod.data.lm.order import BalancedSampler, TemperatureSampler, UnbalancedSampler
from megamod.data.lm.verify import check_databin
from megamod.errors import UserError

LENGTH = 4
SIZES = {"law": 25, "code": 9, "news": 41, "med": 4}  # blocks; the last one of each is short


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> list[TokenBlocks]:
    """Four domains; token t of domain d is 1000 * (d + 1) + t, in items of 7."""
    folder = tmp_path_factory.mktemp("domains")
    built = []
    for number, (name, size) in enumerate(SIZES.items()):
        tokens = 1000 * (number + 1) + np.arange(size * LENGTH - 1)
        with IndexedWriter(folder / name, np.uint16) as writer:
            for start in range(0, len(tokens), 7):
                writer.add_item(tokens[start : start + 7])
        built.append(TokenBlocks(IndexedDataset(folder / name), LENGTH, 2, 1))
    return built


@pytest.fixture
def lengths(blocks) -> list[int]:
    return [len(item) for item in blocks]


def draw(sampler, first: int, count: int):
    """Domains and blocks of consecutive samples."""
    return sampler.select_blocks(np.arange(first, first + count))


def listed(samples: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in samples), strict=True))


def of_step(batches: TrainBatches, step: int) -> list[tuple[int, int]]:
    """(domain, block) of the samples a rank reads in a step, from the tensors it gets."""
    result = []
    for number in range(step * batches.micro_steps, (step + 1) * batches.micro_steps):
        for label in batches[number]["labels"][:, 0].tolist():
            domain, token = divmod(label, 1000)
            result.append((domain - 1, token // LENGTH))
    return result


def dense(blocks, sampler, rank, world, micro_batch=2, global_batch=32):
    return TrainBatches.build_shared_stream(
        blocks, sampler, BatchDivision(micro_batch, global_batch, rank, world)
    )


def by_domain(blocks, sampler, rank, world, micro_batch=2, global_batch=32):
    """Return the rows that rank `rank` of `world` reads in DEMix with four domains."""
    experts, group = min(world, 4), max(1, world // 4)
    held = 4 // experts
    first = rank // group * held
    return TrainBatches.build_domain_streams(
        blocks,
        sampler,
        BatchDivision(micro_batch, global_batch, rank % group, group),
        range(first, first + held),
    )


def test_a_step_is_the_same_for_any_number_of_ranks(blocks, lengths):
    """Over epoch edges too: the smallest domain has 4 blocks and gets 8 a step."""
    sampler = BalancedSampler(lengths, seed=7)
    for step in (0, 1, 2, 5, 1000):
        expected = sorted(
            zip(*(part.tolist() for part in draw(sampler, step * 32, 32)), strict=True)
        )
        for build, worlds in ((dense, (1, 2, 4, 8, 16)), (by_domain, (1, 2, 4, 8, 16))):
            for world in worlds:
                ranks = [of_step(build(blocks, sampler, r, world), step) for r in range(world)]
                assert len({len(item) for item in ranks}) == 1
                assert sorted(itertools.chain(*ranks)) == expected, (build.__name__, world, step)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_accumulation_does_not_change_a_step(blocks, lengths, micro_batch):
    for sampler in (UnbalancedSampler(lengths, 7), TemperatureSampler(lengths, 7, 0.5)):
        expected = listed(draw(sampler, 96, 32))
        ranks = [of_step(dense(blocks, sampler, r, 4, micro_batch), 3) for r in range(4)]
        assert list(itertools.chain(*ranks)) == expected


def test_an_epoch_of_a_domain_shows_every_block_once(blocks, lengths):
    batches = by_domain(blocks, BalancedSampler(lengths, 7), 0, 4, micro_batch=1)  # 8 a step
    seen = [block for step in range(25) for _, block in of_step(batches, step)]
    for epoch in range(8):
        assert sorted(seen[epoch * 25 : (epoch + 1) * 25]) == list(range(25))


def test_domains_of_a_rank_alternate(blocks, lengths):
    batches = by_domain(
        blocks, BalancedSampler(lengths, 7), 1, 2
    )  # holds domains 2 and 3, 8 of each
    assert batches.micro_steps == 8
    assert [batches[number]["domain"] for number in range(10)] == [2, 3] * 5


def test_content_of_a_batch(blocks, lengths):
    batches = dense(blocks, BalancedSampler(lengths, 7), 0, 1, micro_batch=8)
    mixed = seen_padding = 0
    for number in range(40):
        batch, (domains, indices) = batches[number], batches.select_blocks(number)
        rows = [
            blocks[d].gather_inputs_and_labels(np.array([i]))
            for d, i in zip(domains, indices, strict=True)
        ]
        assert torch.equal(batch["input_ids"], torch.cat([row[0] for row in rows]))
        assert torch.equal(batch["labels"], torch.cat([row[1] for row in rows]))
        assert batch["domains"].tolist() == domains.tolist() and batch["domain"] is None
        real = batch["labels"] != IGNORE
        assert batch["tokens"] == real.sum()
        assert ("attention_mask" in batch) == bool((~real).any())
        if "attention_mask" in batch:
            assert torch.equal(batch["attention_mask"], real)
            seen_padding += 1
        mixed += 1
    assert mixed == 40 and 0 < seen_padding < 40


def test_domain_tokens_in_mixed_batches(blocks, lengths):
    marked = [TokenBlocks(b.dataset, LENGTH + 1, 2, 1, 500 + d) for d, b in enumerate(blocks)]
    sampler = BalancedSampler(lengths, 7)
    plain, tokens = (dense(b, sampler, 0, 1, micro_batch=8) for b in (blocks, marked))
    for number in range(8):
        item, other = plain[number], tokens[number]
        for name in ("input_ids", "labels"):
            assert (other[name][:, 0] == 500 + other["domains"]).all()
            assert torch.equal(other[name][:, 1:], item[name])
        assert other["tokens"] == item["tokens"] + 8


def same(item: dict, other: dict) -> bool:
    return item.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in item.items()
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_batches(blocks, lengths, workers):
    batches = dense(blocks, BalancedSampler(lengths, 7), 1, 2)
    state = torch.get_rng_state()
    loader = iterate_train_batches(batches, 3, workers, pin_memory=False)
    result = list(itertools.islice(loader, 20))
    del loader
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        same(batch, batches[3 * batches.micro_steps + number])
        for number, batch in enumerate(result)
    )


def test_a_late_step_starts_immediately(blocks, lengths):
    """Opening files included."""
    start = time.perf_counter()
    opened = [TokenBlocks(IndexedDataset(b.dataset.prefix), LENGTH, 2, 1) for b in blocks]
    batches = dense(opened, BalancedSampler(lengths, 7), 0, 2)
    first = next(iterate_train_batches(batches, 1_000_000, 0, pin_memory=False))
    assert time.perf_counter() - start < 1
    again = dense(blocks, BalancedSampler(lengths, 7), 0, 2)
    list(itertools.islice(iterate_train_batches(again, 999_999, 0, False), again.micro_steps))
    assert same(first, again[1_000_000 * again.micro_steps])


def test_indivisible_batches_are_refused(blocks, lengths):
    sampler = BalancedSampler(lengths, 7)
    with pytest.raises(UserError) as caught:
        dense(blocks, sampler, 0, 4, micro_batch=3, global_batch=32)
    assert str(caught.value) == (
        "--global_batch_size 32: must be a multiple of 12 = 4 ranks x 3 samples of a "
        "micro-batch; the nearest is 24 or 36"
    )
    with pytest.raises(UserError, match=r"16 = 4 domains x 2 ranks of each x 2 sam.*16$"):
        by_domain(blocks, sampler, 0, 8, micro_batch=2, global_batch=8)
    with pytest.raises(UserError):
        dense(blocks, sampler, 0, 1, global_batch=0)
    with pytest.raises(IndexError):
        dense(blocks, sampler, 0, 1)[-1]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_reads_every_token_once(blocks, batch_size):
    law = blocks[0]
    batches = list(iterate_eval_batches(law, batch_size))
    labels = torch.cat([batch["labels"] for batch in batches]).flatten()
    assert labels[labels != IGNORE].tolist() == law.dataset.tokens.tolist()
    assert sum(batch["tokens"] for batch in batches) == law.total
    assert len(batches) == -(-25 // batch_size)
    assert ["attention_mask" in batch for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert torch.equal(batches[-1]["attention_mask"], batches[-1]["labels"] != IGNORE)
    assert len(list(iterate_eval_batches(law, batch_size, max_batches=1))) == 1


def test_evaluation_does_not_score_the_domain_token(blocks):
    marked = TokenBlocks(blocks[0].dataset, LENGTH + 1, 2, 1, 500)
    batches = list(iterate_eval_batches(marked, 8))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert (labels[:, 0] == IGNORE).all()
    assert all((batch["input_ids"][:, 0] == 500).all() for batch in batches)
    assert labels[labels != IGNORE].tolist() == marked.dataset.tokens.tolist()
    assert sum(batch["tokens"] for batch in batches) == marked.total
    assert batches[-1]["attention_mask"][:, 0].all()


def make_databin(folder: Path, header: bool) -> Path:
    """Domains b and a, 20 train tokens in 2 items; with our header or as fairseq leaves it."""
    domains = {}
    for name in ("b", "a"):
        (folder / name).mkdir(parents=True)
        domains[name] = {}
        for split, file in (
            ("train", "train"),
            ("valid", f"valid_{name}"),
            ("test", f"test_{name}"),
        ):
            with IndexedWriter(folder / name / file, np.uint16) as writer:
                writer.add_item(np.arange(4, 13))
                writer.add_item(np.array([*range(4, 14), 2]))
            domains[name][split] = {"items": 2, "tokens": 20, "bytes": 55, "max_id": 13}
    dictionary = Dictionary()
    for number in range(10):
        dictionary.add_symbol(f"w{number}", 1)
    dictionary.save(folder / "dict.txt")
    if header:
        output = {"format": 1, "tokenizer": {"kind": "gpt2", "digest": "x"}, "vocab_size": 14}
        output |= {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "items": "line"}
        (folder / "databin.json").write_text(json.dumps({**output, "domains": domains}))
    return folder


@pytest.mark.parametrize("header", [True, False])
def test_databin(tmp_path, header):
    databin = DataBin(make_databin(tmp_path / "bin", header))
    assert databin.domains == (("b", "a") if header else ("a", "b"))
    assert databin.vocab_size == 14
    assert databin.special_ids == {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    assert databin.open_split("b", "valid").tokens.tolist() == [*range(4, 13), *range(4, 14), 2]
    assert databin.get_text_bytes("a", "test") == (55 if header else 0)
    assert len(databin.open_blocks("a", "train", 16)) == 2
    assert len(databin.open_blocks("a", "train", 17, domain_token=14)) == 2
    assert len(databin.digest) == 64 and DataBin(databin.path).digest == databin.digest


@pytest.mark.parametrize("header", [True, False])
def test_databin_refusals(tmp_path, header):
    databin = DataBin(make_databin(tmp_path / "bin", header))
    with pytest.raises(UserError, match=f"'c' is not in .*holds {', '.join(databin.domains)}"):
        databin.open_split("c", "train")
    with pytest.raises(UserError, match="split 'dev': allowed are train, valid, test"):
        databin.open_split("a", "dev")
    with pytest.raises(UserError, match=r"--max_seq_length 21: domain a has 20 train tokens"):
        databin.open_blocks("a", "train", 21)
    assert len(databin.open_blocks("a", "valid", 21)) == 1
    with IndexedWriter(databin.path / "a" / "train", np.uint16) as writer:
        writer.add_item(np.array([5, 6, 14]))
    message = "holds 1 items, but .* says 2" if header else "id 14 at byte 4 .* vocabulary of 14"
    with pytest.raises(UserError, match=message):
        databin.open_split("a", "train")
    (databin.path / "a" / "train.idx").unlink()
    with pytest.raises(UserError, match=r"a/train\.idx: No such file"):
        databin.open_split("a", "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("eos_id"), "eos_id is missing"),
        (lambda h: h.update(format=2), "format: 2 is not one of 1"),
        (lambda h: h.update(vocab_size="14"), "vocab_size: '14' is not a whole number"),
        (lambda h: h.update(vocab_size=13), "max_id is 13, not below the vocabulary size 13"),
        (lambda h: h.update(pad_id=None), "pad_id: None is not a whole number"),
        (lambda h: h.update(domains={}), "domains: {} has fewer than 1 items"),
        (lambda h: h.update(domains=[1]), "domains: .1. is not `key: value` lines"),
        (lambda h: h["domains"].update({"../x": {}}), r"domains: '\.\./x' is not made of"),
        (lambda h: h["domains"]["a"]["train"].pop("tokens"), "domains.a.train.tokens is missing"),
        (lambda h: h["domains"]["a"].update(train=3), "train: 3 is not `key: value` lines"),
    ],
)
def test_malformed_headers(tmp_path, change, message):
    path = make_databin(tmp_path / "bin", True) / "databin.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))
    with pytest.raises(UserError, match=message) as caught:
        DataBin(path.parent)
    assert str(caught.value).startswith(str(path))


def test_fairseq_names_of_files(tmp_path):
    domains = make_databin(tmp_path / "bin", False)
    for split in ("valid", "test"):  # as fairseq-preprocess names them in every folder
        for ending in ("bin", "idx"):
            (domains / "a" / f"{split}_a.{ending}").rename(domains / "a" / f"{split}.{ending}")
    databin = DataBin(domains)
    expected = [*range(4, 13), *range(4, 14), 2]
    for domain, split in itertools.product("ab", ("train", "valid", "test")):
        assert databin.open_split(domain, split).tokens.tolist() == expected
    titles = [title for title, faults in check_databin(domains) if not faults]
    assert len(titles) == 7 and str(domains / "a" / "valid") in "".join(titles)
    # One domain without a folder of its own, under a name with a dot.
    shutil.copytree(domains / "a", tmp_path / "wiki.en")
    shutil.copy(domains / "dict.txt", tmp_path / "wiki.en")
    flat = DataBin(tmp_path / "wiki.en")
    assert (flat.domains, flat.vocab_size) == (("wiki_en",), 14)
    for split in ("train", "valid", "test"):
        assert flat.open_split("wiki_en", split).tokens.tolist() == expected
        assert flat.find_split_prefix("wiki_en", split) == tmp_path / "wiki.en" / split
    assert sum(not faults for _, faults in check_databin(flat.path)) == 4
    # The dictionary may lie in the folders of the domains only, if they share it.
    (domains / "dict.txt").rename(domains / "a" / "dict.txt")
    with pytest.raises(UserError, match=r"holds token files but no dict\.txt"):
        DataBin(domains)
    shutil.copy(domains / "a" / "dict.txt", domains / "b" / "dict.txt")
    assert DataBin(domains).vocab_size == 14
    (domains / "b" / "dict.txt").write_text("x 1\n")
    with pytest.raises(UserError, match=r"b/dict.txt differs from .*a/dict.txt"):
        DataBin(domains)


def test_not_a_databin(tmp_path):
    with pytest.raises(UserError, match=r"neither databin\.json nor token files"):
        DataBin(tmp_path)
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(UserError, match=r"neither databin\.json nor token files"):
        DataBin(tmp_path)
    bare = make_databin(tmp_path / "bare", False)
    shutil.copy(bare / "a" / "train.idx", bare / "train.idx")
    with pytest.raises(UserError, match=r"both in the folder \(train.idx\) and .*a/test_a"):
        DataBin(bare)
    lost = make_databin(tmp_path / "lost", False)
    (lost / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"was written by .*, but its databin.json is missing"):
        DataBin(lost)
    for content in (b"{", b"\xff", b"[]", b"null", b"[" * 100_000):
        (tmp_path / "databin.json").write_bytes(content)
        with pytest.raises(UserError, match=r"databin\.json"):
            DataBin(tmp_path)
