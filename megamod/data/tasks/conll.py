"""Words and labels in CoNLL files: columns, comments and sentences.

One word per line, columns separated by tabs or else by blanks, a blank line after each sentence.
Only ASCII blanks separate: a no-break space is part of a word. Lines with -DOCSTART-, comments
before a sentence, and the ranges and empty nodes of CoNLL-U are skipped.

Source: Tjong Kim Sang and De Meulder 2003 (CoNLL-2003), section 2.3; the CoNLL-U and CoNLL-U Plus
formats of Universal Dependencies, version 2.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamod.data.corpus.lines import read_lines
from megamod.data.tasks.iob import OUTSIDE, are_entity_labels, parse_entity_label
from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError

logger = logging.getLogger(__name__)

BLANKS = " \t\r"
COMMENT = re.compile(r"# (\S.* = |new(doc|par)\b|global\.columns\b)")
NAMED_COLUMNS = re.compile(r"# global\.columns = (.+)")
CONLLU = ["ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC"]
NODE = re.compile(r"\d+([-.]\d+)?")  # ID of a word, of a range (1-2) or of an empty node (1.1)
HIDDEN = "_"  # instead of a label, in CoNLL-U

Numbered = tuple[int, str]
"""Number from 1, and text, of a line."""


@dataclass(frozen=True)
class _ColumnLayout:
    """Column layout of a line.

    Attributes:
        width: number of columns.
        tabs: True if tabs separate them, False for blanks.
        numbered: True if column 0 counts the words of a sentence, so that no word begins with #.
        word: column of the words, from 0.
        label: column of the labels, from 0; None: the file has none.
    """

    width: int
    tabs: bool
    numbered: bool
    word: int
    label: int | None

    def split_cells(self, line: str) -> list[str]:
        """Split a line into its cells."""
        return _split_cells(line, self.tabs)


def read_conll(
    path: Path,
    word_column: int | None,
    label_column: int | None,
    split: str = "train",
    *,
    label_after_word: bool = False,
) -> TokenSet:
    """Read the sentences of a CoNLL file; labels are as in the file.

    Log the number of comment lines, and a warning if column 0 numbers the words.

    Args:
        path: the file, perhaps compressed.
        word_column, label_column: from 0, or from -1 backwards. None: in CoNLL-U FORM and UPOS;
            else the first and the last column. If the first one numbers the words, the second one
            and the first one after it with entity labels.
        split: the labels of a split that begins with "test" may be hidden: the column is missing,
            or all of it is "_".
        label_after_word: with `label_column` None, take the column after the word as the label's,
            not the last one.
    Raises:
        UserError: if there is no sentence, for a column that does not exist, and naming a line that
            has another number of columns than most, or lacks a word or a label.
    """
    blocks = list(_iterate_line_blocks(path))
    layout = _detect_layout(
        path, blocks, word_column, label_column, split.startswith("test"), label_after_word
    )
    known = _collect_certain_labels(blocks, layout)
    words, labels, lines, comments = [], [], [], 0
    for block in blocks:
        start = _count_comment_lines(block, layout, known)
        comments += start
        rows = [(number, layout.split_cells(line)) for number, line in block[start:]]
        for number, cells in rows:
            _check_cells(f"{path}, line {number}", cells, layout)
        if layout.numbered:
            rows = [row for row in rows if row[1][0].isdecimal()]
        if not rows:
            continue
        lines.append([number for number, _ in rows])
        words.append([cells[layout.word].strip(BLANKS) for _, cells in rows])
        if layout.label is not None:
            labels.append([cells[layout.label].strip(BLANKS) for _, cells in rows])
    if comments:
        logger.info("%s: %d comment lines are skipped", path, comments)
    if split.startswith("test") and {label for row in labels for label in row} == {HIDDEN}:
        labels = []
    return TokenSet(words, labels or None, lines, str(path))


def _iterate_line_blocks(path: Path) -> Iterator[list[Numbered]]:
    """Yield blocks of numbered lines between blank lines; a block is mostly one sentence.

    Lines that begin with -DOCSTART- separate blocks, too, and are in none.
    """
    block: list[Numbered] = []
    for number, line in read_lines(path):
        if line.strip(BLANKS) and not line.startswith("-DOCSTART-"):
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _split_cells(line: str, is_tab_separated: bool) -> list[str]:
    """Split a line at tabs, or else at groups of blanks and tabs."""
    return line.split("\t") if is_tab_separated else re.split("[ \t]+", line.strip(BLANKS))


def _count_possible_comments(block: list[Numbered]) -> int:
    """Count the lines at the start of a block that may be comments: those that begin with #."""
    return next((n for n, (_, line) in enumerate(block) if not line.startswith("#")), len(block))


