"""``python -m tstlens.cli``."""

from tstlens.cli import main

if __name__ == "__main__":
    main()
