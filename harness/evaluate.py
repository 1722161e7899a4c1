"""`python -m harness.evaluate TARGET…`: judge finished SAEs by what their features are worth.

A target is a run directory, a sweep directory, or an SAE that another tool wrote, as `KIND:PATH`; the last needs
overrides that choose its model and hook, such as `activations=gpt2 activations.layer=8`. What was evaluated before is
not evaluated again. With `cluster=slurm` (and `cluster.*=…`) runs are evaluated in an array of jobs, one run each.
Exit codes: 0 all there or submitted, 1 a metric failed, 2 a wrong request, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.config import ActivationsConfig, ClusterConfig, Config
from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import user_path
from harness.process.signals import stop_on_signals
from harness.progress import own_progress
from harness.quality.judge import TOKENS, chosen_metrics, judge, unfinished
from harness.quality.judges import require_judge
from harness.quality.metric import Metric, Subject
from harness.quality.registry import METRICS
from harness.quality.subjects import foreign_subject, is_foreign, subjects_of
from harness.record.quality import quality_path
from harness.saes.foreign import KINDS
from harness.sweep.request import Request, requested_cells
from harness.terminal import Parser, counted, path_argument, run_command, say


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m harness.evaluate",
        description="Judge finished SAEs; results are written to quality/ in each run directory.",
        epilog="Metrics: " + "; ".join(f"{name} ({metric.about})" for name, metric in METRICS.items()),
        allow_abbrev=False,
    )
    result.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help=f"run or sweep directory, or KIND:PATH with activations=… (KIND: {', '.join(KINDS)})",
    )
    result.add_argument("--metrics", metavar="A,B", help="default: all that need nothing which is not here")
    result.add_argument("--tokens", type=float, default=TOKENS, metavar="N", help=f"tokens of text; default {TOKENS}")
    result.add_argument(
        "--judge",
        default="embedding",
        metavar="JUDGE",
        help="of explanations: embedding (default), pattern, local:MODEL, http:URL#MODEL (key in JUDGE_API_KEY)",
    )
    result.add_argument(
        "--out",
        type=path_argument,
        default=Path("runs"),
        metavar="DIR",
        help="where results of foreign SAEs go; default: runs",
    )
    result.add_argument("--force", action="store_true", help="evaluate again what exists")
    return result


def configured(overrides: Sequence[str]) -> Config:
    """The configuration with these overrides of `activations` and `cluster`. Raises `UserError`."""
    any_sae = ["sae=topk", "sae.n_latents=1", "sae.k=1", "train=quick"]
    return requested_cells(Request([*any_sae, *overrides]))[0].config


def foreign_activations(overrides: Sequence[str]) -> ActivationsConfig:
    """The activations that overrides choose. Raises `UserError` if there are none."""
    if not overrides:
        raise UserError("an SAE of another tool needs its model and hook: add activations=… (and activations.layer=…)")
    return configured(overrides).activations


def submit(
    subjects: Sequence[Subject], metrics: Sequence[Metric], arguments: argparse.Namespace, cluster: ClusterConfig
) -> int:
    """An array on Slurm with one run per element. Raises `UserError`."""
    from harness.places.slurm.evaluations import submit_evaluations

    if any(subject.foreign for subject in subjects):
        raise UserError("cluster=slurm evaluates runs and sweeps; evaluate SAEs of other tools without it")
    tokens = round(arguments.tokens)
    if arguments.force:
        for subject in subjects:
            for metric in metrics:
                quality_path(subject.directory, metric.name).unlink(missing_ok=True)
    missing = unfinished(subjects, metrics, tokens, arguments.judge)
    say(f"{len(subjects) - len(missing)} of {counted(len(subjects), 'run')} are evaluated")
    options = [] if arguments.metrics is None else ["--metrics", ",".join(metric.name for metric in metrics)]
    options += ["--tokens", str(tokens)]
    submit_evaluations([subject.directory for subject in missing], [*options, "--judge", arguments.judge], cluster)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Raises `UserError` for a wrong request."""
    every = arguments.metrics is None
    metrics = chosen_metrics(
        [*METRICS] if every else [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    )
    if not metrics:
        raise UserError("--metrics names none")
    if not 1 <= arguments.tokens <= 1e9:
        raise UserError(f"--tokens {arguments.tokens:g} must be at least 1 and at most 1e9")
    require_judge(arguments.judge)
    subjects: list[Subject] = []
    overrides = [word for word in arguments.targets if word.partition("=")[0].split(".")[0] == "activations"]
    places = [word for word in arguments.targets if word.partition("=")[0].split(".")[0] == "cluster"]
    for target in (word for word in arguments.targets if word not in (*overrides, *places)):
        if is_foreign(target):
            out = arguments.out.resolve()
            subjects.append(foreign_subject(target, foreign_activations(overrides), out))
            continue
        found, notes = subjects_of(Path(user_path(target)))
        subjects += found
        for note in notes:
            say(f"note: {note}")
    subjects = list({subject.directory: subject for subject in subjects}.values())  # a run and its sweep may be given
    if places and (cluster := configured(places).cluster).name == "slurm":
        return submit(subjects, metrics, arguments, cluster)
    with stop_on_signals() as stop:
        judged = judge(
            subjects,
            metrics,
            round(arguments.tokens),
            force=arguments.force,
            stop=stop,
            progress=own_progress(),
            by=arguments.judge,
            possible=every,
        )
    for line in judged.left_out:
        say(f"left out: {line}")
    for problem in judged.problems:
        say(f"error: {problem}")
    say(f"{counted(judged.done, 'evaluation')} done, {judged.present} were there")
    if judged.stopped:
        say("interrupted; the same command goes on from there")
        return INTERRUPTED
    return 1 if judged.problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return evaluate(parser().parse_intermixed_args(argv))
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST


if __name__ == "__main__":
    run_command(main)
