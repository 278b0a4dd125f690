"""The command `megamod to-moe` as a file, for deepspeed and torchrun."""

from megamod.commands.to_moe import main
from megamod.errors import run_main

if __name__ == "__main__":
    run_main(main)
