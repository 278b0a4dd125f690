"""One tokenizer class for three kinds: Hugging Face, SentencePiece and GPT-2 BPE in fairseq order.

All three have a form for the `tokenizers` library, so that `transformers.AutoTokenizer` gives the
same ids from the folder that `Tokenizer.save` writes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamod.data.corpus import sentencepiece_model
from megamod.data.corpus.fast_tokenizers import LARGEST_ID, load_fast_tokenizer
from megamod.data.corpus.indexed import FAIRSEQ_SYMBOLS, Dictionary
from megamod.errors import UserError, report_damage, shorten
from megamod.files import write_atomic

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

SENTENCEPIECE_FILE = "sentencepiece.model"
GPT2_FILES = ("encoder.json", "vocab.bpe", "dict.txt")
ALPHABET = 1000  # most frequent characters that trained word pieces cover
LONGEST = 1 << 20  # characters of a text encoded at once: bounds the memory for a huge document


@dataclass
class Tokenizer:
    """Encodes text to ids and decodes ids.

    Args:
        kind: "huggingface", "sentencepiece" or "gpt2".
        backend: the tokenizer of the `tokenizers` library; truncation and padding are switched off
            in place, so also in `original`, and special tokens treated as `literal_specials` says.
        bos_id, pad_id, eos_id, unk_id: special ids; `load_tokenizer` has defaults for those that
            a tokenizer does not define.
        literal_specials: True if text that spells a special token, such as "</s>", is encoded as
            ordinary text; False if it becomes that token, as with Hugging Face tokenizers.
        files: contents of the original files by name, saved with the common ones.
        original: the Hugging Face tokenizer, for kind "huggingface".
        exact: encoder that replaces the backend, for SentencePiece models not trained here; None:
            the backend encodes.
    """

    kind: str
    backend: "tokenizers.Tokenizer"
    bos_id: int
    pad_id: int
    eos_id: int
    unk_id: int
    literal_specials: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    original: "PreTrainedTokenizerFast | None" = None
    exact: sentencepiece_model.ExactEncoder | None = None

    def __post_init__(self) -> None:
        """Set up the backend in place: no truncation or padding, special tokens as configured."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.literal_specials

    def __getstate__(self) -> dict:
        """Return the state for worker processes, which only encode: without files and original."""
        return {**vars(self), "backend": self.backend.to_str(), "files": {}, "original": None}

    def __setstate__(self, state: dict) -> None:
        """Restore the state of `__getstate__`, with a backend from its JSON."""
        from tokenizers import Tokenizer as Backend

        vars(self).update(state, backend=Backend.from_str(state["backend"]))
        self.__post_init__()

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special_ids(self) -> dict[str, int]:
        """`bos_id`, `pad_id`, `eos_id` and `unk_id` by name."""
        return {name: getattr(self, name) for name in ("bos_id", "pad_id", "eos_id", "unk_id")}

    @property
    def digest(self) -> str:
        """SHA-256 of all that determines ids, in hexadecimal.

        That is the `tokenizers` JSON, special ids, `literal_specials` and files.
        """
        hashed = hashlib.sha256(self.backend.to_str().encode())
        hashed.update(json.dumps([self.special_ids, self.literal_specials]).encode())
        for name, content in sorted(self.files.items()):
            hashed.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        return hashed.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, int32 `[n]` for each text, without bos or eos.

        The backend encodes a text of more than `LONGEST` characters in parts. A part ends before
        the first blank after a word in its second half, because tokens rarely join a word to the
        blank after it; if there is none, after `LONGEST` characters, perhaps inside a token.
        Hugging Face tokenizers that add a blank before the first word add one after each cut.
        `exact` cuts long texts itself, or not at all, see `ExactEncoder.encode`.
        """
        if self.exact is not None:
            return [np.array(ids, dtype=np.int32) for ids in self.exact.encode(texts)]
        if all(len(text) <= LONGEST for text in texts):
            return self._encode_short_texts(texts)
        return [
            np.concatenate([self._encode_short_texts([part])[0] for part in _cut_long_text(text)])
            for text in texts
        ]

    def _encode_short_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts of at most `LONGEST` characters with the backend: int32 [n] for each."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text, without special tokens."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def save_dictionary(self, path: Path) -> None:
        """Write a dict.txt of fairseq to `path`, if bos, pad, eos and unk are 0 to 3 as in fairseq.

        Otherwise nothing is written. The GPT-2 kind writes its original file. For the others the
        symbols are decimal ids, as in fairseq's dictionary of GPT-2, because a token may contain
        blanks and line ends.
        """
        if tuple(self.special_ids.values()) != (0, 1, 2, 3):
            return
        if "dict.txt" in self.files:
            write_atomic(path, self.files["dict.txt"])
            return
        dictionary = Dictionary()
        for token in range(len(FAIRSEQ_SYMBOLS), self.vocab_size):
            dictionary.add_symbol(str(token), 1)
        dictionary.save(path)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `AutoTokenizer.from_pretrained` both read.

        Args:
            folder: created if it is absent; files of the same names are replaced.
        """
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_atomic(folder / name, content)
        fast = self.original
        if fast is None:
            names = {
                f"{name.removesuffix('_id')}_token": self.backend.id_to_token(token)
                for name, token in self.special_ids.items()
            }
            fast = PreTrainedTokenizerFast(
                tokenizer_object=self.backend,
                split_special_tokens=self.literal_specials,
                clean_up_tokenization_spaces=False,
                **names,
            )
        fast.save_pretrained(folder)


