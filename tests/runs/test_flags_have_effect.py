"""Every flag of pretraining and adaptation changes the run that it describes, or is refused."""

import random
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from megamod.args import (
    DataArgs,
    LoraArgs,
    ModelArgs,
    MuxArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
)
from megamod.commands.pretrain import refuse_pretraining_flags_without_effect
from megamod.data.corpus.binarize import binarize
from megamod.errors import UserError
from megamod.flags import _parse_field_type, parse_args
from megamod.runs.pretrain import adapt_start, causal_lm, encoder_lm, encoder_vocabulary
from megamod.runs.pretrain.adapt_args import AdaptArgs
from megamod.states.forest import Expert, Forest
from megamod.train.deepspeed_settings import resolve_settings
from megamod.train.optim import make_optimizer_factory

CLASSES = (RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, MuxArgs, DataArgs)
SMALL = ("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2")
MASKED = (*SMALL, "--objective", "masked_lm", "--model", "small")
REPLACED = (*SMALL, "--objective", "replaced_token", "--model", "small")
MODES = {
    "dense": SMALL,
    "temperature": (*SMALL, "--sampler", "temperature"),
    "demix": (*SMALL, "--untie", "feedforward"),
    "warm-up": (*SMALL, "--warmup_steps", "3"),
    "masked": MASKED,
    "masked-mux": (*MASKED, "--num_instances", "2"),
    "masked-index": (*MASKED, "--num_instances", "2", "--demuxing_variant", "index"),
    "replaced": REPLACED,
    "replaced-mux": (*REPLACED, "--num_instances", "2"),
    "generated": (*REPLACED, "--num_instances", "2", "--generator", "plain"),
    "distilled": ("--objective", "distillation", "--model", "stock", "--num_instances", "2"),
}
# By name: further values to try. Of all others: other choices, the other truth, other numbers.
VALUES = {
    "model": ["base"], "domains": ["law"], "deepspeed": ["ds.json"], "untie": ["all"],
    "intermediate_size": ["40"], "hidden_size": ["64"], "num_attention_heads": ["1"],
    "num_instances": ["2", "4"], "max_seq_length": ["12"], "warmup_steps": ["5"],
    "global_batch_size": ["16"], "spike_factor": ["2.0"], "precision": ["bf16"],
    "stop_step": ["3"], "seed": ["2"], "attn_implementation": ["eager"], "warmup_ratio": ["0.5"],
    "lora_targets": ["q_proj"], "muxing_variant": ["binary_hadamard", "random_ortho"],
    "anchor": ["bin"], "teacher": ["deeper"],
}  # fmt: skip
# What these decide happens later, in code that is the same for every kind of run.
READ_LATER = {
    "output_dir", "data", "init_from", "resume", "report_to", "save_total_limit", "dist_timeout",
    "print_groups", "per_device_eval_batch_size", "eval_batches", "allow_unknown_ds_keys",
    "decay_norms_and_biases", "mask_documents", "verify_data",
}  # fmt: skip
ANY_MODE = (RunArgs, SafetyArgs, OptimArgs)  # read by what all modes share: tried in one mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text of two domains, one longer than the other, and a DeepSpeed file."""
    folder = tmp_path_factory.mktemp("flags")
    words = [f"w{number}" for number in range(800)]
    (folder / "tokenizer").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    random_ = random.Random(1)
    for domain, lines in (("law", 40), ("med", 400)):
        (folder / domain).mkdir()
        for split, share in (("train", 1), ("valid", 8), ("test", 10)):
            text = "\n\n".join(" ".join(random_.choices(words, k=9)) for _ in range(lines // share))
            (folder / domain / f"{split}.txt").write_text(text + "\n")
    inputs = {domain: folder / domain for domain in ("law", "med")}
    binarize(inputs, str(folder / "tokenizer"), folder / "bin", add_bos=True)
    for name, layers in (("stock", 1), ("deeper", 2)):
        shape = dict(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2)
        config = BertConfig(**shape, intermediate_size=40, vocab_size=len(vocabulary))
        BertModel(config).save_pretrained(folder / name)
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    return folder


def described(folder: Path, monkeypatch, flags: tuple[str, ...]) -> str:
    """All that decides the numbers of a run, as text."""
    fixed = ("--data", str(folder / "bin"), "--output_dir", "out", "--max_seq_length", "16")
    fixed += ("--per_device_train_batch_size", "4", "--max_steps", "9")
    parsed = parse_args(*CLASSES, argv=[*fixed, *flags])
    run, safety, model, lora, optim, mux, data = parsed
    refuse_pretraining_flags_without_effect(model, lora, mux, data, optim)
    seen = []

    def execute_run(recipe, parsed, **options):
        run, safety, optim = (next(a for a in parsed if isinstance(a, k)) for k in ANY_MODE)
        topology = recipe.topology
        settled = resolve_settings(run, optim, safety, topology, recipe.config.hidden_size)
        config, plan = settled.ds_config, settled.plan
        schedule = [plan.schedule(step) for step in range(run.max_steps)]
        batch = recipe.make_batches(settled.make_batch_division(0))
        torch.set_printoptions(threshold=10**6)
        shared = {key: value for key, value in vars(plan).items() if key != "schedule"}
        schedule.append(make_optimizer_factory(settled.optim).keywords)
        objective = vars(recipe.make_objective(torch.device("cpu")))
        objective = [re.sub(" at 0x[0-9a-f]+", "", str(value)) for value in objective.values()]
        config_text = recipe.config.to_dict(), recipe.config._attn_implementation
        seen.append(
            (config_text, recipe.card.format_text(), config, shared, schedule, objective, options)
        )
        seen.append([batch[number] for number in range(20)])

    for module in (causal_lm, encoder_lm):
        monkeypatch.setattr(module, "execute_run", execute_run)
    monkeypatch.setattr(
        encoder_vocabulary, "read_mask_id", lambda data: 4
    )  # reading a tokenizer takes long
    opened = []
    original = encoder_lm.DataBin.open_split
    monkeypatch.setattr(
        encoder_lm.DataBin, "open_split", lambda *a: opened.append(a[1:]) or original(*a)
    )
    if mux.objective == "causal_lm":
        causal_lm.pretrain_causal_lm(run, safety, model, lora, optim, data)
    else:
        encoder_lm.pretrain_encoder(run, safety, model, optim, mux, data)
    return repr((seen, opened))


def others(f, current: object) -> list[str]:
    """Values of a field besides the current one."""
    kind, choices, _ = _parse_field_type(f)
    if f.name in VALUES:
        return VALUES[f.name]
    if choices:
        return [choice for choice in choices if choice != current]
    if kind is bool:
        return [str(not current).lower()]
    if kind is int:
        return [str((current or 0) + 1)]
    if kind is float:
        return [str(current / 2 if current else 0.5)]
    return []


@pytest.mark.parametrize("mode", MODES)
def test_a_flag_changes_the_run_or_is_refused(folder, monkeypatch, mode):
    monkeypatch.chdir(folder)
    flags, base = MODES[mode], None
    parsed = parse_args(*CLASSES, argv=list(flags))
    base = described(folder, monkeypatch, flags)
    assert base == described(folder, monkeypatch, flags)
    tried = 0
    for args in parsed:
        if isinstance(args, ANY_MODE) and mode not in ("dense", "warm-up"):
            continue
        for f in fields(args):
            if f.name in READ_LATER or (f.name == "objective"):
                continue
            if (mode, f.name) == ("distilled", "from_scratch"):
                continue  # decides about weights, which are not described
            values = others(f, getattr(args, f.name))
            assert values, f.name
            for value in values:
                if str(getattr(args, f.name)) == value:
                    continue
                tried += 1
                try:
                    text = described(folder, monkeypatch, (*flags, f"--{f.name}", value))
                except UserError as error:
                    assert f.name in str(error), (f.name, value, str(error))
                    continue
                assert text != base, f"--{f.name} {value} is ignored"
    assert tried > 20


def test_flags_that_are_read_later_are_read():
    root = Path(adapt_start.__file__).parents[2]
    text = "".join(p.read_text() for name in ("train", "runs") for p in (root / name).rglob("*.py"))
    for name in READ_LATER:
        assert re.search(rf"\.{name}\b", text), name


def test_run_yaml_of_any_mode_is_accepted(folder, monkeypatch):
    """A run is repeated from its run.yaml, where every field stands, and none is refused."""
    from megamod.run_recipe import write_run_recipe

    monkeypatch.chdir(folder)
    for mode, flags in MODES.items():
        before = described(folder, monkeypatch, flags)
        argv = ["--data", "bin", "--output_dir", "out", "--max_seq_length", "16", *flags]
        write_run_recipe(folder / "run.yaml", *parse_args(*CLASSES, argv=argv))
        again = parse_args(*CLASSES, argv=[str(folder / "run.yaml")])
        refuse_pretraining_flags_without_effect(*again[2:4], *again[5:], again[4])
        assert before, mode


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (("--start", "law"), True),
        (("--prior", "prior.json"), True),
        ((), False),
        (("--forest", "none", "--model", "dense"), True),
    ],
)
def test_adaptation_does_not_ignore_prior_sequences(flags, refused):
    argv = ["--forest", "forest", "--prior_sequences", "7", *flags]
    if refused:
        with pytest.raises(UserError, match="--prior_sequences 7 has no effect"):
            parse_args(AdaptArgs, argv=argv)
    else:
        parse_args(AdaptArgs, argv=argv)


@pytest.mark.parametrize("flag", ["prior", "prior_sequences"])
def test_a_forest_of_one_needs_no_prior(monkeypatch, flag):
    forest = Forest(Path("forest"), (Expert(domain="law", path=Path("law")),))
    monkeypatch.setattr(adapt_start, "open_forest", lambda path: forest)
    (args,) = parse_args(AdaptArgs, argv=["--forest", "forest", f"--{flag}", "7"])
    with pytest.raises(UserError, match=f"--{flag} 7 has no effect: forest has a single expert"):
        adapt_start.open_forest_of_candidates(args)
