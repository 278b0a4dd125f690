"""A damaged data-bin is refused when it is opened, or at the batch that holds the damage."""

import json
import shutil

import numpy as np
import pytest

from megamod.data.batches import BatchDivision
from megamod.data.corpus import indexed
from megamod.data.corpus.binarize import binarize
from megamod.data.corpus.indexed import IndexedDataset, IndexedWriter
from megamod.data.lm import databin
from megamod.data.lm.databin import DataBin
from megamod.data.lm.pretraining import LmData
from megamod.data.lm.verify import check_databin
from megamod.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    text = "\n\n".join(f"the law of number {n} says {n * n} things" for n in range(900))
    (folder / "law.txt").write_text(text)
    binarize({"law": folder / "law.txt"}, "sentencepiece:300", folder / "out", workers=1)
    return folder / "out"


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def change(file, at: int, bits: int = 4) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= bits
    file.write_bytes(content)


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_a_flipped_bit_is_noticed_before_the_first_step(copy):
    """A flip inside the vocabulary, as 0 and 4 are both ids: only a digest can tell."""
    change(copy / "law" / "train.bin", 100)
    assert "from byte 0 on do not have their digest" in refused(
        DataBin(copy).open_split, "law", "train"
    )
    assert "does not have the digest" in refused(DataBin(copy, "full").open_split, "law", "train")
    assert len(DataBin(copy, "size").open_split("law", "train"))
    assert len(DataBin(copy).open_split("law", "valid"))
    faults = [fault for _, faults in check_databin(copy) for fault in faults]
    assert [fault for fault in faults if "train.bin" in fault]


@pytest.mark.parametrize(
    ("file", "at"),
    [
        ("databin.json", 40),
        ("databin.json", -60),
        ("dict.txt", 5),
        ("law/dict.txt", 5),
        ("tokenizer/tokenizer.json", 300),
        ("tokenizer/sentencepiece.model", 300),
        ("law/train.idx", -1),
    ],
)
def test_every_file_has_a_digest(copy, file, at):
    change(copy / file, at)

    def open_all():
        DataBin(copy).open_split("law", "train")

    assert copy.name in refused(open_all)
    assert [fault for _, faults in check_databin(copy) for fault in faults]


def test_many_blocks_are_sampled_and_divided_among_ranks(copy, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 512)
    monkeypatch.setattr(databin, "BLOCK_BYTES", 512)
    file, header = copy / "law" / "train.bin", copy / "databin.json"
    content = json.loads(header.read_text())
    content["domains"]["law"]["train"]["blocks"] = indexed.compute_block_digests(file)
    del content["digest"], content["files"]  # as a data-bin of an earlier version has none
    header.write_text(json.dumps(content))
    count = -(-file.stat().st_size // 512)
    assert count > 2 * databin.SAMPLE_BLOCKS
    seen = []
    check = databin.check_blocks
    monkeypatch.setattr(databin, "check_blocks", lambda *args: (seen.append(args[2]), check(*args)))
    for part in range(4):
        DataBin(copy, share=(part, 4)).open_split("law", "train")
    assert [len(numbers) for numbers in seen] == [4] * 4
    assert all(number % 4 == part for part, of in enumerate(seen) for number in of)
    change(file, 512 * 7 + 3)
    monkeypatch.setattr(databin, "SAMPLE_BLOCKS", count)
    for part in range(3):
        assert len(DataBin(copy, share=(part, 4)).open_split("law", "train"))
    message = refused(DataBin(copy, share=(3, 4)).open_split, "law", "train")
    assert f"from byte {512 * 7} on" in message


def test_ids_are_checked_as_batches_are_read(copy):
    file = copy / "law" / "train.bin"
    vocabulary = DataBin(copy).vocab_size
    tokens = np.fromfile(file, np.uint16)
    tokens[70] = vocabulary
    tokens.tofile(file)
    data = LmData(str(copy), domains=None, block_size=16, domain_token=False, verify="size")
    batches = data.build_train_batches(
        BatchDivision(4, 4, 0, 1), sampler="balanced", alpha=1.0, seed=1
    )

    def epoch():
        for number in range(len(data.train_blocks[0]) // 4 + 1):
            batches[number]

    where = f"train.bin: token id {vocabulary} at byte 140 "
    assert where in refused(epoch)
    assert where in refused(lambda: list(data.iterate_eval_batches("law", "train", 3, 0)))
    assert len(list(data.iterate_eval_batches("law", "train", 1, 4))) == 4


def test_negative_ids_and_workers(tmp_path):
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_item(np.array([5, 6, -1, 2], np.int32))
    dataset = IndexedDataset(tmp_path / "a", 7, scan=False)
    kind, arguments = dataset.__reduce__()
    for opened in (dataset, kind(*arguments)):
        opened.check_read_ids(opened.tokens[:2], 0)
        assert "token id -1 at byte 8" in refused(opened.check_read_ids, opened.tokens[1:], 1)


def test_a_header_that_cannot_be_read_is_no_fairseq_folder(copy):
    (copy / "databin.json").unlink()
    (copy / "databin.json").symlink_to("databin.json")
    assert "databin.json" in refused(DataBin, copy)
