"""The process between training and Weights & Biases: reads messages from its input, one JSON object a line.

Every run has its own thread, so that one that hangs does not hold up the others. Without an API key runs are
recorded offline, in `<run_dir>/wandb/`; `wandb sync` sends them later.
"""

from __future__ import annotations

import http.client
import json
import netrc
import os
import queue
import secrets
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from harness.config import Config, from_container, to_container
from harness.files import write_json_atomic

INIT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 4.0


def has_api_key() -> bool:
    """Whether W&B would find a key: in the environment or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(server()).hostname or ""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        try:
            if netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def mode() -> str:
    """`WANDB_MODE` if it is set, else offline without a key."""
    return os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")


def answers(url: str) -> bool:
    """Whether a server answers at all, whatever it says. `wandb.init` takes minutes to find out, and leaves the
    run's id occupied."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def wandb_id(run_dir: Path) -> str:
    """The W&B run of this directory, made up at the first call: W&B never accepts the id of a deleted run again."""
    path = run_dir / "tracker.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["wandb_id"]
    made = f"{run_dir.name}-{secrets.token_hex(3)}"
    write_json_atomic(path, {"wandb_id": made})
    return made


class WandbRun:
    """One run of W&B, open. Raises whatever wandb raises; callers decide what that means."""

    def __init__(self, run_dir: Path, config: Config, mode: str) -> None:
        import wandb

        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True, x_stats_pid=os.getppid())
        self._run = wandb.init(
            id=wandb_id(run_dir),
            name=run_dir.name,
            group=config.sweep,
            job_type="train",
            project=config.tracker.project,
            entity=config.tracker.entity or None,
            tags=[*config.tracker.tags, config.sae.architecture],
            resume="allow",
            reinit="create_new",
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=run_dir,
            config={**to_container(config), "run_id": run_dir.name},
            settings=settings,
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._last_step = -1

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line under its optimiser step; steps that went backwards (repeated after a resume) are dropped."""
        step = int(line["step"])
        if step < self._last_step:
            return
        self._last_step = step
        self._run.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=step)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        # Fragments of a resumed run don't see each other, so the summary is written, not derived.
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)


class _Worker(threading.Thread):
    """Sends one run; a failure is told once and ends the mirroring of this run."""

    def __init__(self, run_dir: Path, mode: str) -> None:
        super().__init__(daemon=False, name=f"wandb {run_dir.name}")
        self._run_dir, self._mode = run_dir, mode
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            content = yaml.safe_load((self._run_dir / "config.yaml").read_text(encoding="utf-8"))
            run = self._open(from_container(content))
            while (message := self.inbox.get()) is not None:
                if message["do"] == "log":
                    run.log(message["line"])
                else:
                    run.finish(message["summary"], message["exit_code"])
                    return
            run.finish({}, 1)  # training ended without a word
        except Exception as error:
            _warn(f"W&B failed for {self._run_dir.name}, its own record is complete: {_first_line(error)}")

    def _open(self, config: Config) -> WandbRun:
        try:
            return WandbRun(self._run_dir, config, self._mode)
        except Exception as error:
            if self._mode == "offline":
                raise
            _warn(f"W&B cannot be reached ({_first_line(error)}); recording offline. {_how_to_sync(self._run_dir)}")
            return WandbRun(self._run_dir, config, "offline")


_said: set[str] = set()


def _warn(line: str) -> None:
    """Say it once per kind: a sweep of a thousand runs has one network."""
    kind = line[:24]
    if kind not in _said:
        _said.add(kind)
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _how_to_sync(run_dir: Path) -> str:
    return f"Send it later: wandb sync {run_dir.parent}/*/wandb/offline-run-*"


def _announced_mode(run_dir: Path) -> str:
    """The mode for all runs of this process; says once if that is offline, why, and how to send the runs later."""
    chosen = mode()
    if chosen == "online" and not answers(server()):
        _warn(f"W&B cannot be reached at {server()}; recording offline. {_how_to_sync(run_dir)}")
        return "offline"
    if chosen == "offline":
        key = "" if has_api_key() else "no API key, "
        print(f"W&B: {key}recording offline. {_how_to_sync(run_dir)} (tracker=none: off)", file=sys.stderr)
    return chosen


def main() -> int:
    os.environ.setdefault("WANDB_SILENT", "true")
    open_runs: dict[str, _Worker] = {}
    workers: list[_Worker] = []
    chosen = "offline"
    for text in sys.stdin:
        message = json.loads(text)
        name = message["run"]
        run_dir = Path(name)
        if message["do"] == "open":
            # W&B keeps its caches in the home directory unless told otherwise
            os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir.parent / ".wandb"))
            import wandb  # noqa: F401 - here, since threads that import at once see half a module

            if not workers:
                chosen = _announced_mode(run_dir)
            worker = open_runs[name] = _Worker(run_dir, chosen)
            workers.append(worker)
            worker.start()
        elif name in open_runs:
            open_runs[name].inbox.put(message)
    for worker in workers:
        worker.inbox.put(None)
    for worker in workers:
        worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
