"""`python -m sweeps`: a study from grid to report. `make sweep` calls it.

Empty values are ignored: the Makefile passes every variable. It writes the report even if a cell failed. The exit code
is that of `harness.launch`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.runs.study import require_law
from harness.architectures import ARCHITECTURES
from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.grid.study import Study, load_study
from harness.mirror.offline import sync_command, unsent
from harness.process.signals import stop_on_signals
from harness.progress import own_progress
from harness.sweep.execute import Outcome, launch
from harness.sweep.request import Request
from harness.terminal import Parser, python_command, run_command, say, shown_path, this_command

DEFAULT_STUDY = "quick"

CONTINUED = "--continued"
"""Option with which a job of a sweep that chases a forecast goes on."""

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
    require_law(study.source, study.law)
    return Request([*overrides, *arguments.overrides], study, only)


def report(sweep_dir: Path) -> None:
    """Fit and write the report of a sweep. A problem is reported and does not change the exit code."""
    from analysis.cli import main as analysis

    if analysis(["report", str(sweep_dir)]) != 0:
        say(f"no report for {shown_path(sweep_dir)}; later: {python_command('analysis', 'report', sweep_dir)}")
    if unsent(sweep_dir):
        say(f"W&B recorded offline; to send it: {sync_command(sweep_dir)}")


def evaluation_command(sweep_dir: Path, study: Study, *options: str) -> str:
    """What to type to judge the runs of a sweep as the study says."""
    tokens = ("--tokens", str(study.evaluate_tokens)) if study.evaluate_tokens else ()
    return python_command("harness.evaluate", sweep_dir, "--metrics", ",".join(study.evaluate), *tokens, *options)


def evaluate(sweep_dir: Path, study: Study) -> bool:
    """Judge the finished runs of a sweep by the metrics of its study. A problem is reported and does not change the
    exit code, like one of the report; False if somebody asked to stop."""
    from harness.quality.judge import TOKENS, chosen_metrics, judge  # these take seconds: torch
    from harness.quality.subjects import subjects_of

    try:
        subjects, _ = subjects_of(sweep_dir)
        with stop_on_signals() as stop:
            tokens = study.evaluate_tokens or TOKENS
            chosen = chosen_metrics(study.evaluate)
            judged = judge(subjects, chosen, tokens, force=False, stop=stop, progress=own_progress(), possible=True)
    except UserError as error:
        say(f"not evaluated: {error}")
        return True
    for problem in (*judged.left_out, *judged.problems):
        say(f"not evaluated: {problem}")
    if judged.stopped or judged.problems:
        say(f"to go on: {evaluation_command(sweep_dir, study)}")
    return not judged.stopped


def command(arguments: argparse.Namespace) -> str:
    """What to type to run the same again: `make sweep …` if make has started this, else the command of this process."""
    if "MAKELEVEL" not in os.environ:
        return this_command()
    options = {name: getattr(arguments, name) for name in ("study", "arch", *OVERRIDES, "until", "budget")}
    given = {name: value.strip() for name, value in options.items() if value.strip()}
    defaults = {"study": DEFAULT_STUDY, "out": "runs"}
    words = [f"{name.upper()}={value}" for name, value in given.items() if value != defaults.get(name)]
    if arguments.overrides:
        words.append(f"ARGS={shlex.join(arguments.overrides)}")
    return shlex.join(["make", "sweep", *words])


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="python -m sweeps", description="Run a study and write its report.", allow_abbrev=False)
    result.add_argument("--study", default="", help=f"study name or file; default: {DEFAULT_STUDY}")
    result.add_argument("--arch", default="", metavar="A,B", help=f"only these of: {', '.join(ARCHITECTURES)}")
    for name, (key, text) in OVERRIDES.items():
        result.add_argument(f"--{name}", default="", metavar="A,B", help=f"{text} ({key})")
    result.add_argument("--dry-run", action="store_true", help="show cells and costs; write nothing")
    result.add_argument(
        "--until", default="", metavar="GOAL", help="add cells until 'forecast n=2**17 k=64 within 3%%' is reached"
    )
    result.add_argument("--budget", default="", metavar="FLOPS", help="of the whole sweep, with --until; e.g. 1e17")
    result.add_argument(
        "--reproduce", default="", metavar="PAPER", help="all studies of gao2024 or switch2024, its figures and claims"
    )
    result.add_argument("--scale", default="", help="with --reproduce: cores (default) or paper, for a cluster")
    result.add_argument(CONTINUED, action="store_true", help=argparse.SUPPRESS)
    result.add_argument(
        "--wait", action="store_true", help="with CLUSTER=slurm: return, with a report, when all have ended"
    )
    result.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further Hydra overrides")
    return result


def _chase(asked: Request, arguments: argparse.Namespace, again: str, argv: Sequence[str]) -> Outcome:
    if not arguments.until.strip() or not arguments.budget.strip():
        raise UserError(
            "--until (UNTIL) and --budget (BUDGET) go together, "
            "e.g. UNTIL='forecast n=2**17 k=64 within 3%' BUDGET=1e17"
        )
    if arguments.wait:
        raise UserError("--wait and --until (UNTIL) exclude each other: on Slurm nothing waits, jobs decide")
    from sweeps.until import chase, parse_budget, parse_goal

    return chase(
        asked,
        parse_goal(arguments.until),
        parse_budget(arguments.budget),
        dry_run=arguments.dry_run,
        continued=arguments.continued,
        again=again,
        goes_on=["sweeps", *(word for word in argv if word != CONTINUED), CONTINUED],
    )


def _is_here(arguments: argparse.Namespace) -> bool:
    """Whether this machine trains, not a cluster."""
    return arguments.cluster.strip() in ("", "local")


def run_study(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train one study, judge it if it says so, and write its report. Raises `UserError`."""
    again = command(arguments)
    asked = request(arguments)
    study = asked.study if asked.study is not None and asked.study.evaluate else None
    judging = ""
    if study is not None and _is_here(arguments):
        judging = f"judging by {', '.join(study.evaluate)} comes afterwards, and its time is not included"
    if judging and not arguments.dry_run:
        say(judging)
    if arguments.until.strip() or arguments.budget.strip():
        outcome = _chase(asked, arguments, again, argv)
    else:
        outcome = launch(asked, dry_run=arguments.dry_run, wait=arguments.wait, command=again)
    if study is not None and outcome.submitted and not arguments.dry_run:
        for sweep_dir in outcome.sweep_dirs:
            later = evaluation_command(sweep_dir, study, "cluster=slurm")
            say(f"when its runs have ended, judge them in jobs: {later}")
    if judging and arguments.dry_run:
        print(judging)
    if arguments.dry_run or outcome.submitted or outcome.exit_code == INTERRUPTED:
        return outcome.exit_code
    for sweep_dir in outcome.sweep_dirs:
        if study is not None and not evaluate(sweep_dir, study):
            return INTERRUPTED
        report(sweep_dir)
    if outcome.exit_code and not arguments.until.strip():
        for sweep_dir in outcome.sweep_dirs:
            say(f"some cells are not done; which and why: {python_command('harness.status', sweep_dir)}")
    return outcome.exit_code


def _reproduce(arguments: argparse.Namespace) -> int:
    """All studies of a paper. The options of one study do not apply, but those of the place where runs run do."""
    foreign = [name for name in ("study", "sweep", "until", "budget") if getattr(arguments, name).strip()]
    if foreign:
        raise UserError(f"--reproduce (PAPER) has its own studies; leave out --{foreign[0]} ({foreign[0].upper()})")
    from sweeps.papers import SCALES, reproduce

    def run(study: str) -> int:
        return run_study(argparse.Namespace(**{**vars(arguments), "study": study}), [])

    return reproduce(
        arguments.reproduce.strip(),
        arguments.scale.strip() or SCALES[0],
        Path(arguments.out.strip() or "runs"),
        run,
        trains_here=not arguments.dry_run and _is_here(arguments),
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        if arguments.reproduce.strip():
            return _reproduce(arguments)
        return run_study(arguments, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST


if __name__ == "__main__":
    run_command(main)
