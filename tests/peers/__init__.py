"""Our training beside other implementations of the same SAEs, in pairs: same batches, initial weights, learning rate,
schedule, normalised input and evaluator; what differs is the code that trains.

    python -m tests.peers.dense_switch                # Switch against dense, masked autograd; needs nothing more
    python -m tests.peers.dictionary_learning_topk    # TopK against dictionary_learning 0.1.0's own TopKTrainer

The second needs an environment that has this project *and* dictionary_learning, for example

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install -e . dictionary-learning==0.1.0
    .venv-peers/bin/python -m tests.peers.dictionary_learning_topk

Where dictionary_learning pins something that clashes with the project's own pins, its trainer needs only
`pip install --no-deps dictionary-learning==0.1.0 "nnsight<0.4" accelerate einops python-socketio python-engineio bidict
simple-websocket wsproto`. The trainer is imported as installed, and nothing in it is replaced.

Both commands take their settings from `train=quick` and from overrides (`train.batch_tokens=512`), harvest the default
activations when they are missing (`--activations DIR` takes a finished store), print every run, then a table in
Markdown, and exit with 1 when a comparison fails. Figures: docs/lab-log.md.

`bionemo_like` and `flashsae_like` are contenders of `python -m harness.bench` on a GPU, run by `tests.peers.worker`.
"""