def _detect_layout(
    path: Path,
    blocks: list[list[Numbered]],
    word_column: int | None,
    label_column: int | None,
    is_test: bool,
    label_after_word: bool,
) -> _ColumnLayout:
    """Detect the layout of a file from those lines that cannot be comments.

    Log a warning if column 0 numbers the words and is therefore skipped.

    Args:
        path: the file, for messages.
        blocks: see `_iterate_line_blocks`.
        word_column, label_column, label_after_word: see `read_conll`.
        is_test: True if the column of the labels may be missing.
    Raises:
        UserError: if there is no sentence, or a column does not exist.
    """
    certain = [block[_count_possible_comments(block) :] for block in blocks]
    certain = [block for block in certain if block]
    if not certain:  # every line begins with #, so only the form of a line tells a comment
        certain = [[row for row in block if not COMMENT.match(row[1])] for block in blocks]
        certain = [block for block in certain if block]
    if not certain:
        raise UserError(f"{path}: no sentence in it")
    lines = [line for block in certain for _, line in block]
    tabs = _find_most_frequent("\t" in line for line in lines)
    width = _find_most_frequent(len(_split_cells(line, tabs)) for line in lines)
    firsts = [[_split_cells(line, tabs)[0] for _, line in block] for block in certain]
    names = _read_column_names(blocks) or CONLLU
    if names[0] == "ID" and len(names) == width:
        numbered = all(NODE.fullmatch(first) for row in firsts for first in row)
    else:
        numbered = width > 1 + (not is_test) and _are_word_numbers(firsts)
        names = []
    word, label = word_column, label_column
    if word is None:
        word = names.index("FORM") if numbered and "FORM" in names else int(numbered)
        if numbered and not names:
            logger.warning(
                "%s: column 0 numbers the words, so words are column 1 (--word_column)", path
            )
    if label is None:
        label = word + 1 if label_after_word else -1
        if numbered and "UPOS" in names:
            label = names.index("UPOS")
        elif numbered and not names and not label_after_word:
            label = _find_entity_column([_split_cells(line, tabs) for line in lines], word, width)
    where = f"{path}, line {certain[0][0][0]}"
    return _ColumnLayout(
        width, tabs, numbered, *_resolve_columns(where, width, word, label, is_test)
    )


def _find_most_frequent(values: Iterable[object]) -> object:
    """Find the most frequent value; of equally frequent ones, the first."""
    return Counter(values).most_common(1)[0][0]


def _are_word_numbers(first_cells: list[list[str]]) -> bool:
    """Return True if the first cells of every sentence are 1, 2, 3, ... or 0, 1, 2, ..."""
    return max(map(len, first_cells)) > 1 and all(
        row == [str(number + (row[0] != "0")) for number in range(len(row))] for row in first_cells
    )


def _find_entity_column(rows: list[list[str]], word_column: int, column_count: int) -> int:
    """Find the first column after the words that has entity labels only.

    Args:
        rows: cells of lines; lines with another number of cells are ignored.
        word_column: column of the words; negative: from the end.
        column_count: number of columns of the file.
    Returns:
        its number, from 0; -1, the last column, if there is none.
    """
    for column in range(word_column % column_count + 1, column_count):
        labels = {row[column].strip(BLANKS) for row in rows if len(row) == column_count}
        if all(label == OUTSIDE or parse_entity_label(label) for label in labels):
            return column
    return -1


def _read_column_names(blocks: list[list[Numbered]]) -> list[str] | None:
    """Read the names of the columns of a CoNLL-U Plus file; None if it names none."""
    match = NAMED_COLUMNS.match(blocks[0][0][1])
    return match and match[1].split()


def _resolve_columns(
    where: str, width: int, word: int, label: int, is_test: bool
) -> tuple[int, int | None]:
    """Resolve the columns of word and label, which may be negative, to numbers from 0.

    Args:
        where: file and line, for messages.
        width: number of columns.
        word, label: numbers from 0, or from -1 backwards.
        is_test: True if the column of the label may be missing.
    Returns:
        both columns; that of the label is None if `is_test` and it does not exist or is the word's.
    Raises:
        UserError: if a column does not exist, or both are the same one.
    """
    if not -width <= word < width:
        raise UserError(f"{where}: {width} columns, there is no column {word} (--word_column)")
    if not -width <= label < width:
        if is_test:
            return word % width, None
        raise UserError(f"{where}: {width} columns, there is no column {label} (--label_column)")
    if word % width == label % width:
        if is_test:
            return word % width, None
        raise UserError(f"{where}: {width} columns, so word and label would be the same one")
    return word % width, label % width


def _collect_certain_labels(blocks: list[list[Numbered]], layout: _ColumnLayout) -> set[str]:
    """Collect the labels of the lines that cannot be comments; empty if the file has no labels.

    Args:
        blocks: see `_iterate_line_blocks`.
    """
    if layout.label is None:
        return set()
    rows = (
        layout.split_cells(line)
        for block in blocks
        for _, line in block[_count_possible_comments(block) :]
    )
    return {cells[layout.label].strip(BLANKS) for cells in rows if len(cells) == layout.width}


def _count_comment_lines(
    block: list[Numbered], layout: _ColumnLayout, known_labels: set[str]
) -> int:
    """Count the comment lines at the start of a block.

    A line with # is a comment if its form says so, if column 0 numbers the words, if the line has
    another number of columns than the words, or if its label column holds no label. Otherwise it is
    a word such as a hashtag, and the comments end before it.

    Args:
        block: numbered lines between two blank lines.
        known_labels: see `_collect_certain_labels`.
    """
    entities = are_entity_labels(known_labels)
    for index, (_, line) in enumerate(block[: _count_possible_comments(block)]):
        cells = layout.split_cells(line)
        if COMMENT.match(line) or layout.numbered or len(cells) != layout.width:
            continue
        if layout.label is None:
            return index
        label = cells[layout.label].strip(BLANKS)
        if entities:
            word = label == OUTSIDE or parse_entity_label(label) is not None
        else:
            word = label in known_labels or cells[0].strip(BLANKS) != "#"
        if word:
            return index
    return _count_possible_comments(block)


def _check_cells(where: str, cells: list[str], layout: _ColumnLayout) -> None:
    """Raise UserError for a line that lacks a column, a word or a label.

    Args:
        where: file and line, for the message.
        cells: cells of the line.
        layout: layout that most lines of the file have.
    """
    if len(cells) != layout.width:
        raise UserError(f"{where}: {len(cells)} columns, most lines have {layout.width}")
    if not cells[layout.word].strip(BLANKS):
        raise UserError(f"{where}: no word in column {layout.word}")
    if layout.label is not None and not cells[layout.label].strip(BLANKS):
        raise UserError(f"{where}: no label in column {layout.label}")
