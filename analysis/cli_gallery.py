"""The command `gallery`: a folder in which people look at features."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.terminal import path_argument, say


def add_gallery(commands: Any) -> None:
    gallery = commands.add_parser(
        "gallery",
        help="write a folder in which to look at the features of finished SAEs",
        description="Write a folder that opens from the file system, without a network. It shows what "
        "`python -m harness.evaluate TARGET --metrics examples` collected, and what else was evaluated.",
    )
    gallery.add_argument("target", nargs="+", type=path_argument, help="run or sweep directory")
    gallery.add_argument(
        "--out", type=path_argument, metavar="DIR", help="default: `gallery` in the directory of the target"
    )
    gallery.set_defaults(handler=_gallery)


def _gallery(args: argparse.Namespace) -> int:
    from analysis.gallery.write import write_gallery

    page, notes = write_gallery([Path(target) for target in args.target], args.out)
    for note in notes:
        say(f"note: {note}")
    print(f"gallery: {page}")
    return 0
