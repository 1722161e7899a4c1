"""A mock of the W&B server on 127.0.0.1, for the real wandb client: takes runs as it uploads them, gives them back.

It knows the few GraphQL operations and the file stream that wandb 0.31 uses; an operation that it does not know gets
an empty answer. No W&B server has been seen: names and shapes are those that the client itself sends and asks for.

`python -m tests.analysis.wandb_server RUN_DIR… --out FILE` records: it replays finished runs into this server through
`harness.replay`, that is through wandb's own code, and writes what arrived.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "local-" + 40 * "0"
"""An API key of the right form; the mock asks for none."""

ENTITY = "me"


KEPT = ("groupName", "displayName", "jobType", "tags", "config")
"""Fields of an upsert that are kept; the others name the machine."""

CONFIG = ("run_id", "sae", "activations", "train", "stream")
"""Keys of the configuration that a recording keeps; the others name paths and versions."""


class Store:
    """Runs as they arrived: name → bucket (fields of the upsert), history (lines), summary, exit (code or None)."""

    def __init__(self, runs: dict[str, dict[str, Any]] | None = None) -> None:
        self.runs = runs or {}
        self.operations: list[str] = []
        """Names of the operations, in order."""

    def upsert(self, fields: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(fields["name"], {"bucket": {}, "history": [], "summary": {}, "exit": None})
        run["bucket"] |= {key: fields[key] for key in KEPT if fields.get(key) is not None}
        return run

    def stream(self, name: str, content: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, part in (content.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run["history"] += [json.loads(line) for line in part["content"]]
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        if content.get("complete"):
            run["exit"] = content.get("exitcode", 0)

    def node(self, name: str) -> dict[str, Any]:
        """Every field of a run that the client asks for; which of them it gets is up to its query."""
        run = self.runs[name]
        bucket = run["bucket"]
        last = max((line["_step"] for line in run["history"]), default=0)
        return {
            "id": f"UnVuOg=={name}",
            "projectId": "1",
            "tags": bucket.get("tags") or [],
            "name": name,
            "displayName": bucket.get("displayName"),
            "sweepName": None,
            "state": "running" if run["exit"] is None else "finished" if run["exit"] == 0 else "failed",
            "config": bucket.get("config", "{}"),
            "group": bucket.get("groupName"),
            "jobType": bucket.get("jobType"),
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-11-20T00:00:00Z",
            "heartbeatAt": "2026-11-20T00:00:00Z",
            "description": "",
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "historyTail": [json.dumps(line) for line in run["history"][-1:]],
            "eventsTail": [],
            "eventsLineCount": 0,
            "logLineCount": 0,
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": {"lastStep": last, "keys": {}, "sets": []},
        }


def answer(store: Store, query: str, variables: dict[str, Any], page: int = 2) -> dict[str, Any]:
    """The `data` of a GraphQL answer. Runs come in pages of at most `page`, so that paging is used."""
    match = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
    operation = match.group(1) if match else "?"
    store.operations.append(operation)
    wanted = set(re.findall(r"\b\w+\b", query))
    if operation == "Runs":
        filters = json.loads(variables["filters"])
        names = [name for name in store.runs if _matches(store.node(name), filters)]
        start = int(variables.get("cursor") or 0)
        some = names[start : start + page]
        edges = [
            {"node": {key: value for key, value in store.node(name).items() if key in wanted}, "cursor": str(start + i)}
            for i, name in enumerate(some, 1)
        ]
        ends = {"endCursor": str(start + len(some)), "hasNextPage": start + len(some) < len(names)}
        runs = {"edges": edges, "pageInfo": ends}
        return {"project": {"internalId": "1", "runCount": len(names), "readOnly": False, "runs": runs}}
    if operation == "UpsertBucket":
        store.upsert(variables)
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": ENTITY}}
        node = store.node(variables["name"])
        return {"upsertBucket": {"bucket": {**node, "project": project}, "inserted": True}}
    if operation == "RunResumeStatus":
        bucket = None
        if variables["name"] in store.runs:
            node = store.node(variables["name"])
            tails = {"historyTail": json.dumps(node["historyTail"]), "eventsTail": "[]"}
            bucket = node | tails | {"wandbConfig": '{"t": 1}'}  # "t" says that it was started before
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": ENTITY}}
        return {"model": {**project, "bucket": bucket}}
    if operation == "CreateRunFiles":
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
    if operation == "HistoryPage":
        lines = store.runs[variables["run"]]["history"]
        low, high = variables["minStep"], variables["maxStep"]
        chosen = [json.dumps(line) for line in lines if low <= line["_step"] < high][: variables["pageSize"]]
        return {"project": {"run": {"history": chosen}}}
    if operation == "RunParquetHistory":
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}
    if "viewer" in wanted:
        who = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": who}
    name = variables.get("name") or variables.get("run") or variables.get("runName")
    if "project" in wanted and name in store.runs:
        return {"project": {"internalId": "1", "run": store.node(name)}}
    return {}


def _matches(node: dict[str, Any], filters: dict[str, Any]) -> bool:
    return all(node.get(key) == value for key, value in filters.items())


class _Handler(BaseHTTPRequestHandler):
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_POST(self) -> None:
        body = self._body()
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            reply = {"data": answer(self.store, request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.store.stream(self.path.split("/")[-2], json.loads(body))
        self._send(reply)

    def do_GET(self) -> None:
        self._send({})

    do_PUT = do_POST

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed closes its connection; other errors are shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(store: Store):
    """The mock on a free port of 127.0.0.1; yields its address."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    store = Store()
    with serving(store) as address:
        os.environ |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "WANDB_SILENT": "true"}
        from harness.replay import replay

        for run_dir in arguments.run_dirs:
            print(run_dir.name, replay(run_dir))
        import wandb

        wandb.teardown()
    print("operations:", sorted(set(store.operations)), file=sys.stderr)
    for run in store.runs.values():
        config = json.loads(run["bucket"]["config"])
        run["bucket"]["config"] = json.dumps({key: config[key] for key in CONFIG})
    arguments.out.write_text(json.dumps(store.runs, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