def load_tokenizer(spec: str | Path, do_lower_case: bool | None = None) -> Tokenizer:
    """Load the tokenizer that a user named.

    - a SentencePiece `.model` file, or a folder that `Tokenizer.save` wrote with one;
    - a folder with encoder.json, vocab.bpe and dict.txt: GPT-2 BPE with the ids of fairseq, where
      line k of dict.txt, counted from 0, is id k + 4;
    - any other folder or name: see `load_fast_tokenizer`.

    Undefined special tokens have defaults: sep for eos, eos for pad, cls or else eos for bos, and
    eos for unk (tokenizers without unk never meet an unknown symbol).

    Args:
        spec: path or name of it, in one of the forms above.
        do_lower_case: for BERT's word pieces, see `load_fast_tokenizer`.
    Raises:
        UserError: if there is no tokenizer, it is damaged, it encodes no text, it has neither eos
            nor sep, `do_lower_case` does not apply to it, or a `.model` file cannot be converted.
    """
    path = Path(spec)
    if do_lower_case is None and path.is_dir():
        if all((path / name).is_file() for name in GPT2_FILES):
            return _load_gpt2(path)
        if (path / SENTENCEPIECE_FILE).is_file():
            return _load_sentencepiece((path / SENTENCEPIECE_FILE).read_bytes(), str(path))
    elif do_lower_case is None and path.suffix == ".model":
        if not path.is_file():
            raise UserError(f"--tokenizer {spec}: no such file")
        return _load_sentencepiece(path.read_bytes(), str(path))
    return _load_huggingface(str(spec), do_lower_case)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, folder: str | Path | None = None
) -> Tokenizer:
    """Train a lossless SentencePiece BPE: decoding the ids of any text gives the text again.

    Ids are 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, 4 line end, 5 tab, then 256 bytes, then pieces. Text
    is not normalised. Blanks are not replaced by U+2581, which could not be distinguished from a
    U+2581 of the text. Training is deterministic.

    Args:
        texts: documents; some megabytes are enough.
        vocab_size: number of ids.
        folder: folder to save the tokenizer in, see `Tokenizer.save`; None: it is not saved.

    Raises:
        UserError: if the texts yield fewer ids, or their characters alone are more.
    """
    name = f"sentencepiece:{vocab_size}"
    model = sentencepiece_model.train_model(texts, vocab_size, f"--tokenizer {name}")
    tokenizer = _load_sentencepiece(model, name)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train lower-case word pieces as of BERT, for encoders.

    Ids are 0 [PAD], 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK], then characters and pieces. Training is
    deterministic.

    Args:
        texts: documents; some megabytes are enough.
        vocab_size: largest number of ids; there are fewer if the texts yield no more.

    Raises:
        UserError: if the special tokens and characters alone are more than `vocab_size`.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    backend = BertWordPieceTokenizer(lowercase=True)
    normal = map(backend.normalizer.normalize_str, texts)
    words = Counter(
        word for text in normal for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)
    )
    # The trainer numbers characters inside words in the order of a hash table, and ids decide ties
    # between pieces. Passing them as special tokens fixes their ids.
    counts = Counter(character for word in words for character in word[1:])
    inside = [f"##{character}" for character, _ in counts.most_common(ALPHABET)]
    backend.train_from_iterator(
        words.elements(),
        vocab_size=vocab_size,
        show_progress=False,
        limit_alphabet=ALPHABET,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(inside)],
    )
    vocab = backend.get_vocab(with_added_tokens=True)
    if len(vocab) > vocab_size:
        raise UserError(
            f"--tokenizer wordpiece:{vocab_size}: special tokens and characters alone are "
            f"{len(vocab)} ids"
        )
    return _wrap_fast_tokenizer(BertTokenizerFast(vocab=vocab), f"wordpiece:{vocab_size}")


TRAINERS = {"sentencepiece": train_sentencepiece, "wordpiece": train_wordpiece}


def find_trainer(spec: str) -> "Callable[[Iterable[str]], Tokenizer] | None":
    """Return the function that trains a tokenizer for `KIND:VOCAB`; None for any other `spec`.

    KIND is a key of `TRAINERS`, VOCAB a number of ids. The function takes the texts.

    Raises:
        UserError: if VOCAB is not a number of at most seven digits.
    """
    kind, _, number = spec.partition(":")
    if kind not in TRAINERS or ":" not in spec:
        return None
    if not re.fullmatch("[0-9]{1,7}", number):
        raise UserError(f"--tokenizer {spec}: write the number of ids, as in {kind}:4096")
    return partial(TRAINERS[kind], vocab_size=int(number))


