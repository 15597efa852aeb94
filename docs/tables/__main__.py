"""`python -m docs.tables`: see write.py."""

import sys

from docs.tables.write import main

if __name__ == "__main__":
    sys.exit(main())
