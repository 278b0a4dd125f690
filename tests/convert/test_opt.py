import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_models import make_model
from transformers import AutoModelForCausalLM, OPTForCausalLM

from megamod.convert import ConvertOptions
from megamod.convert.opt import export
from megamod.errors import UserError
from megamod.models.lm.demix import DemixForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
LENGTH, PAD = 24, 1

WITHOUT_MEGAMOD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
told = json.loads(sys.stdin.read())
ids = torch.tensor(told)
with torch.no_grad():
    logits = model(ids, attention_mask=(ids != 1).long()).logits
assert not any(name.partition(".")[0] == "megamod" for name in sys.modules)
print(json.dumps([type(model).__name__, logits.tolist()]))
"""


def ids(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 23, (rows, length), generator=torch.Generator().manual_seed(5))


def both(folder: Path, tmp_path: Path, *domains: str):
    """Our model, and what was exported, in the stock class."""
    target = tmp_path / "opt"
    target.mkdir()
    export(folder, target, ConvertOptions(domains))
    ours = DemixForCausalLM.from_pretrained(folder).eval()
    if domains:
        ours.set_domain(domains[0])
    return ours, OPTForCausalLM.from_pretrained(target).eval()


@pytest.mark.parametrize(
    ("untie", "domains"),
    [
        ("none", ()),
        ("feedforward", ("code",)),
        ("feedforward_top", ("art",)),
        ("transformer", ("law",)),
        ("transformer_output", ("code",)),
        ("input_output", ("art",)),
    ],
)
@torch.no_grad()
def test_logits_and_generated_text_are_equal(tmp_path, untie, domains):
    folder = make_model(tmp_path / "ours", untie=untie, max_position_embeddings=LENGTH)
    ours, theirs = both(folder, tmp_path, *domains)
    plain = ids()
    torch.testing.assert_close(theirs(plain).logits, ours(plain).logits, rtol=0, atol=1e-5)

    for left, right in ((2, 0), (0, 3), (1, 1)):
        padded = plain.clone()
        padded[0, :left] = PAD
        padded[1, padded.shape[1] - right :] = PAD
        mask = (padded != PAD).long()
        expected = ours(padded, attention_mask=mask).logits
        result = theirs(padded, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(result[real], expected[real], rtol=0, atol=1e-5)

    prompt = plain[:, :5].clone()
    prompt[0, :2] = PAD
    more = dict(attention_mask=(prompt != PAD).long(), max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs.generate(prompt, **more), ours.generate(prompt, **more))


@torch.no_grad()
def test_the_folder_loads_where_megamod_is_not_imported(tmp_path):
    folder = make_model(tmp_path / "ours", max_position_embeddings=LENGTH)
    ours, _ = both(folder, tmp_path)
    padded = ids()
    padded[0, :3] = PAD
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT_MEGAMOD, str(tmp_path / "opt")],
        input=json.dumps(padded.tolist()),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    name, logits = json.loads(done.stdout)
    assert name == "OPTForCausalLM"
    real = padded != PAD
    expected = ours(padded, attention_mask=real.long()).logits
    torch.testing.assert_close(torch.tensor(logits)[real], expected[real], rtol=0, atol=1e-5)


def test_head_and_embeddings_are_two_tensors(tmp_path):
    folder = make_model(tmp_path / "ours", bos_token_id=3, pad_token_id=1, eos_token_id=4)
    ours, theirs = both(folder, tmp_path)
    tokens = ours.model.embeddings.tokens.weight
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.lm_head.weight, tokens)
    assert torch.equal(theirs.model.decoder.embed_tokens.weight, 4.0 * tokens)  # sqrt(16)
    special = ("bos_token_id", "pad_token_id", "eos_token_id")
    assert [getattr(theirs.config, name) for name in special] == [3, 1, 4]
    assert theirs.generation_config.eos_token_id == 4


def test_half_precision_stays_and_is_rounded_as_ours(tmp_path):
    make_model(tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    _, theirs = both(tmp_path / "ours", tmp_path)
    assert theirs.dtype == torch.bfloat16
    tokens = model.model.embeddings.tokens.weight
    assert torch.equal(theirs.model.decoder.embed_tokens.weight, 4.0 * tokens)


def test_what_opt_cannot_hold_is_refused(tmp_path):
    dense = make_model(tmp_path / "dense")
    demix = make_model(tmp_path / "demix", untie="feedforward")
    odd = make_model(tmp_path / "odd", layer_norm_eps=1e-6)
    for folder, domains, message in (
        (demix, (), "one of the experts of .*, which are art, code, law"),
        (demix, ("law", "art"), "OPT holds one"),
        (demix, ("cod",), "no expert of domain 'cod'"),
        (dense, ("law",), "has no experts to choose from"),
        (odd, (), "layer_norm_eps is 1e-06"),
        (tmp_path, (), "there is no model"),
    ):
        with pytest.raises(UserError, match=message):
            export(folder, tmp_path, ConvertOptions(domains))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"model\.layers\.2\.\S+ is missing"):
        export(dense, tmp_path)
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2'"):
        export(dense, tmp_path)


def test_the_command(tmp_path, monkeypatch):
    launcher = REPOSITORY / "launchers" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert_launcher", launcher)
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    folder = make_model(tmp_path / "demix", untie="feedforward")
    flags = ["--format", "opt", "--input", str(folder), "--domains", "law"]
    flags += ["--output_dir", str(tmp_path / "opt")]
    monkeypatch.setattr(sys, "argv", ["convert.py", *flags])
    with pytest.raises(UserError, match="with --export only"):
        convert.main()
    assert not (tmp_path / "opt").exists()
    monkeypatch.setattr(sys, "argv", ["convert.py", *flags, "--export"])
    convert.main()
    names = sorted(file.name for file in (tmp_path / "opt").iterdir())
    assert names == ["config.json", "manifest.json", "model.safetensors"]
