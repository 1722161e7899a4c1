"""`python -m analysis fit|report|compare|predict|plan|ask …`.

Exit codes: 0 done (notes may apply), 1 no fit possible, 2 a wrong request.
"""

import sys

from analysis.cli import main

if __name__ == "__main__":
    sys.exit(main())
