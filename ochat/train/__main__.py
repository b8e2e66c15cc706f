"""`torchrun --nproc-per-node N -m ochat.train CONFIG.toml --section.key=value ...`: `ochat train` in each process."""

import sys

from ochat import cli

if __name__ == "__main__":
    cli.run("train", sys.argv[1:])
