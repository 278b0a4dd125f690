"""The command `megamod plan` as a file, for deepspeed and torchrun."""

from megamod.commands.plan import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
