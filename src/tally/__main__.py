"""``python -m tally`` is the ``tally`` command."""

from tally.cli.main import main

if __name__ == "__main__":
    main()
