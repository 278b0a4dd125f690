"""Write text with a language model: dense, an expert, or the experts of a forest mixed.

    megamod generate --model runs/dense/model --prompt "The court held"
    megamod generate --model runs/demix/model --domain law --prompt "The court held" "In 1990"
    megamod generate --model runs/btm --prior prior.json --temperature 0 --max_new_tokens 100
    megamod generate --model runs/btm/law/model --num_return_sequences 3 --top_p 0.9 --seed 7

A model is a folder or hub name as those of megamod eval-lm. Several experts without --domain are
mixed token by token by their posterior, and its last value is printed below the text. Without
--prompt the text starts with the token that starts or ends a document.
"""

from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values


@dataclass
class GenerateArgs(Arguments):
    """Model, prompts and sampling."""

    model: str | None = option(
        None, "model, expert or forest, by folder or hub name", alias="model_name_or_path"
    )
    prompt: list[str] | None = option(  # noqa: RUF009
        None, "text to continue, each in quotes; none: a new document"
    )
    domain: str | None = option(None, "expert to write with; none: all, mixed")
    prior: str | None = option(
        None, "JSON file of megamod eval-ensemble: weights of the experts at the first token"
    )
    max_new_tokens: int = option(64, "longest continuation, in tokens", least=1)
    temperature: float = option(
        0.8, "divisor of the logits; 0: the most probable token each time", least=0
    )
    top_p: float = option(
        1.0, "sample from the most probable tokens of this total probability", least=0.01, most=1
    )
    num_return_sequences: int = option(1, "continuations per prompt", least=1)
    seed: int = option(1, "seed of the sampling", least=0, most=2**32 - 1)

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for --domain with --prior, or several continuations at temperature 0.
        """
        super().__post_init__()
        if self.domain is not None and self.prior is not None:
            raise UserError(f"--domain {self.domain} and --prior {self.prior}: give one of the two")
        if not self.temperature and self.num_return_sequences > 1:
            raise UserError(
                f"--num_return_sequences {self.num_return_sequences}: with --temperature 0 all "
                "would be equal"
            )


def main() -> None:
    """Parse the flags, load the model, and print the continuations of every prompt.

    Raises:
        UserError: if --model is missing, or as `load_text_generator` and `TextGenerator.generate`.
    """
    (args,) = parse_args(GenerateArgs, doc=__doc__)
    require_values(args, "model")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from megamod.evaluation.generate import Sampling, load_text_generator
    from megamod.runs.node_log import start_logging

    start_logging()
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Path(args.prior) if args.prior else None
    text_generator = load_text_generator(args.model, args.domain, prior, device)
    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_p, args.num_return_sequences, args.seed
    )
    for prompt in args.prompt or [""]:
        for text in text_generator.generate(prompt, sampling):
            print(text.text)
            if text.weights is not None:
                shares = "  ".join(f"{name} {share:.2f}" for name, share in text.weights.items())
                print(f"[{shares}]")
            print(flush=True)


if __name__ == "__main__":
    run_main(main)
