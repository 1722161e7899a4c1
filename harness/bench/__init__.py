"""`python -m harness.bench`: the training step by part, against its floor, and beside other people's code.

Every contender is a process of its own that holds the same initial weights and the same batch and answers "round"
with the time of one step. The driver asks them in turn, so that whatever else the machine does falls on all of them.
"""
