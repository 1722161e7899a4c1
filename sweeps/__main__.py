"""`python -m sweeps`: a study from grid to report. `make sweep` calls it.

Empty values are ignored: the Makefile passes every variable. It writes the report even if a cell failed. The exit code
is that of `harness.launch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis.laws.catalogue import get as law
from harness.config import ARCHITECTURES
from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.grid.study import load_study
from harness.sweep.execute import launch
from harness.sweep.request import Request
from harness.terminal import run_command, say

DEFAULT_STUDY = "quick"

OVERRIDES = {
    "width": ("sae.n_latents", "numbers of latents, e.g. 256,512"),
    "k": ("sae.k", "active latents, e.g. 8,16"),
    "experts": ("sae.n_experts", "experts of the Switch SAEs"),
    "activations": ("activations", "where x comes from: minilm, gpt2, synthetic …"),
    "tokens": ("train.tokens", "training tokens per run, e.g. 1e6"),
    "seeds": ("train.seed", "seeds, e.g. 0,1"),
    "cluster": ("cluster", "where runs run"),
    "dp": ("mesh.dp", "replicas that see different tokens"),
    "shard": ("mesh.shard", "ranks that share the latents of a replica"),
    "sweep": ("sweep", "name of the directory under --out that collects the runs; default: the study's"),
    "out": ("out", "output directory; default: runs"),
}
"""Option of this command → key of the configuration, and help."""


def request(arguments: argparse.Namespace) -> Request:
    """The options as overrides of a study. Raises `UserError`."""
    overrides = [
        f"{key}={value}" for name, (key, _) in OVERRIDES.items() if (value := getattr(arguments, name).strip())
    ]
    only: dict[str, list[str]] = {}
    if architectures := [name.strip() for name in arguments.arch.split(",") if name.strip()]:
        for name in architectures:
            if name not in ARCHITECTURES:
                raise UserError(f"--arch {name} (ARCH) is not known; choose from: {', '.join(ARCHITECTURES)}")
        only["sae.architecture"] = architectures
    study = load_study(arguments.study.strip() or DEFAULT_STUDY)
    law(study.law)  # refused before anything is trained
    return Request([*overrides, *arguments.overrides], study, only)


def report(sweep_dir: Path) -> None:
    """Fit and write the report of a sweep. A problem is reported and does not change the exit code."""
    from analysis.cli import main as analysis

    if analysis(["report", str(sweep_dir)]) != 0:
        say(f"no report for {sweep_dir}; later: python -m analysis report {sweep_dir}")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m sweeps", description="Run a study and write its report.", allow_abbrev=False
    )
    result.add_argument("--study", default="", help=f"study name or file; default: {DEFAULT_STUDY}")
    result.add_argument("--arch", default="", metavar="A,B", help=f"only these of: {', '.join(ARCHITECTURES)}")
    for name, (key, text) in OVERRIDES.items():
        result.add_argument(f"--{name}", default="", metavar="A,B", help=f"{text} ({key})")
    result.add_argument("--dry-run", action="store_true", help="show cells and costs; write nothing")
    result.add_argument(
        "--wait", action="store_true", help="with CLUSTER=slurm: return, with a report, when all have ended"
    )
    result.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further Hydra overrides")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        outcome = launch(request(arguments), dry_run=arguments.dry_run, wait=arguments.wait)
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST
    if arguments.dry_run or outcome.submitted or outcome.exit_code == INTERRUPTED:
        return outcome.exit_code
    for sweep_dir in outcome.sweep_dirs:
        report(sweep_dir)
    if outcome.exit_code:
        say("some cells are not done: see the lines above, `python -m harness.status` and the report")
    return outcome.exit_code


if __name__ == "__main__":
    run_command(main)
