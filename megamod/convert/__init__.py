"""Convert checkpoints of the original programs and back: one module per format.

A format is a key of `FORMATS` and a module of that name in this package, with one or both of
    convert(source: Path, options: ConvertOptions) -> ConvertedModel
    export(source: Path, folder: Path, options: ConvertOptions) -> list[Path]
`convert` reads a checkpoint and writes nothing. `export` writes its files into `folder`, which
exists, and returns their paths. Both raise UserError for what they cannot convert.
"""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` lists the formats, and torch takes seconds to load
    from torch import Tensor

FORMATS = {
    "ca_mtl": "CA-MTL: many tasks on a conditional BERT; --tasks names them",
    "datamux": "multiplexed encoders: MUX-BERT, MUX-ELECTRA, DataMUX on RoBERTa",
    "expert": "one expert of a model with experts, as an ordinary dense model; --domains names it",
    "fairseq_lm": "causal language models of fairseq: dense, one expert (ELM), or DEMix",
    "hf_bert": "BERT of transformers as published: MultiBERTs, old names, finetuned heads",
    "opt": "OPTForCausalLM of transformers, for use without megamod (with --export only)",
}


@dataclass(frozen=True)
class ConvertOptions:
    """Facts about a checkpoint that its weights do not contain.

    Attributes:
        domains: names of the experts in rank order; for a dense model, its training domain; for an
            export to one dense model, the expert to export; for CA-MTL, names of the tasks.
        num_attention_heads: heads per layer; None: as the checkpoint's settings say.
    """

    domains: tuple[str, ...] = ()
    num_attention_heads: int | None = None


NO_OPTIONS = ConvertOptions()
"""Options of a checkpoint whose weights and settings contain everything."""


@dataclass
class ConvertedModel:
    """A converted model as plain data, with a report on the tensors and fields of the original.

    Attributes:
        config: fields of its config.json, `model_type` and `architectures` included.
        state: tensors by our names, tied ones once, in the dtype they are stored in.
        used: keys of the original that went into `state`.
        dropped: skipped keys of the original, with the reason. "config.json: NAME" is a field.
        missing: optional keys and fields that the original lacks, with their replacement.
    """

    config: dict[str, object]
    state: dict[str, "Tensor"]
    used: list[str]
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def format_report(self) -> str:
        """Format the number of used tensors, then a line for each dropped and missing key."""
        lines = [f"used      {len(self.used)} tensors"]
        for title, keys in (("dropped", self.dropped), ("missing", self.missing)):
            lines += [f"{title:<10}{key}: {why}" for key, why in keys.items()] or [
                f"{title:<10}none"
            ]
        return "\n".join(lines)


def import_format(name: str) -> ModuleType:
    """Import the module of the format `name`, a key of `FORMATS`; it has `convert` or `export`."""
    return importlib.import_module(f"{__name__}.{name}")
