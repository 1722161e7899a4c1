"""`python -m analysis fit|report|gallery|compare|predict|plan|ask …`.

Exit codes: 0 done (notes may apply), 1 no fit possible, 2 a wrong request.
"""

from analysis.cli import main
from harness.terminal import run_command

if __name__ == "__main__":
    run_command(main)
