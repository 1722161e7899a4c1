"""A folder in which people look at the features of a sweep: it opens from the file system and needs no network.

What it shows comes from `quality/examples.*` in the run directories (`harness.evaluate --metrics examples`), and beside
it from whatever else was evaluated.
"""
