"""Write one HTML page about runs: curves, scores, experts, settings; it needs no network.

    megamod report runs/demix --output demix.html
    megamod report runs/dense runs/demix runs/btm --output all.html
    megamod report runs/sweep runs/barrier mixed.json --output studies.html
    megamod report runs/dense runs/demix --serve --port 8002

A RUN is the output folder of megamod pretrain, adapt, btm, finetune-glue, finetune-ner,
finetune-mtl, finetune-all or eval-barrier, or a file of megamod eval-ensemble --output. The page
shows what they have: losses, perplexity by expert and domain, posterior and load of the experts,
score against throughput, barriers, and the settings and environments side by side with differences
marked. With --serve nothing is written: the page is at an address of this machine and follows the
runs until Ctrl-C. docs/reports.md describes it.
"""

from argparse import Namespace
from pathlib import Path

from megamod.command_line import CommandParser
from megamod.errors import UserError, run_main

HOST, PORT = "127.0.0.1", 8000


def main() -> None:
    """Parse the command line and write the page, or serve it.

    Raises:
        UserError: if a run or the folder of the page does not exist, or the port is taken.
    """
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, help="page to write (report.html)")
    parser.add_argument(
        "--serve", action="store_true", help=f"follow the runs at http://{HOST}:PORT/"
    )
    parser.add_argument("--port", type=int, help=f"port of --serve ({PORT}); 0: any free one")
    options = parser.parse_args()
    for path in options.runs:
        if not path.exists():
            raise UserError(f"{path}: there is no such run")
    if options.serve:
        _serve_page(options)
    else:
        _write_page(options)


def _write_page(options: Namespace) -> None:
    """Write the page to --output, and print its path and sections.

    Args:
        options: parsed command line of megamod report.
    Raises:
        UserError: for --port, or if the folder of the page does not exist.
    """
    if options.port is not None:
        raise UserError(f"--port {options.port}: is for --serve")
    output = options.output or Path("report.html")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    from megamod.evaluation.run_report import write_run_report

    sections = write_run_report(options.runs, output)
    print(f"{output}: {', '.join(sections)}")


def _serve_page(options: Namespace) -> None:
    """Serve the page on --port of this machine until a signal.

    Args:
        options: parsed command line of megamod report.
    Raises:
        UserError: for --output, or a port that is not allowed or is taken.
    """
    if options.output is not None:
        raise UserError(f"--output {options.output}: --serve writes no file; give one of the two")
    port = PORT if options.port is None else options.port
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: 0 to 65535 is allowed")
    from megamod.serving.address import bind_socket
    from megamod.serving.live_report import LivePage, LiveServer

    server = LiveServer(LivePage(options.runs), bind_socket(HOST, port))
    address = f"http://{HOST}:{server.socket.getsockname()[1]}/"
    print(f"{', '.join(map(str, options.runs))} at {address}; Ctrl-C ends", flush=True)
    server.serve_until_stopped()


if __name__ == "__main__":
    run_main(main)
