"""Options of an alignment: the `align:` block of a recipe."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megamod.documents import Document, Items, Number
from megamod.merging.alignment.matching import ATTENTION

METHODS = ("activation", "ot", "weight", "identity")
BY_TEXT = ("activation", "ot")
"""Methods that run models on calibration text."""
GROUPS = ("ff", "attn", "res")
RESIDUAL = ("first", "last", "all", "sep")
SENTENCE_LEVELS = ("none", "cls", "maxpool", "avgpool")
_Positive = Annotated[Number, Field(gt=0)]


class Compat(Document):
    """Defects of the program of Verma and Elbayad 2024, to reproduce its results; all off.

    Attributes:
        scale: multiply weights that produce permuted features by 2 / (2 + 1e-5), in both models.
        unmerge: apply the permutation of the residual stream to the tied output matrix twice
            instead of undoing it.
        res_attn_without_embeddings: with the groups res and attn alone, do not permute embeddings
            and the weights that read them first.
        pooler_by_tokens: divide the moments of pooled features by the number of tokens.
        cls_at_one: sentence level `cls` takes position 1.
        stacked: correlations in the arithmetic of the program, see `CrossCovariance`.
    """

    scale: bool = False
    unmerge: bool = False
    res_attn_without_embeddings: bool = False
    pooler_by_tokens: bool = False
    cls_at_one: bool = False
    stacked: bool = False


class Calibration(Document):
    """Calibration text.

    Attributes:
        path: text file with an item per line, or JSON lines with the key "text".
        fraction: of its items; above 1 items are repeated.
        batch_size: items per forward pass.
        special_tokens: count the first and the last token of an item.
        sentence_level: "cls", "maxpool" and "avgpool" give one row of features per item.
    """

    path: str | None = None
    fraction: _Positive = 1.0
    batch_size: int = Field(8, ge=1)
    special_tokens: bool = True
    sentence_level: Literal[SENTENCE_LEVELS] = "none"


class Options(Document):
    """Options of an alignment.

    Attributes:
        method: "activation" (correlations on calibration text), "ot" (the same with soft
            assignments, which changes the function of the model), "weight" (from weights alone) or
            "identity".
        regularisation: softness of "ot".
        groups: families that are permuted: "ff", "attn", "res".
        attention: see `matching.ATTENTION`.
        residual: statistics that the permutation of the residual stream comes from: "first" or
            "last" norm, or the mean over "all"; "sep": one permutation per norm, which changes the
            function of the model.
        qk: permute queries and keys within heads separately from values.
        absolute: match by absolute correlations.
        covariance: match by covariances instead of correlations.
        head: permute the features of output heads too.
        head_follow_residual: permute the features of a masked-LM head like the residual stream, so
            that its matrix stays tied to the embeddings. Otherwise the permuted model has an output
            matrix of its own.
        calibration: text for "activation" and "ot".
        seed: of the order of groups with "weight".
        compat: defects of the original program.
    """

    method: Literal[METHODS] = "activation"
    groups: Items[Literal[GROUPS]] = GROUPS
    attention: Literal[ATTENTION] = "head_perm"
    residual: Literal[RESIDUAL] = "first"
    qk: bool = False
    absolute: bool = False
    covariance: bool = False
    head: bool = False
    head_follow_residual: bool = True
    calibration: Calibration = Calibration()
    seed: int = 0
    compat: Compat = Compat()
    regularisation: _Positive = 0.1

    @model_validator(mode="after")
    def _check(self) -> "Options":
        if not (self.groups or self.head):
            raise ValueError("groups: is empty; name at least one of ff, attn, res")
        if self.method == "ot" and self.compat.unmerge:
            raise ValueError("compat.unmerge: goes with permutations, not with method ot")
        return self


def list_unused_keys(options: Options) -> list[str]:
    """List keys with a value other than the default that have no effect with the other options.

    A record of an alignment holds all keys, so only documents that people write are checked.
    """
    by_text, permuting = options.method in BY_TEXT, options.method != "identity"
    groups, compat, text = set(options.groups), options.compat, options.calibration
    effective = {
        "groups": permuting or compat.scale,
        "attention": permuting and "attn" in groups,
        "residual": "res" in groups and (by_text or options.residual == "sep"),
        "qk": permuting and "attn" in groups,
        "absolute": by_text,
        "covariance": by_text,
        "head": permuting or compat.scale,
        "head_follow_residual": permuting and "res" in groups,
        "seed": options.method == "weight",
        "regularisation": options.method == "ot",
        "calibration.path": by_text,
        "calibration.fraction": by_text,
        "calibration.batch_size": by_text,
        "calibration.special_tokens": by_text and text.sentence_level != "cls",
        "calibration.sentence_level": by_text,
        "compat.scale": True,
        "compat.unmerge": permuting and "res" in groups,
        "compat.res_attn_without_embeddings": permuting and groups == {"attn", "res"},
        "compat.pooler_by_tokens": by_text and options.head,
        "compat.cls_at_one": by_text and text.sentence_level == "cls",
        "compat.stacked": by_text,
    }
    defaults, unused = Options(), []
    for key, used in effective.items():
        value, default = options, defaults
        for part in key.split("."):
            value, default = getattr(value, part), getattr(default, part)
        if value != default and not used:
            unused.append(key)
    return unused


def _refuse_unused(options: Options) -> Options:
    if unused := list_unused_keys(options):
        raise ValueError(
            f"{unused[0]} has no effect with method {options.method} and groups "
            f"{', '.join(options.groups) or 'none'}; leave it out"
        )
    return options


EffectiveOptions = Annotated[Options, AfterValidator(_refuse_unused)]
"""Schema of documents that people write: keys without effect are refused, too."""
