"""`python -m ochat COMMAND ...`, the same as the console script `ochat`."""

from ochat.cli import main

if __name__ == "__main__":
    main()
