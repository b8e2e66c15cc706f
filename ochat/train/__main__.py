"""`torchrun --nproc-per-node N -m ochat.train CONFIG.toml --section.key=value ...`: `ochat train` in each process."""

import os
import signal
import sys

from ochat import background

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # until the watchdog watches it; before torch is imported, which takes long
        background.end_with_launcher(signal.SIGTERM)

    from ochat import cli

    cli.run("train", sys.argv[1:])
