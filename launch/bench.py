"""`bigbag bench` as a script: ``python launch/bench.py ops --op attention_pool --sizes 10000,100000 --csv out.csv``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigbag.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
