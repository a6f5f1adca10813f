"""The long search: what it records, how it goes on, and what it says of a counterexample."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deep
from hypothesis_profiles import COMPARED, law, note_compared

LAW = """
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis_profiles import law, note_compared
from toy_helper import IS_REPAIRED

@law(20, "op")
@given(x=st.integers(0, 1000))
def test_a_law(x):
    assume(x != 13)
    note_compared(1)
    assert x < LIMIT or IS_REPAIRED()
"""
# A test whose outcome changes while its sources do not, as one that depends on the machine does.
HELPER = """
from pathlib import Path

def IS_REPAIRED():
    return Path(__file__).with_name("repaired").exists()
"""


@pytest.fixture
def laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one law file; the record is `record`."""
    here = Path(__file__).parent
    shutil.copy(here / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {here} {tmp_path}\naddopts = --import-mode=importlib -q\n")
    (tmp_path / "test_laws_toy.py").write_text(LAW.replace("LIMIT", "1001"))
    (tmp_path / "toy_helper.py").write_text(HELPER)
    (tmp_path / "test_session_machine.py").write_text("def test_nothing(): pass\n")
    monkeypatch.setattr(deep, "TESTS", tmp_path)
    monkeypatch.setattr(deep, "ROOT", tmp_path)
    monkeypatch.setattr(deep, "SOURCES", ("wm_graph",))
    for name in ("WM_DEEP", "WM_COUNTS", "WM_POOL", "WM_LEAST_COMPARED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def search(folder: Path, total: int) -> int:
    return deep.main(["--total", str(total), "--record", str(folder / "build" / "record"), "test_laws_toy.py"])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "build" / "record").read_text().splitlines()]


def test_a_search_stops_at_its_total_and_goes_on_where_it_stopped(laws: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(laws, 20) == 0
    assert [(line["seed"], line["factor"], line["examples"]["op"]) for line in lines(laws)] == [(0, 1, 20)]
    assert "deep: 20 examples in 1 slices" in capsys.readouterr().out
    with (laws / "build" / "record").open("a") as file:
        file.write('{"slice": "cut o')
    assert search(laws, 50) == 0
    assert [(line["seed"], line["factor"], line["examples"]["op"]) for line in lines(laws)] == [(0, 1, 20), (1, 2, 40)]
    assert search(laws, 50) == 0
    assert len(lines(laws)) == 2


def test_a_counterexample_is_kept_and_printed_and_its_slice_counts_once_it_passes(laws: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (laws / "test_laws_toy.py").write_text(LAW.replace("LIMIT", "14"))
    assert search(laws, 20) == 1
    (line,) = lines(laws)
    (failure,) = line["failures"]
    assert failure["test"] == "test_laws_toy::test_a_law"
    assert "x=14" in failure["reproduce"]
    assert "14 < 14" in failure["reproduce"]
    out = capsys.readouterr().out
    assert "1 FAILED; 0 of 20" in out
    assert "x=14" in out
    (laws / "test_laws_toy.py").write_text(LAW.replace("LIMIT", "1001"))
    assert search(laws, 20) == 0
    assert [bool(line["failures"]) for line in lines(laws)] == [True, False]
    assert "deep: 20 examples in 1 slices" in capsys.readouterr().out


def test_slices_count_only_on_the_sources_that_they_ran_on(laws: Path) -> None:
    assert search(laws, 20) == 0
    (laws / "mutation.py").write_text("x = 1\n")
    (laws / "README.md").write_text("words\n")
    assert search(laws, 20) == 0
    assert len(lines(laws)) == 1
    for number, name in enumerate(("toy_helper.py", "wm_graph/model.py"), 2):
        (laws / name).parent.mkdir(exist_ok=True)
        with (laws / name).open("a") as file:
            file.write("\n# another word\n")
        assert search(laws, 20) == 0
        assert len(lines(laws)) == number, name
    assert len({line["sources"] for line in lines(laws)}) == 3


def test_a_slice_that_failed_is_run_again_first_and_no_total_excuses_it(laws: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (laws / "test_laws_toy.py").write_text(LAW.replace("LIMIT", "14"))
    assert search(laws, 20) == 1
    (line,) = lines(laws)
    enough = line | {"seed": 1, "factor": 2, "examples": {"op": 100}, "failures": []}
    with (laws / "build" / "record").open("a") as file:
        file.write(json.dumps(enough) + "\n")
    capsys.readouterr()
    assert search(laws, 20) == 1
    assert [(line["seed"], bool(line["failures"])) for line in lines(laws)] == [(0, True), (1, False), (0, True)]
    out = capsys.readouterr().out
    assert "deep: 100 examples in 1 slices on these sources, of 20; slices that remain failed: test_laws_toy.py seed 0" in out
    (laws / "repaired").touch()
    assert search(laws, 20) == 0
    assert [(line["seed"], bool(line["failures"])) for line in lines(laws)][3:] == [(0, False)]
    assert "deep: 120 examples in 2 slices on these sources, of 20; slices that remain failed: none" in capsys.readouterr().out


def test_the_sources_of_the_laws_are_what_they_import_and_no_more() -> None:
    names = {path.relative_to(deep.TESTS).as_posix() for path in deep.law_sources()}
    assert {"op_cases.py", "op_scales.py", "choice_margins.py", "oracles/scanning.py", "conftest.py", "hypothesis_profiles.py"} <= names
    assert set(deep.law_files()) <= names
    assert not {"mutation.py", "test_deep.py", "faults.py", "test_bisect.py"} & names


def test_a_slice_that_ends_without_a_report_is_a_failure(laws: Path) -> None:
    (laws / "test_laws_toy.py").write_text("import os\nos._exit(7)\n")
    assert search(laws, 20) == 1
    assert "ended with status 7" in lines(laws)[0]["failures"][0]["reproduce"]


def test_an_example_that_compares_nothing_is_not_counted() -> None:
    seen = []

    @law(20, "op")
    @given(x=st.integers(0, 1000))
    def toy(x: int) -> None:
        seen.append(x % 2)
        note_compared(x % 2)

    before = COMPARED["op"]
    toy()
    counted, COMPARED["op"] = COMPARED["op"] - before, before
    assert counted == sum(seen) >= 20
    assert 0 in seen


def test_every_law_file_is_a_slice() -> None:
    names = {path.name for path in Path(__file__).parent.glob("test_*.py") if "@law(" in path.read_text() and path.name != "test_deep.py"}
    assert names <= set(deep.law_files())
    assert len(names) >= 4
