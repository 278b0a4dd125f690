"""Training of lossless SentencePiece models; conversion of such models for `tokenizers`."""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamod.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types
UNIGRAM, BPE = 1, 2  # model types
STANDARD_NORMALIZERS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
PROBES = 500  # random texts on which a conversion is tried
LONGEST_PART = 1 << 20  # characters; a longer text is cut at the next blank to bound the memory
# Characters of a line for training; longer lines are cut, because the trainer skips lines that are
# too long. Its own limit counts bytes, of which a character has up to 4.
LONGEST_LINE = 4000
PROBE = (
    " Ships  sail.\tDon't pay 12,345.67 (a+b)==c_d; Größe naïve İstanbul русский 漢字 かな 한국어",
    "עברית ﬁ ① ½ e\u0301 \u00a0\u200b😀 ------ ____ ",
    "two\nlines",
)


def train_model(texts: Iterable[str], vocab_size: int, where: str) -> bytes:
    """Train a BPE model whose decoding restores every text unchanged.

    SentencePiece writes a blank as U+2581 and cannot tell it from a U+2581 of the text. After
    training, the pieces are rewritten with real blanks and escaping is turned off in the model, so
    that byte pieces encode U+2581. Any U+2581 is dropped from the texts for training.

    Args:
        texts: documents.
        vocab_size: number of ids, special ones and bytes included.
        where: prefix of error messages.

    Returns:
        the serialised model; equal texts give equal bytes.

    Raises:
        UserError: if the texts are empty, yield fewer than `vocab_size` ids, or their characters
            alone are more.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    lines = (line for text in texts for line in text.replace("▁", "").split("\n"))
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                line[begin : begin + LONGEST_LINE]
                for line in lines
                for begin in range(0, len(line), LONGEST_LINE)
            ),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=["\n", "\t"],
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = re.sub(r"^.*?\] ?", "", str(error).strip().replace("\n", " "))
        raise UserError(f"{where}: SentencePiece cannot train: {reason}") from error
    model = protobuf.ModelProto.FromString(written.getvalue())
    for piece in model.pieces:
        if piece.type == NORMAL:
            piece.piece = piece.piece.replace("▁", " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString(deterministic=True)


@dataclass
class ExactEncoder:
    """Encoder of texts of any length by SentencePiece itself.

    Attributes:
        processor: the loaded model.
        dummy_prefix: True if the model adds a blank before each text.
        separable: True if a long text can be cut at a blank, because no piece crosses one.
    """

    processor: "SentencePieceProcessor"
    dummy_prefix: bool
    separable: bool

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to ids, without bos and eos.

        If the model is separable, texts longer than `LONGEST_PART` characters are cut at blanks;
        otherwise no text is cut. Uncut texts share all cores, except in worker processes, which set
        TOKENIZERS_PARALLELISM to "false".
        """
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count()
        if not self.separable or all(len(text) <= LONGEST_PART for text in texts):
            return self.processor.encode(list(texts), num_threads=threads)
        return [
            [token for part in self._split_at_blanks(text) for token in self.processor.encode(part)]
            for text in texts
        ]

    def _split_at_blanks(self, text: str) -> Iterator[str]:
        """Yield parts of a text, each cut at the first single blank after `LONGEST_PART` characters
        between words; a text without one is one part.

        A blank that the dummy prefix of the next part restores is not part of any.
        """
        begin, blank = 0, re.compile(r"(?<=[^\s▁]) (?=[^\s▁])")
        while match := blank.search(text, begin + LONGEST_PART):
            yield text[begin : match.start()]
            begin = match.end() if self.dummy_prefix else match.start()
        yield text[begin:]


