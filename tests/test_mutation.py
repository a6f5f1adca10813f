"""The parts of mutation.py that need no cosmic-ray: what is spared, what stands, and that its tables name what there is."""

from pathlib import Path

import pytest

import mutation
from mutation import ROOT, Mutant, left_alone, page, read, stands, survivors
from mutation_subsets import SUBSETS, SURVIVORS, sources, subset

SOURCE = '''\
"""A docstring with a 1."""
Alias = int | None
SIZE = 2 * 3
class Leaf:
    width: int = 4
@decorated(5)
def f(x: int | None = 6) -> "Tensor | None":
    assert x != 7
    check_that("f", x > 8, lambda: f"{x} is no 9")
    if x < 10:
        raise ValueError(f"·{x + 11}")
    return x | 12
'''


def test_annotations_messages_fields_decorators_and_asserts_are_left_alone() -> None:
    spared = left_alone(SOURCE)
    lines = SOURCE.splitlines()
    places = {
        number: next((i + 1, line.find(str(number))) for i, line in enumerate(lines) if str(number) in line) for number in range(2, 13)
    }
    mutated = {number for number, place in places.items() if not any(low <= place < high for low, high in spared)}
    assert mutated == {2, 3, 6, 8, 10, 12}
    bars = {i + 1 for i, line in enumerate(lines) if "|" in line and not any(low <= (i + 1, line.find("|")) < high for low, high in spared)}
    assert bars == {12}


def test_every_source_has_a_subset_of_tests_that_exist() -> None:
    found = list(sources(ROOT))
    assert len(found) == len(set(found)) > 30
    for path in found:
        *files, option, expression = subset(path)
        assert option == "-k"
        assert expression
        assert files
        assert all((ROOT / name).is_file() for name in files)
    used = {next((name for name in (Path(path).parent.name, Path(path).name) if name in SUBSETS), "") for path in found}
    assert used == set(SUBSETS)


def test_every_survivor_is_a_line_of_its_file() -> None:
    for (path, before, after), reason in SURVIVORS.items():
        assert before in {line.strip() for line in (ROOT / path).read_text().splitlines()}, before
        assert before != after
        assert reason


def mutant(text: str) -> Mutant:
    return Mutant("wm_graph/model.py", 1, 0, text, "a + b", "a - b")


def test_a_kill_stands_until_the_file_changes_and_a_survivor_until_a_test_does(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    killed = f'{{"digest": "{mutant("one").digest}", "result": "tests/test_x.py::test_y", "tests": "of another day"}}\n'
    record.write_text(killed + '{"digest": "cut of')
    results = read(record)
    assert stands(results.get(mutant("one").digest))
    assert not stands(results.get(mutant("two").digest))
    assert not stands({"result": "survived", "tests": "of another day"})
    assert stands({"result": "survived", "tests": mutation.tests_digest()})


@pytest.mark.parametrize(("results", "share"), [(("killed", "survived"), "50.0%"), (("killed", "time-out"), "100.0%")])
def test_the_page_counts_what_lives_and_says_where_a_reason_is_missing(results: tuple[str, str], share: str) -> None:
    mutants = [mutant("one"), mutant("two")]
    found = {each.digest: {"result": result} for each, result in zip(mutants, results, strict=True)}
    text = page(mutants, {"wm_graph/model.py": 9}, found)
    assert f"{share} killed" in text
    assert len(list(survivors(mutants, found))) == text.count("no reason given") == results.count("survived")
