"""The Language Model Evaluation Harness with the models of this package known to it.

    python -m megamod.lm_eval run --model hf --model_args pretrained=runs/forest \\
        --include_path my_tasks --tasks my_task --batch_size 8 --output_path results

Flags are the harness's own (`run --help`, `ls tasks`). All this adds to its command is that
`megamod` is imported first, which registers the models with the Auto classes that its ordinary
`hf` backend loads them by. Needs `pip install "megamod[eval]"`.
"""

from megamod.errors import UserError, run


def main() -> None:
    """Hand the command line over.

    Raises:
        UserError: if the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError(f'{error}; install it with: pip install "megamod[eval]"') from error
    cli_evaluate()


if __name__ == "__main__":
    run(main)
