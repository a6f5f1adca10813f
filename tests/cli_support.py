"""Running `wm` inside the test process."""

import json
from dataclasses import dataclass

from wm_graph.cli import run


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def wm(capfd, *argv):
    """Run `wm argv...`; what it printed before is forgotten."""
    capfd.readouterr()
    code = run([str(argument) for argument in argv])
    return Outcome(code, *capfd.readouterr())


def make_bundle(folder, *, preset="cheems-tiny"):
    """A checkpoint and a bundle of a preset: (checkpoint, bundle)."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    assert run(["init", preset, "-o", str(checkpoint)]) == 0
    assert run(["export", str(checkpoint), "-o", str(bundle)]) == 0
    return checkpoint, bundle
