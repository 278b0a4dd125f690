"""The Language Model Evaluation Harness, with the models of this package registered.

    python -m megamod.lm_eval run --model hf --model_args pretrained=runs/forest \\
        --include_path my_tasks --tasks my_task --batch_size 8 --output_path results
    python -m megamod.lm_eval run --model hf --model_args pretrained=runs/demix/model,domain=law ...

Flags are the harness's own (`run --help`, `ls tasks`). Its ordinary `hf` backend loads models by
the Auto classes of transformers, and importing `megamod` first registers the models with these.
`domain=NAME` selects an expert: a DEMix model needs it, a forest mixes its experts without it.
Needs `pip install "megamod[eval]"`.
"""

from collections.abc import Mapping
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.states.config_file import read_config_file

# Model types of this package that are no causal language models.
ENCODERS = ("ca_mtl", "mux_bert", "mux_electra", "mux_roberta")


def main() -> None:
    """Check the model on the command line, and run the harness with this command line.

    Raises:
        UserError: if the harness is not installed, or as `check_harness_model`.
    """
    try:
        from lm_eval.__main__ import HarnessCLI, cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError(f'{error}; install it with: pip install "megamod[eval]"') from error
    check_harness_model(getattr(HarnessCLI().parse_args(), "model_args", None) or {})
    cli_evaluate()


def check_harness_model(model_args: Mapping[str, object]) -> None:
    """Refuse an encoder, and a DEMix model of several domains without the name of an expert.

    Mistakes show before tasks and weights are read. Only local folders are checked.

    Args:
        model_args: values of --model_args by name.
    Raises:
        UserError: for such a model, or an expert that it does not have.
    """
    folder, domain = Path(str(model_args.get("pretrained"))), model_args.get("domain")
    if not (folder / "config.json").is_file():
        return  # a name on the hub, or for the harness to refuse
    config = read_config_file(folder)
    where, kind = f"--model_args pretrained={folder}", config.get("model_type")
    if kind in ENCODERS:
        raise UserError(
            f"{where}: is a {kind}, an encoder; the harness needs a causal language model"
        )
    domains = config.get("domains") or []
    if config.get("untie", "none") == "none" or str(domain) in domains:
        return
    if domain is not None or len(domains) > 1:
        problem = "names no expert" if domain is None else f"names domain={domain}"
        raise UserError(f"{where} {problem}; add domain=NAME, NAME one of {', '.join(domains)}")


if __name__ == "__main__":
    run_main(main)
