"""Options of an alignment: the `align:` block of a recipe."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megamod.merging.alignment.matching import ATTENTION
from megamod.schemas import Items, Number, Schema

METHODS = ("activation", "ot", "weight", "orthogonal", "identity")
BY_TEXT = ("activation", "ot")
"""Methods that run models on calibration text."""
BY_TEXT_OR_WEIGHTS = "orthogonal"
"""Method that runs models if there is text."""
GROUPS = ("ff", "attn", "res")
"""Families of groups: features of feed-forwards, of attention heads, and of the residual stream."""
RESIDUAL = ("first", "last", "all", "sep")
SENTENCE_LEVELS = ("none", "cls", "maxpool", "avgpool")
_Positive = Annotated[Number, Field(gt=0)]


class CompatOptions(Schema):
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


class Calibration(Schema):
    """Calibration text.

    Attributes:
        path: text file with an item per line, or JSON lines with the key "text".
        fraction: fraction of its items; above 1 items are repeated.
        batch_size: items per forward pass.
        special_tokens: count the first and the last token of an item.
        sentence_level: "cls", "maxpool" and "avgpool" give one row of features per item.
    """

    path: str | None = None
    fraction: _Positive = 1.0
    batch_size: int = Field(8, ge=1)
    special_tokens: bool = True
    sentence_level: Literal[SENTENCE_LEVELS] = "none"


class AlignmentOptions(Schema):
    """Options of an alignment.

    Attributes:
        method: "activation" (correlations on calibration text), "ot" (the same with soft
            assignments, which changes the function of the model), "weight" (from weights alone),
            "orthogonal" (orthogonal maps beside permutations, from text and weights, or from
            weights alone if there is no text) or "identity".
        regularisation: softness of "ot", see `transport_features`.
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
        calibration: text for "activation", "ot" and "orthogonal".
        refine_steps: steps of gradient descent on the loss half way between the models, which
            refine the maps of "orthogonal".
        maps: folder that keeps the maps of "orthogonal" under a digest of models, text and options;
            they are read from it if they are there, and a killed refinement resumes.
        seed: seed of the order of groups with "weight"; of what a refinement draws.
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
    compat: CompatOptions = CompatOptions()
    regularisation: _Positive = 0.1
    refine_steps: int = Field(0, ge=0)
    maps: str | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "AlignmentOptions":
        """Refuse keys that contradict each other, and a document that aligns nothing.

        Raises:
            ValueError: naming the key, for pydantic.
        """
        if not (self.groups or self.head):
            raise ValueError("groups: is empty; name at least one of ff, attn, res")
        if self.method == "ot" and self.compat.unmerge:
            raise ValueError("compat.unmerge: goes with permutations, not with method ot")
        if self.method == "orthogonal" and self.attention == "ignore_heads":
            raise ValueError(
                "attention: ignore_heads mixes heads, which method orthogonal does not"
            )
        return self

    @property
    def reads_text(self) -> bool:
        """True if models run on calibration text; with "orthogonal" only if a text is named."""
        named = self.calibration.path is not None
        return self.method in BY_TEXT or (self.method == BY_TEXT_OR_WEIGHTS and named)


def _list_unused_keys(options: AlignmentOptions) -> list[tuple[str, str]]:
    """List the options that differ from their defaults but have no effect with the others.

    A record of an alignment holds all keys, so only documents that people write are checked.

    Returns:
        (dotted key, the options that it would need to have an effect), such as
        ("regularisation", "method ot").
    """
    by_correlation, permuting = options.method in BY_TEXT, options.method != "identity"
    maps, by_text = options.method == BY_TEXT_OR_WEIGHTS, options.reads_text
    groups, compat, text = set(options.groups), options.compat, options.calibration
    change, correlation = "another method than identity", "method activation or ot"
    reading = "method activation or ot, or orthogonal with calibration.path"
    without_maps = "method activation, ot or weight"
    effective = {
        "groups": (permuting or compat.scale, f"{change}, or compat.scale"),
        "attention": (permuting and "attn" in groups, f"attn among groups, and {change}"),
        "residual": (
            "res" in groups and not maps and (by_correlation or options.residual == "sep"),
            f"res among groups, and {correlation}",
        ),
        "qk": (
            permuting and not maps and "attn" in groups,
            f"attn among groups, and {without_maps}",
        ),
        "absolute": (by_correlation, correlation),
        "covariance": (by_correlation, correlation),
        "head": (permuting or compat.scale, f"{change}, or compat.scale"),
        "head_follow_residual": (permuting and "res" in groups, f"res among groups, and {change}"),
        "seed": (
            options.method == "weight" or (maps and options.refine_steps > 0),
            "method weight, or orthogonal with refine_steps",
        ),
        "refine_steps": (maps and by_text, "method orthogonal with calibration.path"),
        "maps": (maps, "method orthogonal"),
        "regularisation": (options.method == "ot", "method ot"),
        "calibration.path": (by_text or maps, "method activation, ot or orthogonal"),
        "calibration.fraction": (by_text, reading),
        "calibration.batch_size": (by_text, reading),
        "calibration.special_tokens": (
            by_text and text.sentence_level != "cls",
            f"another calibration.sentence_level than cls, and {reading}",
        ),
        "calibration.sentence_level": (by_text, reading),
        "compat.scale": (not maps, "another method than orthogonal"),
        "compat.unmerge": (
            permuting and not maps and "res" in groups,
            "res among groups, and method activation or weight",
        ),
        "compat.res_attn_without_embeddings": (
            permuting and not maps and groups == {"attn", "res"},
            f"groups attn and res alone, and {without_maps}",
        ),
        "compat.pooler_by_tokens": (by_correlation and options.head, f"head, and {correlation}"),
        "compat.cls_at_one": (
            by_correlation and text.sentence_level == "cls",
            f"calibration.sentence_level cls, and {correlation}",
        ),
        "compat.stacked": (by_correlation, correlation),
    }
    defaults, unused = AlignmentOptions(), []
    for key, (used, needed) in effective.items():
        value, default = options, defaults
        for part in key.split("."):
            value, default = getattr(value, part), getattr(default, part)
        if value != default and not used:
            unused.append((key, needed))
    return unused


def _refuse_unused_keys(options: AlignmentOptions) -> AlignmentOptions:
    """Return the options; raise ValueError naming the first key without effect, and its needs."""
    if options.refine_steps and options.method == BY_TEXT_OR_WEIGHTS and not options.reads_text:
        raise ValueError("refine_steps: needs calibration.path, text to refine the maps on")
    if unused := _list_unused_keys(options):
        key, needed = unused[0]
        raise ValueError(f"{key} has no effect, it needs {needed}; leave it out")
    return options


EffectiveAlignmentOptions = Annotated[AlignmentOptions, AfterValidator(_refuse_unused_keys)]
"""The schema for what people write: keys without effect are refused, too."""
