"""`python3 -m chronicals_trl.bench ops`: what `chronicals-trl bench ops` does, without the console script."""

import sys

from chronicals_trl.bench.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python3 -m chronicals_trl.bench"))
