import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import run_launcher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForPreTraining

import megamod  # noqa: F401  (makes the models known)
from megamod.convert import FORMATS
from megamod.errors import UserError
from megamod.models.mux.bert import MuxBertForMaskedLM
from megamod.models.mux.configuration import MuxBertConfig

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY.parent / "shared" / "golden" / "demix_btm"
LAUNCHER = REPOSITORY / "launchers" / "convert.py"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"recorded tensors are not at {GOLDEN}"
)


launch = functools.partial(run_launcher, "convert", "--format", "fairseq_lm")


def convert_here(monkeypatch, *arguments: object) -> str:
    """The command in this process, which saves the time to load torch; its error message."""
    spec = importlib.util.spec_from_file_location("convert_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    argv = [str(LAUNCHER), "--format", "fairseq_lm", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        launcher.main()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The two recorded models, converted by the command."""
    folder = tmp_path_factory.mktemp("converted")
    for name, more in (("dense_lm", ()), ("demix_lm", ("--domains", "law", "med"))):
        done = launch("--input", GOLDEN / name, "--output_dir", folder / name, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == "used      36 tensors"
    return folder


def log_probs(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    picked = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return picked * (target != 1)


@needs_golden
@torch.no_grad()
def test_dense_model_gives_the_recorded_values(golden):
    io = load_file(GOLDEN / "dense_lm" / "io.safetensors")
    model = AutoModelForCausalLM.from_pretrained(golden / "dense_lm").eval()
    assert next(model.parameters()).dtype == torch.float32
    target = io["target"]
    output = model(io["src_tokens"], output_hidden_states=True)

    def close(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    close(output.logits[:, :8], io["logits_first8"])
    recorded = io["target_logprobs"] * (target != 1)
    close(log_probs(output.logits, target), recorded)
    real = (io["src_tokens"] != 1)[..., None]
    for state, name in zip(output.hidden_states, ("embed", "layer0", "layer1"), strict=True):
        recorded_state = io[f"hidden_after_{name}"]
        if name == "layer1":  # the last state is that after the final norm, as in GPT-2
            recorded_state = model.model.final_norm(recorded_state)
        close(state * real, recorded_state * real)
    scored = model(io["src_tokens"], shift_labels=target.where(target != 1, -100))
    close(scored.token_log_probs, recorded)
    real_tokens = int((target != 1).sum())
    close(scored.loss * real_tokens / io["nll_sum"][0], torch.tensor(1.0))


@needs_golden
@torch.no_grad()
def test_demix_model_gives_the_recorded_values_for_each_expert(golden):
    io = load_file(GOLDEN / "demix_lm" / "io.safetensors")
    model = AutoModelForCausalLM.from_pretrained(golden / "demix_lm").eval()
    for expert, domain in enumerate(("law", "med")):
        logits = model(io["src_tokens"], domain=domain).logits
        for ours, name in (
            (logits[:, -1], "logits_last"),
            (log_probs(logits, io["target"]), "target_logprobs"),
        ):
            theirs = io[f"{name}_expert{expert}"]
            if name == "target_logprobs":
                theirs = theirs * (io["target"] != 1)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@needs_golden
def test_export_returns_the_recorded_files(golden, tmp_path):
    for name in ("dense_lm", "demix_lm"):
        done = launch("--export", "--input", golden / name, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        files = [file for file in (tmp_path / name).iterdir() if file.suffix == ".safetensors"]
        assert len(files) == {"dense_lm": 1, "demix_lm": 3}[name]
        for file in files:
            original = load_file(GOLDEN / name / file.name)
            original.pop("decoder.version", None)
            written = load_file(file)
            assert written.keys() == original.keys()
            assert all(torch.equal(written[key], original[key]) for key in original)


@needs_golden
def test_half_precision_in_a_pickle_becomes_float32_or_what_is_asked_for(tmp_path, monkeypatch):
    state = load_file(GOLDEN / "dense_lm" / "model.safetensors")
    half = {key: tensor.half() for key, tensor in state.items()}
    cfg = {"model": {"decoder_attention_heads": 4}}
    torch.save({"cfg": cfg, "model": half}, tmp_path / "checkpoint_last.pt")
    for dtype, flags in ((torch.float32, ()), (torch.bfloat16, ("--dtype", "bfloat16"))):
        out = tmp_path / str(dtype)
        assert convert_here(monkeypatch, "--input", tmp_path, "--output_dir", out, *flags) == ""
        written = load_file(out / "model.safetensors")["model.layers.0.feed_forward.fc1.weight"]
        assert written.dtype == dtype
        assert torch.equal(written, half["decoder.layers.0.fc1.weight"].to(dtype))
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype)[6:]


class Hostile:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_ends_with_exit_2_and_leaves_nothing(tmp_path, zipped):
    inside = tmp_path / "in"
    inside.mkdir()
    content = {"model": {"decoder.version": Hostile(tmp_path / "canary")}}
    torch.save(content, inside / "checkpoint_last.pt", _use_new_zipfile_serialization=zipped)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(LAUNCHER), "--format", "fairseq_lm", "--input", str(inside)]
    command += ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10  # seconds
    assert done.returncode == 2
    assert done.stderr.startswith("UserError: ") and "names posix.system" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_mistake_is_one_message_and_exit_2(tmp_path, monkeypatch):
    wide = {"decoder.embed_tokens.weight": torch.ones(3, 4)}
    save_file(wide, tmp_path / "model.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    before = sorted(tmp_path.rglob("*"))
    done = launch("--input", tmp_path, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("UserError: ") and done.stderr.count("\n") == 1
    assert "decoder.embed_positions.weight is missing" in done.stderr
    for arguments, message in (
        (("--output_dir", tmp_path / "full", "--export"), "full: exists already"),
        (("--output_dir", tmp_path / "out", "--export"), "there is no model (no config.json)"),
    ):
        assert message in convert_here(monkeypatch, "--input", tmp_path, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@needs_golden
def test_names_and_values_are_checked_before_anything_is_written(tmp_path, monkeypatch):
    for domains, message in (
        (("law", "a.b"), "domain 'a.b'"),
        (("law", "law"), "domain 'law' is named twice"),
    ):
        flags = ("--input", GOLDEN / "demix_lm", "--output_dir", tmp_path / "out")
        assert message in convert_here(monkeypatch, *flags, "--domains", *domains)
    state = load_file(GOLDEN / "dense_lm" / "model.safetensors")
    state["decoder.layer_norm.weight"][0] = 1e6
    save_file(state, tmp_path / "model.safetensors")
    flags = ("--input", tmp_path, "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    message = convert_here(monkeypatch, *flags, "--dtype", "float16")
    assert "model.final_norm.weight holds values that are not finite in float16" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_help_lists_the_formats_without_loading_torch():
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(LAUNCHER)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert output.rstrip().endswith("[]")
    assert "--format {" + ",".join(FORMATS) + "}" in output


@pytest.mark.parametrize("way", [(), ("--export",)])
def test_tokenizers_travel_in_both_directions(tmp_path, monkeypatch, way):
    """A MultiBERT keeps its words; transformers would make an empty tokenizer without vocab.txt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    if way:
        model, name = MuxBertForMaskedLM(MuxBertConfig(**TINY, vocab_size=800)), "datamux"
    else:
        model, name = BertForPreTraining(BertConfig(**TINY, vocab_size=len(words))), "hf_bert"
    model.save_pretrained(tmp_path / "there")
    (tmp_path / "there" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "there" / "optimizer.pt").write_bytes(b"")  # nothing else is copied
    arguments = ("--format", name, "--input", tmp_path / "there", "--output_dir", tmp_path / "here")
    assert convert_here(monkeypatch, *arguments, *way) == ""
    files = {file.name for file in (tmp_path / "here").iterdir()}
    assert files == {"config.json", "model.safetensors", "vocab.txt", "manifest.json"}
    if not way:
        assert AutoTokenizer.from_pretrained(tmp_path / "here")("b a")["input_ids"] == [2, 6, 5, 3]
