"""Weights & Biases. Without an API key runs are recorded offline, in `<run_dir>/wandb/`; `wandb sync` sends them."""

from __future__ import annotations

import http.client
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from harness.config import Config, to_container
from harness.files import open_own
from harness.mirror.ids import copy_id
from harness.mirror.messages import in_one_line, say_once
from harness.mirror.offline import sync_command

INIT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 4.0


class WandbRun:
    """One run of W&B, open."""

    def __init__(self, run_dir: Path, config: Config, mode: str | None = None) -> None:
        """`mode` is that of `wandb.init`; None decides by the environment."""
        mode = mode or chosen_mode()
        # A parent that used wandb passes on its service, which outlives this process and then still holds the run's id
        os.environ.pop("WANDB_SERVICE", None)
        # W&B keeps its caches in the home directory by default
        os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir.parent / ".wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True, x_stats_pid=os.getppid())
        self._run = wandb.init(
            id=copy_id(run_dir, "wandb"),
            name=run_dir.name,
            group=os.environ.get("WANDB_RUN_GROUP") or config.sweep,
            job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
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
        # An offline recording does not know of earlier ones, and `wandb sync` renumbers the steps of those that overlap
        self._next_step_file = run_dir / "wandb" / "next_step"
        self._next_step_file.parent.mkdir(exist_ok=True)
        offline = mode == "offline"
        self.next_step = self._recorded_next_step() if offline else self._run.starting_step
        self.note = f"offline; send it: {sync_command(run_dir.parent)}" if offline else ""

    def _recorded_next_step(self) -> int:
        try:
            return int(self._next_step_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line under its optimiser step."""
        step = int(line["step"])
        self._run.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=step)
        with open_own(self._next_step_file, "w", encoding="utf-8") as file:
            file.write(str(step + 1))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        # Parts of a resumed run do not see each other, so the summary is written, not derived
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)


def open_live(run_dir: Path, config: Config) -> WandbRun:
    """Open a run whose training goes on. Offline if the server cannot be reached; one line says so, once."""
    mode = chosen_mode()
    how_to_sync = f"Send it later: {sync_command(run_dir.parent)}"
    if mode == "offline":
        key = "" if has_api_key() else "no API key, "
        say_once("offline", f"W&B: {key}recording offline. {how_to_sync} (tracker=none: off)")
    elif mode == "online":
        try:
            if answers(server()):
                return WandbRun(run_dir, config, mode)
            reason = f"at {server()}"
        except Exception as error:  # wandb's own errors differ between its versions
            reason = f"({in_one_line(error)})"
        say_once("unreachable", f"warning: W&B cannot be reached {reason}; recording offline. {how_to_sync}")
        # at its end wandb would wait ten seconds to report to a server that hangs
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = "offline"
    return WandbRun(run_dir, config, mode)


def chosen_mode() -> str:
    """`WANDB_MODE` if it is set, else offline without a key."""
    mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def has_api_key() -> bool:
    """Whether W&B finds a key: in the environment or in the netrc file that `wandb login` writes."""
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


def answers(url: str) -> bool:
    """Whether a server answers a query, with any status. One that hangs may still answer a plain GET.

    `wandb.init` takes longer to find that out, and leaves the run's id occupied: not even offline can it then begin.
    """
    headers = {"Content-Type": "application/json"}
    try:
        query = urllib.request.Request(f"{url.rstrip('/')}/graphql", b'{"query": "{viewer {id}}"}', headers)
        with urllib.request.urlopen(query, timeout=PROBE_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except (OSError, http.client.HTTPException, ValueError):
        return False