def convert_model(
    content: bytes, where: str
) -> tuple["tokenizers.Tokenizer", ExactEncoder | None, dict[str, int | None]]:
    """Convert a serialised model of SentencePiece for the `tokenizers` library.

    The encoder gives the ids of SentencePiece on any text; it is None for models such as those of
    `train_model`, whose `tokenizers` form is exact. The `tokenizers` form of every model is
    compared with SentencePiece on the texts of `_build_probe_texts`. Two differences of unigram
    models are accepted: the choice between cuts of equal score, such as of "!!!!", and text that
    spells a control piece, which the `tokenizers` form turns into that piece.

    Args:
        content: the serialised model.
        where: prefix of error messages.
    Returns:
        the `tokenizers` form, the exact encoder or None, and the special ids by name ("bos", "pad",
        "eos", "unk"), None for an id that the model lacks.
    Raises:
        UserError: if `content` is no unigram or BPE model, or `tokenizers` gives other ids for one
            of the texts.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    try:
        model = protobuf.ModelProto.FromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError) as error:
        raise UserError(f"{where}: not a SentencePiece model: {error}") from error
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{where}: only unigram and BPE models of SentencePiece are read")
    backend = _build_backend(model)
    texts = list(_build_probe_texts(model))
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, exact in zip(texts, encoded, processor.encode(texts), strict=True):
        if ids.ids != exact and not _have_equal_scores(model, ids.ids, exact):
            raise UserError(
                f"{where}: the `tokenizers` library does not reproduce this model: it encodes "
                f"{text[:40]!r} differently; use the folder of its Hugging Face version instead"
            )
    exact = None
    if not _has_exact_backend(model):
        dummy_prefix = model.normalizer_spec.add_dummy_prefix
        exact = ExactEncoder(processor, dummy_prefix, _is_separable_at_blanks(model))
    ids = {name: getattr(processor, f"{name}_id")() for name in ("bos", "pad", "eos", "unk")}
    return backend, exact, {name: token if token >= 0 else None for name, token in ids.items()}


def _has_exact_backend(model: "ModelProto") -> bool:
    """Return True if the `tokenizers` form gives the ids of SentencePiece on any text.

    These are BPE models without normalisation or added blanks, with symbols of one character only.

    True for BPE models without normalisation or added blanks, with symbols of one character only,
    such as those of `train_model`.
    """
    spec = model.normalizer_spec
    changes = (spec.precompiled_charsmap, spec.add_dummy_prefix, spec.escape_whitespaces)
    return (
        model.trainer_spec.model_type == BPE
        and not any((*changes, spec.remove_extra_whitespaces))
        and all(len(p.piece) == 1 for p in model.pieces if p.type in (USER_DEFINED, UNUSED))
    )


def _is_separable_at_blanks(model: "ModelProto") -> bool:
    """Return True if a text may be cut at a blank between two words without a change of its ids.

    True if normalisation is a standard one, blanks begin pieces, and no piece has a blank inside.
    """
    spec = model.normalizer_spec
    return (
        spec.name in STANDARD_NORMALIZERS
        and (spec.add_dummy_prefix or not spec.remove_extra_whitespaces)
        and not model.trainer_spec.treat_whitespace_as_suffix
        and not any(re.search("(?<!^)[ ▁]", piece.piece) for piece in model.pieces)
    )


def _build_probe_texts(model: "ModelProto") -> Iterator[str]:
    """Yield the texts on which a conversion is compared; equal models have equal texts.

    They are the texts of `PROBE`; each user-defined or unused symbol (at most `PROBES` of them)
    between other characters; and `PROBES` random sequences of the model's pieces and symbols and of
    characters that normalisation changes. For BPE both kinds also have reserved names (control,
    unknown and byte pieces), which unigram models may encode differently, see `convert_model`.
    """
    bpe = model.trainer_spec.model_type == BPE
    draw = random.Random(0)
    symbols = [piece.piece for piece in model.pieces if piece.type in (USER_DEFINED, UNUSED)]
    reserved = [piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN, BYTE)]
    pieces = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == NORMAL]
    common = [" ", "  ", "\n", "\t", "a", "A", "é", "e\u0301", "漢", "😀", "ａ", "."]
    if not model.normalizer_spec.precompiled_charsmap:
        # Maps that keep a U+2581, as that of nfkc, are a known difference: SentencePiece strips it
        # with the blanks at the end of a text, the `tokenizers` form does not.
        common.append("▁")
    yield from PROBE
    for symbol in draw.sample(symbols, min(len(symbols), PROBES)):
        yield from (f"{front}{symbol}{back}" for front in ("", " ", "a", symbol) for back in common)
        if bpe and reserved:
            yield symbol + draw.choice(reserved) + symbol
    sources = [source for source in (symbols, pieces, common, reserved if bpe else []) if source]
    for _ in range(PROBES):
        yield "".join(draw.choice(draw.choice(sources)) for _ in range(draw.randint(1, 8)))


def _have_equal_scores(model: "ModelProto", first: Sequence[int], second: Sequence[int]) -> bool:
    """Return True if two sequences of ids have the same score in a unigram model, up to rounding.

    The score is the sum of those of the pieces. Other models have none: the result is False.

    Args:
        first, second: ids of two encodings of one text.
    """
    if model.trainer_spec.model_type != UNIGRAM:
        return False
    sums = [sum(model.pieces[token].score for token in ids) for ids in (first, second)]
    return abs(sums[0] - sums[1]) <= 1e-4 * max(1.0, abs(sums[0]))


def _build_backend(model: "ModelProto") -> "tokenizers.Tokenizer":
    """Build the `tokenizers` form of a unigram or BPE model, with its special tokens added."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces, spec = model.pieces, model.normalizer_spec
    byte_fallback = any(piece.type == BYTE for piece in pieces)
    unknown = next(index for index, piece in enumerate(pieces) if piece.type == UNKNOWN)
    splits = []
    if not spec.escape_whitespaces:
        # No piece joins a blank to the text before it, so words can be encoded and cached one by
        # one.
        splits.append(Regex(r"\n| +[^ \n]*|[^ \n]+"))
    if model.trainer_spec.model_type == BPE:
        settings = dict(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_list_merges(_sort_pieces_by_score(model)),
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
        core = models.BPE(**settings)
        # A symbol of one character is in no merge and stays whole. Longer ones are split off first;
        # `ignore_merges` then looks each part of the text up in the vocabulary as a whole.
        long = [p.piece for p in pieces if p.type == USER_DEFINED and len(p.piece) > 1]
        if long:
            splits += [
                Regex(_build_alternation(long)),
                Regex(_build_unreachable_regex(core, pieces)),
            ]
            core = models.BPE(**settings, ignore_merges=True)
    else:
        core = models.Unigram(
            _list_piece_scores(model), unk_id=unknown, byte_fallback=byte_fallback
        )
    backend = Backend(core)
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces and spec.precompiled_charsmap:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    elif spec.remove_extra_whitespaces:
        # Without a map of characters, tabs and line ends are not blanks and stay.
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    undo = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
        undo.insert(0, decoders.Replace("▁", " "))
    if spec.remove_extra_whitespaces and not spec.precompiled_charsmap:
        blank = "▁" if spec.escape_whitespaces else " "
        steps.append(normalizers.Replace(Regex(rf"{blank}+\z"), ""))
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    if len(splits) == 1:
        backend.pre_tokenizer = pre_tokenizers.Split(splits[0], behavior="isolated")
    elif splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, behavior="isolated") for split in splits]
        )
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    backend.encode_special_tokens = True
    backend.add_special_tokens(
        [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    )
    return backend


def _build_alternation(texts: Iterable[str]) -> str:
    """Build a regular expression that matches any of the texts, longer ones first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _build_unreachable_regex(
    core: "tokenizers.models.BPE", pieces: Sequence["SentencePiece"]
) -> str:
    """Build a regular expression that splits texts equal to a piece that merges cannot form.

    Control and byte pieces are such pieces. With `ignore_merges` a part of a text that equals one
    would become that piece. The expression matches the first token of such a part, so that a split
    there prevents this, and changes nothing else. Without such pieces it matches empty texts only.

    Args:
        core: the BPE model without `ignore_merges`.
        pieces: all pieces of the model.
    """
    firsts = []
    for piece in pieces:
        if piece.type == USER_DEFINED or len(piece.piece) < 2:
            continue
        tokens = core.tokenize(piece.piece)
        if len(tokens) > 1:
            cut = next(token.offsets[1] for token in tokens)
            text = piece.piece.encode()
            first, rest = text[:cut].decode(), text[cut:].decode()
            firsts.append(rf"\A{re.escape(first)}(?={re.escape(rest)}\z)")
    return "|".join(firsts) or r"\A\z"


def _list_piece_scores(model: "ModelProto") -> list[tuple[str, float]]:
    """List (piece, score) of a unigram model by id; symbols are scored as SentencePiece does.

    Source: sentencepiece's unigram_model.cc, `EncodeOptimized`.
    """
    best = max((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0)
    return [
        (
            piece.piece,
            len(piece.piece.encode()) * best - 0.1 if piece.type == USER_DEFINED else piece.score,
        )
        for piece in model.pieces
    ]


def _sort_pieces_by_score(model: "ModelProto") -> list[str]:
    """List the ordinary pieces, largest score first."""
    normal = [piece for piece in model.pieces if piece.type == NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def _list_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """List all pairs of pieces that concatenate to a piece, in the order of `pieces`.

    For one piece, pairs with a longer left part come first: SentencePiece scores the result alone
    and merges the leftmost of equal pairs.
    """
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]
