"""Where a result comes from."""

import json

from harness.record.provenance import collect, git_state, now


def test_what_is_recorded() -> None:
    content = collect(store_id="abc", ops="auto", mesh={"dp": 1, "shard": 1})
    json.dumps(content)
    assert content["store_id"] == "abc"
    assert content["versions"]["torch"]
    assert content["machine"]["cpus_usable"] >= 1
    assert content["threads"] >= 1
    assert content["time"] <= now()


def test_the_commit_is_known_in_a_checkout() -> None:
    state = git_state()
    assert state["sha"] is None or (len(state["sha"]) == 40 and isinstance(state["dirty"], bool))