def _cut_long_text(text: str) -> Iterator[str]:
    """Yield the parts of a text that are encoded one by one, see `Tokenizer.encode_batch`.

    Each has at most `LONGEST` characters; joined they are the text.
    """
    begin = 0
    while len(text) - begin > LONGEST:
        blank = re.compile(r"(?<=\S) ").search(text, begin + LONGEST // 2, begin + LONGEST)
        end = blank.start() if blank else begin + LONGEST
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _load_huggingface(spec: str, do_lower_case: bool | None) -> Tokenizer:
    """Load a Hugging Face tokenizer.

    Args:
        spec: folder or hub name.
        do_lower_case: see `load_fast_tokenizer`.
    Raises:
        UserError: if there is none that can be used.
    """
    allowed = (
        f"Allowed are a Hugging Face folder or name, a folder with {', '.join(GPT2_FILES)}, a "
        f"SentencePiece .model file, and {' or '.join(f'{kind}:VOCAB' for kind in TRAINERS)}"
    )
    with report_damage(f"--tokenizer {spec}: no tokenizer found. {allowed}. Reason"):
        return _wrap_fast_tokenizer(load_fast_tokenizer(spec, do_lower_case), spec)


def _wrap_fast_tokenizer(tokenizer: "PreTrainedTokenizerFast", spec: str) -> Tokenizer:
    """Wrap a Hugging Face tokenizer, with the defaults of `load_tokenizer` for special ids.

    Args:
        spec: the user's name of the tokenizer, for messages.
    Raises:
        UserError: if it has neither eos nor sep, or an id above `LARGEST_ID`.
    """
    eos = _select_first_id(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if eos is None:
        raise UserError(f"--tokenizer {spec}: it defines neither an eos nor a sep token")
    loaded = Tokenizer(
        "huggingface",
        tokenizer.backend_tokenizer,
        bos_id=_select_first_id(tokenizer.bos_token_id, tokenizer.cls_token_id, eos),
        pad_id=_select_first_id(tokenizer.pad_token_id, eos),
        eos_id=eos,
        unk_id=_select_first_id(tokenizer.unk_token_id, eos),
        literal_specials=bool(tokenizer.split_special_tokens),
        original=tokenizer,
    )
    if loaded.vocab_size > LARGEST_ID + 1:
        vocabulary = loaded.backend.get_vocab(with_added_tokens=True)
        token = max(vocabulary, key=vocabulary.get)
        raise UserError(
            f"--tokenizer {spec}: token {shorten(token)} has the id {vocabulary[token]}; the "
            f"largest id that a tokenizer may have is {LARGEST_ID}"
        )
    return loaded


def _select_first_id(*ids: int | None) -> int | None:
    """Select the first id that is not None; None without one."""
    return next((token for token in ids if token is not None), None)


def _load_gpt2(folder: Path) -> Tokenizer:
    """Load GPT-2 BPE from the `GPT2_FILES` in `folder`, with the ids of dict.txt.

    Raise UserError if a file is missing or malformed, or dict.txt and encoder.json do not fit.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    dictionary = Dictionary.load(folder / "dict.txt")
    with report_damage(f"--tokenizer {folder}"):
        encoder = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        token_of = {str(number): token for token, number in encoder.items()}
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        symbols = [dictionary.get_symbol(number) for number in range(len(dictionary))]
        vocab = {token_of.get(symbol, symbol): number for number, symbol in enumerate(symbols)}
        missing = set(token_of) - set(symbols)
        if missing or len(vocab) != len(symbols):
            lacking = (
                f"lacks {len(missing)} ids of encoder.json, such as {min(missing, default='')}"
            )
            raise ValueError(f"dict.txt {lacking}" if missing else "a symbol occurs twice")
        backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(FAIRSEQ_SYMBOLS))
    files = {name: (folder / name).read_bytes() for name in GPT2_FILES}
    return Tokenizer("gpt2", backend, *range(4), files=files)


def _load_sentencepiece(content: bytes, where: str) -> Tokenizer:
    """Load a SentencePiece model.

    Args:
        content: the serialised model.
        where: path of the model, for messages.
    Raises:
        UserError: if it has no eos, or cannot be converted exactly.
    """
    with report_damage(f"--tokenizer {where}: no SentencePiece model"):
        backend, exact, ids = sentencepiece_model.convert_model(content, f"--tokenizer {where}")
    if ids["eos"] is None:
        raise UserError(f"--tokenizer {where}: it defines no eos token")
    return Tokenizer(
        "sentencepiece",
        backend,
        bos_id=_select_first_id(ids["bos"], ids["eos"]),
        pad_id=_select_first_id(ids["pad"], ids["eos"]),
        eos_id=ids["eos"],
        unk_id=ids["unk"],
        files={SENTENCEPIECE_FILE: content},
        exact=exact,
    )
