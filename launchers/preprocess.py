"""The command `megamod preprocess` as a file that python, deepspeed and torchrun run."""

from megamod.commands.preprocess import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
