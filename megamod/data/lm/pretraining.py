"""Training and evaluation data of one pretraining run: domains of a data-bin and a sampler."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

from megamod.data.batches import BatchDivision
from megamod.data.lm.batches import Batch, TrainBatches, iterate_eval_batches
from megamod.data.lm.blocks import TokenBlocks
from megamod.data.lm.databin import DataBin
from megamod.data.lm.masking import MaskedBatches, Masking, count_full_blocks
from megamod.data.lm.order import make_sampler
from megamod.errors import UserError


class LmData:
    """Training and evaluation sequences of some domains of a data-bin.

    Attributes:
        databin: the data-bin, which has all domains.
        domains: names in the order of the run; the index of a name is its number.
        block_size: tokens per sequence.
        special_ids: special ids of a model's configuration, see `DataBin.special_ids`.
        digest: digest of the data-bin, see `DataBin`.
        vocab_size: vocabulary size of the tokenizer, plus one per domain with domain tokens.
        domain_tokens: id of the token of each domain; None without domain tokens.

    Raises:
        UserError: if the folder is not a data-bin, or a domain is missing, malformed or too short.
    """

    def __init__(
        self,
        path: str,
        *,
        domains: Sequence[str] | None,
        block_size: int,
        domain_token: bool,
        verify: str = "sample",
        share: tuple[int, int] = (0, 1),
    ):
        """Open a data-bin.

        Args:
            path: folder of the data-bin.
            domains: names of the domains to use; None: all, in the order of the data-bin.
            block_size: tokens per sequence.
            domain_token: begin sequences with the token of their domain.
            verify, share: see `DataBin`; splits are opened and checked later.
        """
        self.databin = DataBin(path, verify, share)
        self.domains = tuple(domains or self.databin.domains)
        self.block_size = block_size
        self.special_ids = self.databin.special_ids
        self.digest = self.databin.digest
        self.vocab_size = self.databin.vocab_size + (len(self.domains) if domain_token else 0)
        # Symbols of domains follow the dictionary in sorted order, as in the DEMix release.
        self.domain_tokens = {
            domain: self.databin.vocab_size + index if domain_token else None
            for index, domain in enumerate(sorted(self.domains))
        }
        self._opened: dict[tuple[str, str], TokenBlocks] = {}

    @cached_property
    def train_blocks(self) -> list[TokenBlocks]:
        """Training sequences of each domain, opened on first use, because evaluation needs none.

        Raises:
            UserError: if a split is missing, damaged, or shorter than one sequence.
        """
        return [self._open_blocks(domain, "train") for domain in self.domains]

    def open_split_of_every_domain(self, split: str) -> None:
        """Open a split of every domain, so that later evaluations cannot fail on missing files.

        Raises:
            UserError: if a split is missing, malformed or empty.
        """
        for domain in self.domains:
            self._open_blocks(domain, split)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Tokenizer folder of the data-bin; None if it has none."""
        folder = self.databin.path / "tokenizer"
        return folder if folder.is_dir() else None

    def build_train_batches(
        self,
        division: BatchDivision,
        *,
        sampler: str,
        alpha: float,
        seed: int,
        local_domains: Sequence[str] | None = None,
    ) -> TrainBatches:
        """Build the training micro-batches of one rank.

        Args:
            division: division of a step over all domains; its ranks are those that share a stream.
            sampler: "balanced", "unbalanced" or "temperature".
            alpha: exponent of the sizes of domains, for "temperature" only.
            seed: seed of the order.
            local_domains: domains of this rank's experts, with a stream each; None: one stream of
                all.
        Raises:
            UserError: if the batch cannot be divided evenly, if `local_domains` is set and the
                sampler is not "balanced", or as `train_blocks`.
        """
        if local_domains is not None and sampler != "balanced":
            raise UserError(
                f"--sampler {sampler}: each expert reads its own domain only, in equal shares; "
                "use balanced, or --untie none"
            )
        order = make_sampler(sampler, [len(blocks) for blocks in self.train_blocks], seed, alpha)
        if local_domains is None:
            return TrainBatches.build_shared_stream(self.train_blocks, order, division)
        numbers = [self.domains.index(domain) for domain in local_domains]
        return TrainBatches.build_domain_streams(self.train_blocks, order, division, numbers)

    def build_masked_batches(
        self,
        split: str,
        masking: Masking,
        division: BatchDivision,
        *,
        sampler: str,
        alpha: float,
        seed: int,
        instances: int,
        prefix: int,
    ) -> MaskedBatches:
        """Build one rank's micro-batches of masked tokens, all domains in one stream.

        Args:
            split: "train", "valid" or "test".
            masking: settings of masking.
            division, seed, instances, prefix: see `MaskedBatches`.
            sampler, alpha: see `build_train_batches`.
        Raises:
            UserError: if a split is missing or damaged, or a micro-batch does not fill its groups.
        """
        datasets = [self._open_blocks(domain, split).dataset for domain in self.domains]
        lengths = [max(1, count_full_blocks(dataset, self.block_size)) for dataset in datasets]
        return MaskedBatches(
            datasets,
            make_sampler(sampler, lengths, seed, alpha),
            masking,
            division,
            block_size=self.block_size,
            instances=instances,
            seed=seed,
            prefix=prefix,
        )

    def iterate_eval_batches(
        self, domain: str, split: str, batch_size: int, max_batches: int
    ) -> Iterator[Batch]:
        """Yield the batches of a split of a domain in file order.

        They are those of `megamod.data.lm.batches.iterate_eval_batches`.

        Args:
            domain: one of `domains`.
            split: "train", "valid" or "test".
            batch_size: sequences of a batch.
            max_batches: largest number of batches; 0: all.
        Raises:
            UserError: if the split is missing or damaged.
        """
        batches = iterate_eval_batches(self._open_blocks(domain, split), batch_size)
        return islice(batches, max_batches or None)

    def get_text_bytes(self, domain: str, split: str) -> int:
        """Return the number of UTF-8 bytes of the text of a split; 0 if unknown (fairseq).

        Raises:
            UserError: for an unknown domain or split.
        """
        return self.databin.get_text_bytes(domain, split)

    def _open_blocks(self, domain: str, split: str) -> TokenBlocks:
        """Return the sequences of a domain's split, which is opened by the first call only.

        Raise UserError if it is missing or damaged.
        """
        if (domain, split) not in self._opened:
            blocks = self.databin.open_blocks(
                domain, split, self.block_size, self.domain_tokens.get(domain)
            )
            self._opened[domain, split] = blocks
        return self._opened[domain, split]
