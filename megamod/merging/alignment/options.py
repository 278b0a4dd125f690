"""Options of an alignment: the `align:` block of a recipe."""

from dataclasses import dataclass, field

from megamod.errors import UserError
from megamod.merging.alignment.matching import ATTENTION

METHODS = ("activation", "ot", "weight", "identity")
BY_TEXT = ("activation", "ot")
"""Methods that run models on calibration text."""
GROUPS = ("ff", "attn", "res")
RESIDUAL = ("first", "last", "all", "sep")
SENTENCE_LEVELS = ("none", "cls", "maxpool", "avgpool")


@dataclass(frozen=True)
class Compat:
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


@dataclass(frozen=True)
class Calibration:
    """Calibration text.

    Attributes:
        path: text file with an item per line, or JSON lines with the key "text".
        fraction: of its items; above 1 items are repeated.
        batch_size: items per forward pass.
        special_tokens: count the first and the last token of an item.
        sentence_level: "cls", "maxpool" and "avgpool" give one row of features per item.
    """

    path: str | None = None
    fraction: float = 1.0
    batch_size: int = 8
    special_tokens: bool = True
    sentence_level: str = "none"


@dataclass(frozen=True)
class Options:
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
    Raises:
        UserError: naming the key, if a value is not allowed.
    """

    method: str = "activation"
    groups: tuple[str, ...] = GROUPS
    attention: str = "head_perm"
    residual: str = "first"
    qk: bool = False
    absolute: bool = False
    covariance: bool = False
    head: bool = False
    head_follow_residual: bool = True
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
    compat: Compat = field(default_factory=Compat)
    regularisation: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "groups", tuple(self.groups))
        one_of = [
            ("method", self.method, METHODS),
            ("attention", self.attention, ATTENTION),
            ("residual", self.residual, RESIDUAL),
            ("calibration.sentence_level", self.calibration.sentence_level, SENTENCE_LEVELS),
            *(("groups", group, GROUPS) for group in self.groups),
        ]
        for key, value, allowed in one_of:
            if value not in allowed:
                raise UserError(f"align.{key}: {value!r} is not one of {', '.join(allowed)}")
        if not (self.groups or self.head):
            raise UserError("align.groups: is empty; name at least one of ff, attn, res")
        if not 0 < self.regularisation < float("inf"):
            raise UserError(f"align.regularisation: {self.regularisation} is not positive")
        if self.method == "ot" and self.compat.unmerge:
            raise UserError("align.compat.unmerge: goes with permutations, not with method ot")
        if self.calibration.fraction <= 0 or self.calibration.batch_size < 1:
            raise UserError(
                f"align.calibration: fraction {self.calibration.fraction} and batch_size "
                f"{self.calibration.batch_size} must be positive"
            )


def unused_keys(options: Options) -> list[str]:
    """Keys that were set to something other than their default and have no effect with the others.

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


def checked_options(block: dict[str, object], origin: str) -> Options:
    """`options_from` for documents that people write: keys without effect are refused, too.

    Raises:
        UserError: naming the key.
    """
    options = options_from(block, origin)
    if unused := unused_keys(options):
        raise UserError(
            f"{origin}: align.{unused[0]} has no effect with method {options.method} and groups "
            f"{', '.join(options.groups) or 'none'}; leave it out"
        )
    return options


def options_from(block: dict[str, object], origin: str) -> Options:
    """Read the options of an `align:` block.

    Args:
        origin: file and key of the block, for messages.
    Raises:
        UserError: naming the key that is not known or whose value is of the wrong kind.
    """
    nested = {"calibration": Calibration, "compat": Compat}
    fields = dict(block)
    for key, kind in nested.items():
        if key in fields:
            fields[key] = kind(**_checked(fields[key], kind, f"{origin}: align.{key}"))
    return Options(**_checked(fields, Options, f"{origin}: align"))


def _checked(block: object, kind: type, origin: str) -> dict[str, object]:
    """Check that keys are fields and values have the type of their defaults."""
    if not isinstance(block, dict):
        raise UserError(f"{origin}: is {block!r}, not a mapping")
    defaults, checked = kind(), {}
    for key, value in block.items():
        if not isinstance(key, str) or key not in vars(defaults):
            raise UserError(f"{origin}: there is no {key!r}; known are {', '.join(vars(defaults))}")
        default = getattr(defaults, key)
        if value is None and default is None:  # as records have it
            continue
        kinds = {float: (int, float), tuple: (list, tuple), type(None): str}
        expected = kinds.get(type(default), type(default))
        if not isinstance(value, expected) or isinstance(value, bool) != isinstance(default, bool):
            spelled = {"NoneType": "str", "tuple": "list"}
            name = spelled.get(type(default).__name__, type(default).__name__)
            raise UserError(f"{origin}.{key}: {value!r} is not of type {name}")
        checked[key] = value
    return checked
