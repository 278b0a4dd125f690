"""Sentences as lists of words, with their labels and their places in a file."""

from dataclasses import dataclass, replace


@dataclass
class TokenSet:
    """Sentences of one split in the order of the file.

    Attributes:
        words: words of each sentence.
        labels: label of each word of each sentence; None: hidden.
        lines: for each sentence the line of each word, or the row of a table.
        where: the file or data set.
        unit: "line" or "row", for messages.
    """

    words: list[list[str]]
    labels: list[list[str]] | None
    lines: list[list[int]]
    where: str
    unit: str = "line"

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.words)

    def take_first(self, count: int | None) -> "TokenSet":
        """Return the first `count` sentences; None: all."""
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, words=self.words[:count], labels=labels, lines=self.lines[:count])

    def describe_origin(self, sentence: int, word: int = 0) -> str:
        """Describe file and line of a word of a sentence, both counted from 0, for messages."""
        return f"{self.where}, {self.unit} {self.lines[sentence][word]}"
