"""`python -m anyattention.cli`, the same as the command `anyattention`."""

import sys

from anyattention.cli import main

if __name__ == "__main__":
    sys.exit(main())
