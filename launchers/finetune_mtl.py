"""The command `megamod finetune-mtl` as a file, for deepspeed and torchrun."""

from megamod.commands.finetune_mtl import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
