"""``python -m eagerq``."""

from eagerq.cli import main

if __name__ == "__main__":
    main()
