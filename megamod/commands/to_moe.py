"""Make one mixture of experts, of a stock class of transformers, from the experts of a forest.

    megamod to-moe --forest runs/btm --output_dir runs/moe
    megamod to-moe --forest runs/btm --calibration data-bin --output_dir runs/moe
    megamod to-moe --models runs/law runs/med --topk 2 --output_dir runs/moe
    megamod to-moe --forest runs/demix/model --router random --output_dir runs/moe
    megamod to-moe --base runs/moe --drop law --output_dir runs/without
    megamod to-moe --base runs/moe --upgrade law --path runs/law2 --output_dir runs/new
    megamod to-moe --base runs/moe --refresh law --calibration data-bin --output_dir N

Each expert's feed-forwards are copied bit by bit; other weights are averaged, or with --anchor, and
of a DEMix model, taken as they are. Llama and Mistral become Mixtral, Qwen2 and Qwen3 their
mixtures, OLMo2 becomes FlexOlmo, Granite, Ernie 4.5 and Cohere2 theirs. The folder loads with
transformers alone; moe.json beside config.json lists the experts in order with digests of their
weights and data. Router rows are calibrated on text of each domain, random, or read from a file.
Memory does not grow with the models. docs/sparse.md has more.
"""

from megamod.errors import run_main
from megamod.flags import parse_args, refuse_values_without_effect


def main() -> None:
    """Parse the flags, convert the experts to a mixture or with --base edit one, and print it.

    Raises:
        UserError: as `run_to_moe`, with --base as `run_edit`.
    """
    from megamod.runs.edit_moe import EditArgs, run_edit
    from megamod.runs.to_moe import MoeArgs, run_to_moe

    args, edit = parse_args(MoeArgs, EditArgs, doc=__doc__)
    if edit.base is not None:
        run_edit(args, edit)
        return
    refuse_values_without_effect(edit, EditArgs.__dataclass_fields__, "it goes with --base")
    run_to_moe(args)


if __name__ == "__main__":
    run_main(main)
