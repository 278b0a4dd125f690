"""Router rows from text: own experts come first, rows against a direct computation, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_hosts import VOCAB, tiny_stock
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix
from megamod.errors import UserError
from megamod.merging.moe.record import read_moe_record
from megamod.runs.edit_moe import EditArgs, run_edit
from megamod.runs.router_rows import compute_condition_number
from megamod.runs.to_moe import MoeArgs, run_to_moe

DOMAINS = ("law", "code", "art")
ROW = "model.layers.{}.block_sparse_moe.gate.weight"


def make_data(folder: Path, domains: tuple[str, ...] = DOMAINS) -> Path:
    """A data-bin; each domain has 12 ids of its own."""
    header = {"format": 1, "vocab_size": VOCAB, "items": "document", "domains": {}}
    header |= {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    generator = np.random.default_rng(0)
    for number, domain in enumerate(domains):
        ids = 4 + 12 * number + generator.integers(0, 12, 256)
        (folder / domain).mkdir(parents=True)
        with IndexedWriter(folder / format_split_prefix(domain, "valid"), np.uint16) as writer:
            writer.add_item(ids)
        header["domains"][domain] = {
            "valid": {"items": 1, "tokens": 256, "bytes": 1, "max_id": VOCAB - 1}
        }
    (folder / "databin.json").write_text(json.dumps(header))
    return folder


def make_models(folder: Path, domains: tuple[str, ...] = DOMAINS) -> list[str]:
    """Models whose states differ between the domains' ids."""
    torch.manual_seed(0)
    directions = torch.randn(len(domains), 16)
    for seed, domain in enumerate(domains):
        model = tiny_stock("llama", seed=seed)
        for number, direction in enumerate(directions):
            model.model.embed_tokens.weight.data[4 + 12 * number : 16 + 12 * number] += direction
        model.save_pretrained(folder / domain)
    return [str(folder / domain) for domain in domains]


def convert(tmp_path: Path, output: str = "moe", **flags: object) -> Path:
    run_to_moe(MoeArgs(output_dir=str(tmp_path / output), **{"quiet": True, **flags}))
    return tmp_path / output


def test_own_expert_comes_first(tmp_path, capsys):
    data = str(make_data(tmp_path / "data"))
    folder = convert(tmp_path, models=make_models(tmp_path), calibration=[data], quiet=False)
    record = read_moe_record(folder).router
    shares = torch.tensor(record["own_first"])
    assert shares.shape == (2, 3) and bool((shares >= 0.9).all())
    assert record["texts"]["law"]["tokens"] == 256
    printed = capsys.readouterr().out
    assert "share of each domain's tokens" in printed and f"{100 * shares[1, 2]:.1f} %" in printed


def test_rows_against_a_direct_computation(tmp_path):
    """Differences of mean inputs of the average's feed-forwards, scaled to the sharpness."""
    data, models = make_data(tmp_path / "data"), make_models(tmp_path)
    # The average of equal models is the model.
    flags = {"models": [models[0]] * 3, "domains": list(DOMAINS), "calibration": [str(data)]}
    rows = load_file(convert(tmp_path, sharpness=2.0, **flags) / "model.safetensors")
    model = tiny_stock("llama", seed=0)
    model.load_state_dict(load_file(Path(models[0]) / "model.safetensors"))
    inputs: list[list[torch.Tensor]] = [[], []]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda module, args, number=number: inputs[number].append(args[0].double())
        )
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for number in range(3):
            ids = 4 + 12 * number + generator.integers(0, 12, 256)
            model(torch.tensor(ids).view(8, 32))
    for number in range(2):
        fitted = [states[torch.arange(8) % 4 != 3].flatten(0, 1) for states in inputs[number]]
        means = torch.stack([states.mean(0) for states in fitted])
        means -= means.mean(0)
        held_out = torch.cat([states[torch.arange(8) % 4 == 3] for states in inputs[number]])
        spread = (held_out @ means.T).std(correction=0)
        expected = (2.0 / spread * means).float()
        assert float((rows[ROW.format(number)] - expected).abs().max()) <= 1e-5


