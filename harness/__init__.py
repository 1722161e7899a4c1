"""Train sparse autoencoders over grids of sizes, for scaling laws.

Threads of OpenMP sleep while they wait for each other. By default they spin, and on a machine that others use as well
every wait then takes a core from the thread that is waited for (docs/lab-log.md). The library reads the variable when
torch loads, so it stands before every other import. Whoever has set one of the three variables decides.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
