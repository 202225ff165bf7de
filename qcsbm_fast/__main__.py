"""`python -m qcsbm_fast`, the same as `qcsbm`."""

import sys

from qcsbm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
