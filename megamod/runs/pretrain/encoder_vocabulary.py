"""Vocabulary of the data that an encoder is trained on: its size, special ids and masking."""

from dataclasses import dataclass

from transformers import AutoTokenizer

from megamod.args import MuxArgs
from megamod.data.lm.databin import DataBin
from megamod.data.lm.masking import Masking
from megamod.errors import UserError, report_damage


@dataclass(frozen=True)
class DataVocabulary:
    """Size and special ids of a data-bin's vocabulary, for configurations of new encoders."""

    data: DataBin

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.data.vocab_size

    @property
    def bos(self) -> int:
        """Id that begins a sequence, [CLS] of BERT."""
        return self.data.bos_id

    @property
    def pad(self) -> int:
        """Id of padding."""
        return self.data.pad_id

    @property
    def mask(self) -> int:
        """Id of [MASK], read from the tokenizer each time; UserError if there is none."""
        return read_mask_id(self.data)


def read_mask_id(data: DataBin) -> int:
    """Read the id of [MASK] from the tokenizer of the data.

    Raises:
        UserError: if the tokenizer cannot be read or has none.
    """
    folder = data.path / "tokenizer"
    with report_damage(f"--data {data.path}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"--data {data.path}: its tokenizer has no mask token; preprocess with one of BERT"
        )
    return tokenizer.mask_token_id


def make_masking(data: DataBin, mux: MuxArgs) -> Masking:
    """Make the settings of masking, with the ids of the data's tokenizer.

    For masked_lm 80 % of the selected tokens become [MASK] and 10 % random ones; for replaced_token
    85 % become [MASK], to be replaced by a generator or random ids. The others stay as they are.
    For distillation none is selected.

    Args:
        data: data-bin to train on.
        mux: flags; --objective, --mlm_probability and --max_pad_tokens count.
    Raises:
        UserError: if the tokenizer has no [MASK].
    """
    mask = read_mask_id(data)
    shares = {"masked": 0.85, "random": 0.0} if mux.objective == "replaced_token" else {}
    probability = 0.0 if mux.objective == "distillation" else mux.mlm_probability
    return Masking(
        mask,
        data.pad_id,
        (data.bos_id, data.eos_id, data.pad_id, mask),
        data.vocab_size,
        probability=probability,
        max_pad_tokens=mux.max_pad_tokens,
        **shares,
    )
