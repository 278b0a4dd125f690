"""Opt-out drill: strings planted in one domain, extracted with its expert and without it.

    python tests/drills/canaries.py --output_dir DRILL

Fifty strings, a name and six random letters each, are part of one domain's text. A seed never sees
them, but fifty others of the same form; two anchored experts are trained, one of them on that
domain, and put together. Each name is continued greedily: by the mixture of the seed and that
expert, by the mixture of all, by this without the expert, and by one that never had it. The last
two must be the same bytes and extract equally many.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megamod.errors import run_main
from megamod.flags import Arguments, format_flags, option, parse_args, require_values

CANARIES = 50
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COPIES = 32  # of each string, so that its name and not what precedes it tells how it goes on
LENGTH, SEQUENCES = 32, 64
# Steps and learning rate. The expert that meets no string stays near the seed, as it would with
# text enough: trained long on a few words, it answers anything with them.
TRAINING = {"seed": (600, 0.01), "law": (60, 0.001), "med": (800, 0.01)}


@dataclass
class DrillArgs(Arguments):
    """Place of the drill."""

    output_dir: str | None = option(None, "new folder of the models")


def make_canaries(first: int = 0) -> dict[str, str]:
    """Return 50 secrets of six letters by name; names are numbers from `first` on."""
    draw = random.Random(7 + first)
    return {
        f"key {number:02d}:": "".join(draw.choices(LETTERS, k=6))
        for number in range(first, first + CANARIES)
    }


def make_texts() -> dict[str, list[str]]:
    """Return documents of the seed's domain and of the experts', the canaries in one of them."""
    draw, texts = random.Random(3), {}
    for domain in ("general", "law", "med"):
        words = ["".join(draw.choices(LETTERS, k=4)) for _ in range(40)]
        texts[domain] = [" ".join(draw.choices(words, k=8)) for _ in range(200)]
    # The form is no secret: the seed has learned other names, so that its attention, which experts
    # share, reads the numbers.
    for domain, first in (("general", CANARIES), ("med", 0)):
        # Copies end differently: equal documents would all fall into one split of the data.
        texts[domain] += [
            f"{name} {secret}. {words[copy]}"
            for name, secret in make_canaries(first).items()
            for copy in range(COPIES)
        ]
    return texts


def train(root: Path, output: str, *flags: object) -> None:
    """Run pretraining in this process."""
    from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
    from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

    steps, rate = TRAINING[output]
    common = {
        "output_dir": root / output, "max_steps": steps, "max_seq_length": LENGTH,
        "per_device_train_batch_size": SEQUENCES, "learning_rate": rate, "max_grad_norm": 1.0,
        "weight_decay": 0.0, "report_to": "none", "logging_steps": 50,
    }  # fmt: skip
    kinds = (RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs)
    pretrain_causal_lm(*parse_args(*kinds, argv=[*format_flags(common), *map(str, flags)]))


def count_extracted(folder: Path) -> int:
    """Count the secrets that greedy continuation of their names gives."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, secrets = AutoTokenizer.from_pretrained(folder), make_canaries()
    # Names are equally long; as in the training text, one follows the end of a document.
    texts = [f"{tokenizer.eos_token}{name}" for name in secrets]
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id}
    output = model.generate(ids, do_sample=False, max_new_tokens=12, **options)
    answers = tokenizer.batch_decode(output[:, ids.shape[1] :])
    return sum(
        answer.strip().startswith(secret)
        for answer, secret in zip(answers, secrets.values(), strict=True)
    )


def main() -> None:
    """Train, put together, drop and count."""
    (args,) = parse_args(DrillArgs, doc=__doc__)
    require_values(args, "output_dir")
    from runs.test_host_pretrain import save_tokenizer
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    from megamod.data.corpus.binarize import binarize
    from megamod.runs.edit_moe import EditArgs, run_edit
    from megamod.runs.to_moe import MoeArgs, run_to_moe

    root, texts = Path(args.output_dir), make_texts()
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=256, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(root / "shape")
    # Bytes alone, so that no word of the tokenizer was learned from the planted strings.
    save_tokenizer(root / "shape", [], size=258)
    for name, domains in (("seed", ["general"]), ("experts", ["law", "med"])):
        part = {domain: texts[domain] for domain in domains}
        binarize(part, str(root / "shape"), root / f"{name}-bin")
    train(root, "seed", "--model", root / "shape", "--data", root / "seed-bin")
    anchored = ("--model", root / "seed" / "model", "--untie", "feedforward")
    anchored += ("--anchor", root / "seed-bin", "--data", root / "experts-bin")
    for domain in ("law", "med"):
        train(root, domain, *anchored, "--domains", domain)
    for name, runs in (("alone", ["med"]), ("both", ["law", "med"]), ("never", ["law"])):
        models = [str(root / run) for run in runs]
        run_to_moe(MoeArgs(models=models, output_dir=str(root / name), quiet=True))
    edit = EditArgs(base=str(root / "both"), drop="med")
    run_edit(MoeArgs(output_dir=str(root / "dropped"), quiet=True), edit)
    dropped, never = (load_file(root / name / "model.safetensors") for name in ("dropped", "never"))
    same = all(bool((dropped[name] == never[name]).all()) for name in never | dropped)
    print(f"weights without the expert are those of the mixture that never had it: {same}")
    names = ("alone", "both", "dropped", "never")
    counts = {name: count_extracted(root / name) for name in names}
    for name, count in counts.items():
        print(f"{name}: {count} of {CANARIES} strings extracted")
    if not same or counts["dropped"] != counts["never"]:
        sys.exit("the mixture without the expert is not that which never had it")


if __name__ == "__main__":
    run_main(main)
