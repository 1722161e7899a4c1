"""W&B's own environment variables, which hold where the user has not set ours, and the names that W&B refuses."""

from __future__ import annotations

import dataclasses
import os

from harness.config import TrackerConfig
from harness.errors import UserError

PROJECT = "sae-scaling"
"""The project if nobody names one."""

MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""Values of WANDB_MODE; the last two are old names of offline and online."""

AGENT = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")
"""What `wandb agent` tells its program: every run that begins with these is the agent's one run."""


def with_environment(tracker: TrackerConfig) -> TrackerConfig:
    """`tracker` with WANDB_PROJECT, WANDB_ENTITY and WANDB_TAGS in the fields that are empty. Raises `UserError` for
    what W&B would refuse."""
    if tracker.name != "wandb":
        return tracker
    get = os.environ.get
    tags = [tag.strip() for tag in get("WANDB_TAGS", "").split(",") if tag.strip()]
    resolved = dataclasses.replace(
        tracker,
        project=tracker.project or get("WANDB_PROJECT") or PROJECT,
        entity=tracker.entity or get("WANDB_ENTITY") or "",
        tags=tracker.tags or tags,
    )
    _check(resolved)
    return resolved


def _check(tracker: TrackerConfig) -> None:
    if len(tracker.project) > 128 or set(tracker.project) & set("/\\#?%:"):
        raise UserError(
            f"tracker.project={tracker.project!r} is no W&B project (WANDB_PROJECT counts too): "
            "at most 128 characters, none of / \\ # ? % :"
        )
    if set(tracker.entity) & set("/\\#?%: "):
        raise UserError(
            f"tracker.entity={tracker.entity!r} is no W&B entity (WANDB_ENTITY counts too): none of / \\ # ? % : space"
        )
    for tag in tracker.tags:
        if not 1 <= len(tag) <= 64:
            shown = tag if len(tag) <= 40 else f"{tag[:37]}..."
            raise UserError(
                f"tracker.tags: W&B takes tags of 1 to 64 characters, {shown!r} has {len(tag)} (WANDB_TAGS counts too)"
            )
    if (mode := os.environ.get("WANDB_MODE", "")) and mode not in MODES:
        raise UserError(f"WANDB_MODE={mode} is not known to W&B; choose one of: {', '.join(MODES)}")


def leave_agent() -> bool:
    """Hide the run of a W&B agent from this process and its children; whether there was one.

    For several cells, which would all go into that run.
    """
    under_agent = "WANDB_SWEEP_ID" in os.environ
    for name in AGENT:
        os.environ.pop(name, None)
    return under_agent
