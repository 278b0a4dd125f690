"""Schemes of entity labels: IOB1, IOB2, IOBES and BILOU, all turned into IOB2.

A label is O or a part and a type, `B-PER`, or a part alone. Parts: B begins an entity, I (M in
BMES) continues it, E or L ends it, S or U is an entity of one word.

Source: Ramshaw and Marcus 1995 (IOB1); Tjong Kim Sang and Veenstra 1999 (IOB2, IOE); Ratinov and
Roth 2009 (BILOU).
"""

import logging
import re
from collections.abc import Iterable
from typing import NoReturn

from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError

logger = logging.getLogger(__name__)

OUTSIDE = "O"
BEGIN, CONTINUE, LAST = "BSU", "IMEL", "ELSU"
LABEL = re.compile(r"([BIMELSU])(?:-(.+))?", re.DOTALL)


def parse_entity_label(label: str) -> tuple[str, str] | None:
    """Parse an entity label into part and type; return None for O and for other labels.

    The part is one letter of B, I, M, E, L, S and U; the type is "" if the label has none.
    """
    match = LABEL.fullmatch(label)
    return match and (match[1], match[2] or "")


def format_entity_label(part: str, kind: str) -> str:
    """Format a part and a type as a label, `B-PER`; the part alone if the type is empty."""
    return f"{part}-{kind}" if kind else part


def are_entity_labels(labels: Iterable[str]) -> bool:
    """Return True if the labels follow a scheme of entities, False for plain tags.

    They do if a label is B-TYPE or I-TYPE, or if all labels but O have the form of one and some of
    them begins an entity. An O alone says nothing: tag sets without parts have it too.
    """
    named = set(labels) - {OUTSIDE}
    if any(len(label) > 2 and label.startswith(("B-", "I-")) for label in named):
        return True
    parts = [parse_entity_label(label) for label in named]
    return None not in parts and any(part in BEGIN for part, _ in parts)


def convert_to_iob2(sentences: TokenSet, repair: bool) -> str:
    """Turn the entity labels of `sentences` into IOB2 in place, and return their former scheme.

    The scheme is "iob1", "iob2", "iobes" (also for BILOU), or "broken" if the labels follow none
    and `repair` is set. Log repairs and conversions.

    In IOB2 every entity begins with B-. In IOB1 an entity begins with B- only if the word before it
    ends an entity of the same type, otherwise with I-. A file that mixes both is read as IOB1 if
    most of its entities begin with I-, with a warning; otherwise its I- without a beginning are
    mistakes of an IOB2 file.

    Args:
        sentences: sentences with labels; the labels are changed in place.
        repair: read such an I- as the beginning of an entity, as the CoNLL evaluation does.
    Raises:
        UserError: naming the line of a label of no scheme, and of an I- without a beginning unless
            `repair` is set.
    """
    orphans, first_orphan = 0, None  # labels that continue an entity which did not begin
    begins, needless = 0, 0  # labels B-, and how many of them IOB1 would write as I-
    letters, rows = set(), []
    for sentence, labels in enumerate(sentences.labels):
        row, kind_before, label_before, is_open = [], None, OUTSIDE, False
        for word, label in enumerate(labels):
            part, kind = _parse_label(label) or _raise_unknown_label(
                label, sentences.describe_origin(sentence, word)
            )
            if part is None:
                row.append(OUTSIDE)
            elif part in CONTINUE and is_open and kind == kind_before:
                row.append(format_entity_label("I", kind))
            else:
                row.append(format_entity_label("B", kind))
                if part in CONTINUE:
                    orphans += 1
                    first_orphan = first_orphan or (sentence, word, label, label_before, row[-1])
                else:
                    begins += 1
                    needless += kind != kind_before
            letters.add(part)
            kind_before, label_before = kind, label
            is_open = part is not None and part not in LAST
        rows.append(row)
    scheme = "iob2"
    if letters & set("MELSU"):
        scheme = "iobes" if orphans == 0 or repair else "broken"
    elif orphans:
        scheme = "iob1" if orphans > needless or not needless else "broken"
    if scheme == "broken" and not repair:
        sentence, word, label, before, repaired = first_orphan
        raise UserError(
            f"{sentences.describe_origin(sentence, word)}: {label} follows {before}: neither IOB1 "
            f"nor IOB2 allows this with the file's other labels ({orphans} such, {begins} B-); "
            f"--repair_iob reads it as {repaired}"
        )
    if orphans and scheme != "iob1":
        logger.warning(
            "%s: %d I- labels without a beginning are read as B-", sentences.where, orphans
        )
    elif scheme == "iob1" and needless:
        logger.warning(
            "%s: read as IOB1 and converted to IOB2, although %d of its %d B- labels stand where "
            "IOB1 has I-",
            *(sentences.where, needless, begins),
        )
    elif scheme != "iob2":
        logger.info("%s: %s converted to IOB2", sentences.where, scheme.upper())
    sentences.labels[:] = rows
    return scheme


def _parse_label(label: str) -> tuple[str | None, str | None] | None:
    """Parse a label into part and type as `parse_entity_label`, but O into (None, None).

    None stands for a label that is of no scheme.
    """
    return (None, None) if label == OUTSIDE else parse_entity_label(label)


def _raise_unknown_label(label: str, where: str) -> NoReturn:
    """Raise UserError for a label that fits no entity scheme."""
    raise UserError(
        f"{where}: label {label[:60]!r} is none of O, B-TYPE, I-TYPE, nor of IOBES or BILOU"
    )
