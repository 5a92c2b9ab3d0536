"""`bigbag predict` as a script, for launchers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigbag.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
