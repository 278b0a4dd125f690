"""Loading of fast Hugging Face tokenizers, with a check that they can encode text.

For a folder without vocabulary transformers builds a tokenizer of special tokens alone, which turns
every word into [UNK]. A folder with vocab.txt alone does not state its letter case.
"""

import logging
import string
from pathlib import Path
from typing import TYPE_CHECKING

from megamod.data.corpus.lines import read_lines
from megamod.errors import UserError, name_origin, shorten
from megamod.schemas import read_json_object

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CASED_SHARE = 0.2  # of the tokens with letters; BERT's cased vocabulary has 0.4, Chinese BERT 0.003
LARGEST_ID = 2**24 - 1  # libraries visit every id below the largest, also those without a token
TRIED = 200  # tokens tried at least, spread over the vocabulary; all of a smaller one


def load_fast_tokenizer(spec: str, do_lower_case: bool | None = None) -> "PreTrainedTokenizerFast":
    """Load a folder or hub name with `AutoTokenizer`, or BERT word pieces from vocab.txt alone.

    Args:
        spec: folder or hub name.
        do_lower_case: overrides the folder's setting, for BERT word pieces only. None: the folder's
            setting; with vocab.txt alone True unless capitals are a real part of the vocabulary.
    Raises:
        UserError: if `do_lower_case` does not apply, the tokenizer is slow or encodes no text, or
            a file of the folder has an id above `LARGEST_ID`.
        OSError, ValueError, KeyError, ImportError: from transformers, if there is no tokenizer.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    folder = Path(spec)
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if "vocab.txt" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        vocab = _read_vocabulary(folder / "vocab.txt")
        lower = not _is_cased(vocab) if do_lower_case is None else do_lower_case
        fast = BertTokenizerFast(vocab=vocab, do_lower_case=lower)
        _check_encodes_text(fast, spec)
        return fast
    for name in sorted(names & {"tokenizer.json", "vocab.json"}):
        with name_origin(f"--tokenizer {spec}"):
            _check_ids(folder / name)
    options = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    fast = AutoTokenizer.from_pretrained(spec, trust_remote_code=False, **options)
    if not fast.is_fast:
        raise UserError(f"--tokenizer {spec}: only fast tokenizers (tokenizer.json) are read")
    normalizer = fast.backend_tokenizer.normalizer
    if do_lower_case is not None and getattr(normalizer, "lowercase", None) is not do_lower_case:
        raise UserError(
            f"--do_lower_case {str(do_lower_case).lower()}: only BERT's word pieces have this "
            f"choice, and --tokenizer {spec} is a {type(fast).__name__}"
        )
    _check_encodes_text(fast, spec)
    return fast


def _check_ids(path: Path) -> None:
    """Refuse ids above `LARGEST_ID` in a vocabulary, tokenizer.json or vocab.json.

    A file of some bytes would take minutes and gigabytes as soon as a library has it. Parts that
    are no vocabulary are left to the library, whose error says more.

    Raises:
        UserError: naming token and id; or if the file is no JSON object.
    """
    content = read_json_object(path)
    model = content.get("model", {"vocab": content})
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            ids.append((entry.get("content"), entry.get("id")))
    for token, number in ids:
        if isinstance(number, int) and number > LARGEST_ID:
            raise UserError(
                f"{path}: token {shorten(token)} has the id {shorten(number)}; the largest id that "
                f"a tokenizer may have is {LARGEST_ID}"
            )


def _check_encodes_text(tokenizer: "PreTrainedTokenizerFast", spec: str) -> None:
    """Refuse a tokenizer that encodes no text; log a warning if most capitals become unknown.

    Args:
        tokenizer: the loaded tokenizer.
        spec: the user's name of the tokenizer, for messages.
    Raises:
        UserError: if the text of every tested token becomes unknown, see `TRIED`, or the vocabulary
            begins with a byte order mark.
    """
    backend = tokenizer.backend_tokenizer
    special_ids = set(tokenizer.all_special_ids)  # [UNK] included
    vocab = backend.get_vocab(with_added_tokens=True)
    first = backend.id_to_token(0) or ""
    if first.startswith("\ufeff"):
        raise UserError(
            f"--tokenizer {spec}: its vocabulary begins with a byte order mark, which is now part "
            f"of the first token {first[1:]!r}; save the file as UTF-8 without one"
        )
    ordinary = sorted(set(vocab.values()) - special_ids)
    step = max(1, len(ordinary) // TRIED)
    texts = [backend.decode([token], skip_special_tokens=False) for token in ordinary[::step]]
    if all(_is_encoded_as_unknown(backend, special_ids, text.removeprefix("##")) for text in texts):
        reason = "of its words becomes a token" if ordinary else "stands for text"
        raise UserError(
            f"--tokenizer {spec}: has {len(vocab)} ids and none {reason}, so every text would be "
            "[UNK]; is the file of its vocabulary (tokenizer.json, vocab.txt, vocab.json) missing?"
        )
    lost_letters = [
        letter
        for letter in string.ascii_lowercase
        if _is_encoded_as_unknown(backend, special_ids, letter.upper())
        and not _is_encoded_as_unknown(backend, special_ids, letter)
    ]
    if 2 * len(lost_letters) > len(string.ascii_lowercase):
        logger.warning(
            "--tokenizer %s: %d of 26 capital letters, such as %s, become [UNK], and so do "
            "their words; --do_lower_case true encodes them as small letters",
            spec,
            len(lost_letters),
            lost_letters[0].upper(),
        )


def _is_encoded_as_unknown(
    backend: "tokenizers.Tokenizer", special_ids: set[int], text: str
) -> bool:
    """Return True if a text becomes special tokens only, or no token.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        special_ids: ids of the special tokens, that of the unknown token among them.
        text: the text to encode.
    """
    return special_ids.issuperset(backend.encode(text, add_special_tokens=False).ids)


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Read a vocab.txt: token -> id, the number of its line from 0.

    Blank lines at the end are dropped. A repeated token has the id of its last line, as in
    transformers. Raise UserError if the file is not text.
    """
    tokens = [line for _, line in read_lines(path)]
    while tokens and not tokens[-1]:
        tokens.pop()
    return {token: number for number, token in enumerate(tokens)}


def _is_cased(vocab: dict[str, int]) -> bool:
    """Return True if a vocabulary (token -> id) has tokens with capitals, as of a cased model.

    They must be more than `CASED_SHARE` of the tokens with letters.
    """
    lettered = [t for t in vocab if t.lower() != t.upper() and not t.startswith(("[", "<"))]
    return sum(t != t.lower() for t in lettered) > CASED_SHARE * len(lettered)
