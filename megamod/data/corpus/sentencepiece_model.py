"""SentencePiece models: training one that loses nothing, and its exact form for `tokenizers`."""

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megamod.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # piece types
UNIGRAM, BPE = 1, 2  # model types
LONGEST_LINE = 4000  # characters; the trainer skips lines it finds too long
PROBE = (
    " Ships  sail.\tDon't pay 12,345.67 (a+b)==c_d; Größe naïve İstanbul русский 漢字 かな 한국어",
    "עברית ﬁ ① ½ e\u0301 \u00a0\u200b😀 ------ ____ ",
    "two\nlines",
)


def train(texts: Iterable[str], vocab_size: int, where: str) -> bytes:
    """Train a BPE model that gives every text back unchanged.

    SentencePiece writes a blank as U+2581 and so cannot tell it from a U+2581 of the text. After
    training the pieces get real blanks and the escaping is turned off in the model, which leaves
    a U+2581 to the byte pieces.

    Args:
        texts: documents.
        vocab_size: number of ids, special ones and bytes included.
        where: names the request in error messages.

    Returns:
        The serialised model; equal texts give equal bytes.

    Raises:
        UserError: if the texts cannot give that many pieces, or need more.
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


def convert(content: bytes, where: str) -> tuple["tokenizers.Tokenizer", dict[str, int | None]]:
    """The `tokenizers` form of a serialised model, and its ids of bos, pad, eos and unk.

    BPE models give the same ids on any text. Of a unigram model two things can differ: which of
    several equally good ways to cut a run such as "!!!!" is taken, and text that spells a special
    piece, which becomes that piece.

    Raises:
        UserError: if `content` is no model, or one whose ids `tokenizers` does not reproduce.
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
    backend = _backend(model)
    for text in PROBE:
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"{where}: the `tokenizers` library does not reproduce this model; use the folder "
                "of its Hugging Face version instead"
            )
    ids = {name: getattr(processor, f"{name}_id")() for name in ("bos", "pad", "eos", "unk")}
    return backend, {name: one if one >= 0 else None for name, one in ids.items()}


def _backend(model: "ModelProto") -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces, spec = model.pieces, model.normalizer_spec
    byte_fallback = any(piece.type == BYTE for piece in pieces)
    unknown = next(index for index, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if model.trainer_spec.model_type == BPE:
        core = models.BPE(
            {piece.piece: index for index, piece in enumerate(pieces)},
            _merges(_ranked(model)),
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        scores = [(piece.piece, piece.score) for piece in pieces]
        core = models.Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback)
    backend = Backend(core)
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    undo = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
        undo.insert(0, decoders.Replace("▁", " "))
    else:
        # No piece joins a blank to what stands before it, so words can be encoded, and cached,
        # one at a time.
        backend.pre_tokenizer = pre_tokenizers.Split(
            Regex(r"\n| +[^ \n]*|[^ \n]+"), behavior="isolated"
        )
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    backend.encode_special_tokens = True
    backend.add_special_tokens(
        [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False)
            for piece in pieces
            if piece.type == USER_DEFINED and len(piece.piece) > 1
        ]
    )
    return backend


def _ranked(model: "ModelProto") -> list[str]:
    normal = [piece for piece in model.pieces if piece.type == NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs whose join is a piece, better pieces first, and for one piece the pair with the
    longer left part first: SentencePiece, which scores the join alone, takes the leftmost."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]
