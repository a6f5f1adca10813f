"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")]
RuntimeNames = Annotated[str | None, typer.Option(metavar="A,B", help="Runtimes, separated by commas.  [default: all that run here]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
