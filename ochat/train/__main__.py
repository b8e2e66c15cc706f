"""`torchrun --nproc-per-node N -m ochat.train CONFIG.toml --section.key=value ...`; `python -m ochat.train --help`
lists every key."""

from ochat.commands.train import main

if __name__ == "__main__":
    main()
