"""`python -m harness.evaluate TARGET…`: judge finished SAEs by what their features are worth.

A target is a run directory, a sweep directory, or an SAE that another tool wrote, as `KIND:PATH`; the last needs
overrides that choose its model and hook, such as `activations=gpt2 activations.layer=8`. What was evaluated before is
not evaluated again. Exit codes: 0 all there, 1 a metric failed, 2 a wrong request, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.config import ActivationsConfig
from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import user_path
from harness.process.signals import stop_on_signals
from harness.progress import own_progress
from harness.quality.judge import TOKENS, chosen_metrics, judge
from harness.quality.metric import Subject
from harness.quality.registry import METRICS
from harness.quality.subjects import foreign_subject, is_foreign, subjects_of
from harness.saes.foreign import READERS
from harness.sweep.request import Request, requested_cells
from harness.terminal import counted, path_argument, run_command, say


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.evaluate",
        description="Judge finished SAEs; results are written to quality/ in each run directory.",
        epilog="Metrics: " + "; ".join(f"{name} ({metric.about})" for name, metric in METRICS.items()),
        allow_abbrev=False,
    )
    result.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help=f"run or sweep directory, or KIND:PATH with activations=… (KIND: {', '.join(READERS)})",
    )
    result.add_argument("--metrics", default=",".join(METRICS), metavar="A,B", help="default: all")
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


def foreign_activations(overrides: Sequence[str]) -> ActivationsConfig:
    """The activations that overrides choose. Raises `UserError` if there are none."""
    if not overrides:
        raise UserError("an SAE of another tool needs its model and hook: add activations=… (and activations.layer=…)")
    any_sae = ["sae=topk", "sae.n_latents=1", "sae.k=1", "train=quick"]
    return requested_cells(Request([*any_sae, *overrides]))[0].config.activations


def evaluate(arguments: argparse.Namespace) -> int:
    """Raises `UserError` for a wrong request."""
    metrics = chosen_metrics([name.strip() for name in arguments.metrics.split(",") if name.strip()])
    if not metrics:
        raise UserError("--metrics names none")
    if not 1 <= arguments.tokens <= 1e9:
        raise UserError(f"--tokens {arguments.tokens:g} must be at least 1 and at most 1e9")
    subjects: list[Subject] = []
    overrides = [word for word in arguments.targets if word.partition("=")[0].split(".")[0] == "activations"]
    for target in (word for word in arguments.targets if word not in overrides):
        if is_foreign(target):
            out = arguments.out.resolve()
            subjects.append(foreign_subject(target, foreign_activations(overrides), out))
            continue
        found, notes = subjects_of(Path(user_path(target)))
        subjects += found
        for note in notes:
            say(f"note: {note}")
    with stop_on_signals() as stop:
        judged = judge(
            subjects,
            metrics,
            round(arguments.tokens),
            force=arguments.force,
            stop=stop,
            progress=own_progress(),
            by=arguments.judge,
        )
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
