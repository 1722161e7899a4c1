"""The papers' figures and claims, from records of runs: what they say, what came out here, and what follows."""
