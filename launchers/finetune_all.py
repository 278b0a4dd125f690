"""The command `megamod finetune-all` as a file that python, deepspeed and torchrun run."""

from megamod.commands.finetune_all import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
