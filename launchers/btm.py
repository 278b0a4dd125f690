"""The command `megamod btm` as a file, for deepspeed and torchrun."""

from megamod.commands.btm import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
