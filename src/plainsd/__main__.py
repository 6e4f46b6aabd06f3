"""`python -m plainsd` is the `plainsd` command."""

import sys

from plainsd.cli import entry

sys.exit(entry())
