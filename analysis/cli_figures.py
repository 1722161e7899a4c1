"""The command `figures`: a paper's figures and claims from runs of its studies."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import write_text_atomic
from harness.terminal import path_argument, say

PAPERS = ("gao2024", "switch2024")


def add_figures(commands: Any) -> None:
    figures = commands.add_parser(
        "figures",
        help="draw the figures of a paper and judge its claims",
        description="Draw the figures of a paper (SVG and CSV) and judge its claims from runs of its studies. `make "
        "reproduce PAPER=…` trains them. The tables that are written too can be the source of a later call.",
    )
    figures.add_argument("paper", choices=PAPERS)
    figures.add_argument(
        "source", nargs="+", type=path_argument, help="sweep directories, or a directory that this command wrote"
    )
    figures.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where tables and figures go")
    figures.add_argument(
        "--doc", type=path_argument, metavar="FILE", help="put claims and figures into this Markdown file too"
    )
    figures.set_defaults(handler=_figures)


def _figures(args: argparse.Namespace) -> int:
    from analysis.figures import gao2024, gao2024_claims, switch2024, switch2024_claims
    from analysis.figures.claims import claims_table, put
    from analysis.figures.drawn import gallery, save
    from analysis.figures.tables import read_studies, write_studies

    papers = {"gao2024": (gao2024_claims, gao2024), "switch2024": (switch2024_claims, switch2024)}
    claims_of, figures_of = papers[args.paper]
    given = read_studies([Path(source) for source in args.source])
    folder = Path(args.out)
    write_studies(given, folder)
    # from what is kept, so that a later call on it says and draws the same to the last digit
    studies = {name: study for name, study in read_studies([folder]).items() if name in given}
    drawn = figures_of.figures(studies)
    save(drawn, folder)
    text = claims_table(claims_of.claims(studies))
    write_text_atomic(folder / "claims.md", f"{text}\n")
    if args.doc is not None:
        doc = Path(args.doc)
        if not doc.exists():
            raise UserError(f"{doc} does not exist; --doc names a file with the block of {args.paper}")
        block = f"{text}\n\n{gallery(drawn, Path(os.path.relpath(folder, doc.parent)).as_posix())}"
        write_text_atomic(doc, put(block, args.paper, doc.read_text(encoding="utf-8"), str(doc)))
    for name, study in studies.items():
        say(f"{name}: {len(study.runs)} runs")
    print(f"figures: {len(drawn)} in {folder}")
    print(f"claims: {folder / 'claims.md'}")
    return 0
