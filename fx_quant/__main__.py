"""The command line: ``fx-quant`` or ``python -m fx_quant``."""

from __future__ import annotations

import sys

from fx_quant.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