def test_rows_without_centring_depend_on_their_own_domain(tmp_path):
    """The mixture without one expert has, bit for bit, the rows of the mixture with it."""
    data, models = make_data(tmp_path / "data"), make_models(tmp_path)
    flags = {"calibration": [str(data)], "no_centre": True, "weights": None}
    whole = load_file(convert(tmp_path, models=models, **flags) / "model.safetensors")
    less = convert(tmp_path, "less", models=models[:2], **flags)
    less = load_file(less / "model.safetensors")
    for number in range(2):
        row = ROW.format(number)
        assert torch.equal(whole[row][:2], less[row])
        assert torch.allclose(less[row].norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"calibration": ["law=x", "code=y"]}, "has no text of the domain 'art'"),
        ({"calibration": ["law", "code"]}, "give one data-bin, or DOMAIN=FILE"),
        ({"max_seq_length": 64}, "the model has 32 positions"),
        ({"calibration_tokens": 4}, "4 tokens are too few"),
        ({"sharpness": 0.0}, "must be above 0"),
    ],
)
def test_text_that_does_not_fit(tmp_path, flags, message):
    data, models = make_data(tmp_path / "data"), make_models(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(tmp_path, **{"models": models, "calibration": [str(data)], **flags})
    assert not (tmp_path / "moe").exists()


def test_rows_in_one_direction_are_reported(tmp_path, caplog):
    """Two domains with the same text have almost the same rows."""
    data, models = make_data(tmp_path / "data"), make_models(tmp_path)
    ids = np.full(256, 5)
    for domain in ("law", "code"):
        with IndexedWriter(data / format_split_prefix(domain, "valid"), np.uint16) as writer:
            writer.add_item(ids)
    convert(tmp_path, models=models, calibration=[str(data)])
    assert "fewer than by chance" in caplog.text or "condition number" in caplog.text


def test_condition_number():
    rows = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert compute_condition_number(rows, centred=False) == pytest.approx(4.0)
    centred = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert compute_condition_number(centred, centred=True) == pytest.approx(1.0)


def test_refreshed_row_is_the_only_change(tmp_path):
    """Of a mixture on disk one row is computed anew, with centring and without."""
    data, models = make_data(tmp_path / "data"), make_models(tmp_path)
    moe = convert(tmp_path, models=models, calibration=[str(data)])
    before = load_file(moe / "model.safetensors")
    for no_centre in (False, True):
        output = tmp_path / f"refreshed-{no_centre}"
        args = MoeArgs(
            output_dir=str(output), calibration=[str(data)], no_centre=no_centre, quiet=True
        )
        run_edit(args, EditArgs(base=str(moe), refresh="code"))
        after = load_file(output / "model.safetensors")
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        # Without centring the lengths differ; the input of the first layer's block is the same.
        assert set(changed) == {ROW.format(layer) for layer in ([0, 1] if no_centre else [1])}
        for name in changed:
            assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])
        refreshed = read_moe_record(output).router["refreshed"]
        assert refreshed["code"]["centre"] is not no_centre


def test_text_files_are_read_with_the_model_s_tokenizer(tmp_path):
    words = [f"w{number}" for number in range(VOCAB)]
    words[:4] = ["[UNK]", "[PAD]", "[SEP]", "[CLS]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    models = make_models(tmp_path)
    generator, flags = np.random.default_rng(0), []
    for number, domain in enumerate(DOMAINS):
        tokenizer.save_pretrained(tmp_path / domain)
        ids = 4 + 12 * number + generator.integers(0, 12, (16, 15))
        text = "\n".join(" ".join(words[i] for i in row) for row in ids)
        (tmp_path / f"{domain}.txt").write_text(text)
        flags.append(f"{domain}={tmp_path / domain}.txt")
    record = read_moe_record(convert(tmp_path, models=models, calibration=flags)).router
    assert [text["tokens"] for text in record["texts"].values()] == [256] * 3
    assert bool((torch.tensor(record["own_first"]) >= 0.9).all())
