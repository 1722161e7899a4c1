"""`python -m harness.bench`: the training step by part, against its floor, and beside other people's code.

Every contender is a process of its own with the same initial weights and the same batch. It answers "round" with the
time of one step. The driver asks them in turn, so that other load on the machine affects all of them alike.
"""
