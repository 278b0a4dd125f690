"""What an alignment is told: the `align:` block of a recipe."""

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
    """Ways in which the program of Verma and Elbayad 2024 departs from what is right; all off.

    Attributes:
        scale: what makes permuted features is multiplied by 2 / (2 + 1e-5), in both models.
        unmerge: the tied output matrix gets the permutation of the residual stream twice, where
            undoing it would be right.
        res_attn_without_embeddings: with the groups res and attn alone the embeddings and what
            reads them first stay as they are.
        pooler_by_tokens: moments of features that exist once per sequence are divided by the
            number of tokens.
        cls_at_one: sentence level `cls` takes position 1.
        stacked: correlations in its arithmetic, see `CrossCovariance`.
    """

    scale: bool = False
    unmerge: bool = False
    res_attn_without_embeddings: bool = False
    pooler_by_tokens: bool = False
    cls_at_one: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Calibration:
    """The text that models are compared on.

    Attributes:
        path: text file, a line an item, or JSON lines with the key "text".
        fraction: how much of its items; more than 1 goes through them again.
        batch_size: items at once.
        special_tokens: whether the first and the last token of an item count.
        sentence_level: "cls", "maxpool" and "avgpool" make one row of features of each item.
    """

    path: str | None = None
    fraction: float = 1.0
    batch_size: int = 8
    special_tokens: bool = True
    sentence_level: str = "none"


@dataclass(frozen=True)
class Options:
    """How to align.

    Attributes:
        method: by "activation" on calibration text, by "weight" (data-free), or "identity"; "ot":
            as "activation", but every feature becomes a mean of several, which changes what the
            model computes.
        regularisation: with "ot", how soft that is.
        groups: of "ff", "attn" and "res", what is permuted.
        attention: see `matching.ATTENTION`.
        residual: the one permutation of the residual stream comes from its "first" or "last" place
            or the mean over "all"; "sep": a permutation for each place, which changes what the
            model computes.
        qk: queries and keys have a permutation of their own within heads.
        absolute: match by the size of a correlation, whatever its sign.
        covariance: match by covariances in place of correlations.
        head: permute the features of the output head as well.
        head_follow_residual: give the features of a masked-LM head the order of the residual
            stream, so that its matrix can stay tied to the embeddings. Without it the permuted
            model has an output matrix of its own.
        calibration: the text.
        seed: of the order in which "weight" goes through the groups.
        compat: departures of the original program.
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
            raise UserError("align.groups: is empty, so there is nothing to align")
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
    """The options of an `align:` block.

    Args:
        origin: where it stands, for messages.
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
    """The block, if its keys are fields and its values are of the kind of their defaults."""
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
        wanted = kinds.get(type(default), type(default))
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            told = {"NoneType": "str", "tuple": "list"}
            name = told.get(type(default).__name__, type(default).__name__)
            raise UserError(f"{origin}.{key}: {value!r} is not of type {name}")
        checked[key] = value
    return checked
