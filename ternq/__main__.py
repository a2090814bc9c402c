"""``python -m ternq`` is the command ``ternq``."""

from ternq.cli import main

if __name__ == "__main__":
    main()
