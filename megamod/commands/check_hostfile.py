"""Check a hostfile before a job waits for machines that do not answer.

    megamod check-hostfile hostfile
    megamod check-hostfile hostfile --experts 8
    megamod check-hostfile hostfile --ssh_port 2222
    megamod check-hostfile hostfile --no_ssh_check

Lists all faults, each with its line: duplicate names, slots that are not a number above 0, tabs,
carriage returns and other words, machines that ssh does not reach within 5 seconds without a
password, and, with --experts, experts whose ranks would be on two machines though one could hold
them. Without faults it prints a table of the ranks and experts of each machine. Exit code 0 without
faults, otherwise 2. docs/multinode.md describes the next steps.
"""

from pathlib import Path

from megamod.command_line import CommandParser
from megamod.errors import UserError, run_main


def main() -> None:
    """Parse the command line, check every host, and print the table.

    Raises:
        UserError: for a number that is not allowed, or for faults of the file; several are printed
            before, a single one is the message.
    """
    parser = CommandParser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="lines of `NAME slots=N`")
    parser.add_argument("--experts", type=int, help="domains of a DEMix run on all slots")
    parser.add_argument("--no_ssh_check", action="store_true", help="log in to no machine")
    parser.add_argument("--ssh_port", type=int, help="default: as ssh is configured")
    args = parser.parse_args()
    for flag, most in (("experts", 10**6), ("ssh_port", 65535)):
        value = getattr(args, flag)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{flag} {value}: is not from 1 to {most}")
    from megamod.dist.hostfile import HostfileFaults, check_hostfile

    try:
        checked = check_hostfile(
            args.file, experts=args.experts, ssh=not args.no_ssh_check, port=args.ssh_port
        )
    except HostfileFaults as error:
        print("\n".join(error.faults))
        raise UserError(f"hostfile {args.file} has {len(error.faults)} faults") from error
    print("\n".join([checked.format_hosts(), *checked.list_launcher_limits()]))


if __name__ == "__main__":
    run_main(main)
