"""moe.json: the experts of a mixture in their order, and the origin of its weights.

    {"format": 1, "model_type": "mixtral", "shared": "averaged",
     "experts": [{"domain": "law", "path": "...", "member": null, "weight": 0.5,
                  "digest": "crc32-sha256:...", "data_digest": "..."}],
     "router": {"kind": "random", "seed": 0}, "megamod": "..."}

config.json beside it is that of the class alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megamod.errors import UserError
from megamod.files import write_json
from megamod.schemas import Items, Schema, read_checked_file
from megamod.tables import format_table
from megamod.version import __version__

FILE = "moe.json"
"""File with the experts of a mixture, beside its config.json."""
_CARD = """---
library_name: {library}
license: unknown
tags: [moe, {kind}]
---
A mixture of {count} experts ({kind}), made with megamod {version} from dense models.

{table}

Other weights: {shared}. Router: {router}. Load it with `AutoModelForCausalLM.from_pretrained`{how},
as any {kind}; `{file}` has all of this for programs.
"""


class ExpertRecord(Schema):
    """One expert of a mixture.

    Attributes:
        domain: its name in the mixture.
        path: path of the model it was copied from; `member`: its domain there, in a DEMix model.
        weight: share in the average of the other weights; None: they are no average.
        digest: digest of that model's weights, as `compute_files_digest` gives it.
        data_digest: digest of the data-bin it was trained on; None: unknown.
    """

    domain: str
    path: str
    member: str | None
    weight: float | None
    digest: str
    data_digest: str | None


class MoeRecord(Schema):
    """Content of moe.json.

    Attributes:
        model_type: model type of config.json.
        shared: origin of the weights outside of feed-forwards, see `MoePlan.shared`.
        aligned: the method that brought the features of all models to those of the first before the
            average, "weight" or "orthogonal"; None: they were not aligned.
        experts: in the order of their numbers.
        router: origin of the router rows: their "kind", and entries of that kind.
        megamod: version that wrote the file.
    """

    format: Literal[1] = 1
    model_type: str
    shared: str
    aligned: str | None = None
    experts: Items[ExpertRecord]
    router: dict[str, Any]
    megamod: str = __version__

    @property
    def domains(self) -> list[str]:
        """Domains of the experts, in their order."""
        return [expert.domain for expert in self.experts]

    def find_expert_number(self, domain: str, folder: Path) -> int:
        """Find the number of a domain's expert, from 0.

        Args:
            folder: folder of the mixture, for messages.
        Raises:
            UserError: if the mixture in `folder` has none.
        """
        if domain not in self.domains:
            raise UserError(
                f"{folder}: has no expert of domain {domain!r}; there are {', '.join(self.domains)}"
            )
        return self.domains.index(domain)


def write_moe_record(folder: Path, record: MoeRecord) -> None:
    """Write moe.json into a model folder, atomically, with the version of megamod that runs now."""
    write_json(folder / FILE, {**record.model_dump(), "megamod": __version__})


def write_moe_card(folder: Path, record: MoeRecord) -> None:
    """Write README.md, the model card of a mixture, into its folder; an existing one is replaced.

    It has the experts of `record` with their digests, and the origin of all other weights.
    """
    ours = record.model_type.startswith("demix")
    card = _CARD.format(
        library="megamod" if ours else "transformers",
        how=" after `import megamod`" if ours else "",
        kind=record.model_type,
        count=len(record.experts),
        version=__version__,
        table=_format_card_table(record.experts),
        shared=record.shared,
        router=record.router.get("kind"),
        file=FILE,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _format_card_table(experts: Sequence[ExpertRecord]) -> str:
    """Format the experts as a table in Markdown."""
    rows = [f"| {e.domain} | {e.path} | {e.digest} | {e.data_digest or '-'} |" for e in experts]
    head = ["| expert | model | digest of its weights | digest of its data |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def read_moe_record(folder: Path) -> MoeRecord:
    """Read the moe.json of a model folder.

    Raises:
        UserError: if there is none, or it is not of this form.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise UserError(
            f"{folder}: there is no {FILE}; mixtures of experts are made by megamod to-moe"
        )
    return read_checked_file(file, MoeRecord)


def format_experts(record: MoeRecord) -> str:
    """Format the experts of a mixture, with models and first digits of digests, as a text table.

    `record` is that of the mixture.
    """
    rows = [("expert", "model", "weights", "data")]
    for expert in record.experts:
        path = expert.path if expert.member is None else f"{expert.path} ({expert.member})"
        data = "-" if expert.data_digest is None else expert.data_digest[:16]
        rows.append((expert.domain, path, expert.digest.rpartition(":")[2][:16], data))
    return format_table(rows)
