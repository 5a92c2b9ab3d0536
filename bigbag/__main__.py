"""``python -m bigbag``: the command ``bigbag``."""

import sys

from bigbag.cli import main

sys.exit(main())
