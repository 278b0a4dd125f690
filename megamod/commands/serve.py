"""Serve a model over HTTP: classifiers and taggers in groups, completions, a page to try it.

    megamod serve runs/sst2/model
    megamod serve runs/btm --port 8001 --prior prior.json
    megamod serve runs/demix/model --domain law --max_tokens 256
    megamod serve runs/mux5/model --max_wait_ms 20 --max_batch 16 --max_queue 512

MODEL is a folder or hub name: a classifier of texts or words of megamod finetune-glue or
finetune-ner, multiplexed or not, or a language model, expert or forest as of megamod generate. The
page at / tries it, /v1/models describes it, /healthz and /metrics are for operators. SIGTERM and
Ctrl-C end the server once everything accepted is answered. docs/serving.md describes the requests.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, move_argument_to_flag, option, parse_args, require_values


@dataclass
class ServeArgs(Arguments):
    """Model, address and limits."""

    model: str | None = option(None, "model to serve, by folder or hub name; also bare, as above")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8000, "port to listen on; 0: any free one", least=0, most=65535)
    max_queue: int = option(
        128, "waiting inputs at most; a request beyond them gets status 429", least=1
    )
    max_wait_ms: float = option(
        10.0, "milliseconds that an incomplete group of N inputs waits for others", least=0
    )
    max_batch: int = option(8, "groups of N inputs in a forward pass", least=1)
    max_seq_length: int | None = option(
        None,
        "tokens of an input of a classifier, as in its training; none: as in its run, else 128",
        least=3,
    )
    max_tokens: int = option(1024, "tokens at most that a completion may ask for", least=1)
    domain: str | None = option(None, "expert to write with; none: all, mixed")
    prior: str | None = option(
        None, "JSON file of megamod eval-ensemble: weights of the experts at the first token"
    )

    def __post_init__(self):
        """Check the flags; raise UserError for --domain with --prior."""
        super().__post_init__()
        if self.domain is not None and self.prior is not None:
            raise UserError(f"--domain {self.domain} and --prior {self.prior}: give one of the two")


def main() -> None:
    """Parse the flags, load the model, and serve it until a signal.

    Raises:
        UserError: if --model or the packages of the server are missing, the address cannot be
            used, or as `load_service`.
    """
    (args,) = parse_args(
        ServeArgs, argv=move_argument_to_flag(sys.argv[1:], "--model"), doc=__doc__
    )
    require_values(args, "model")
    try:
        from megamod.serving.server import DrainingServer
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, which megamod serve needs: "
            "pip install 'megamod[serve]'"
        ) from error
    from megamod.serving.address import bind_socket

    bound = bind_socket(args.host, args.port)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from megamod.runs.node_log import start_logging
    from megamod.serving.app import make_app
    from megamod.serving.load import load_service

    start_logging()
    disable_progress_bar()
    # That long inputs are cut is documented; a line for each batch would fill the log.
    logging.getLogger("megamod.data.tasks.classification").setLevel(logging.ERROR)
    service = load_service(
        args.model,
        domain=args.domain,
        prior=Path(args.prior) if args.prior else None,
        max_tokens=args.max_tokens,
        max_batch=args.max_batch,
        max_seq_length=args.max_seq_length,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    app = make_app(service, max_wait=args.max_wait_ms / 1000, max_queue=args.max_queue)
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{bound.getsockname()[1]}/"
    DrainingServer(app, f"{args.model} ({service.kind}) is served at {address}").run([bound])


if __name__ == "__main__":
    run_main(main)
