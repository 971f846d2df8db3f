"""The README's map of the house and its table of notebooks are the house and the notebooks."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def files() -> set[PurePosixPath]:
    """What git tracks, and what it would track if it were added now."""
    # The folder's owner may be another user, as in many a container.
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    command += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {PurePosixPath(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()}


def drawn() -> list[tuple[PurePosixPath, str]]:
    """Each path in the map of the section "The house", in order, and its gloss."""
    block = re.search(r"^## The house$.*?^```text\n(.*?)^```$", README, re.M | re.S)
    assert block, 'README.md has no ```text block in a section "## The house"'
    paths: list[tuple[PurePosixPath, str]] = []
    folders: list[PurePosixPath] = []
    for line in filter(str.strip, block[1].splitlines()):
        indent, name, gloss = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        depth = len(indent) // 2
        assert depth <= len(folders), f"this line of the map stands in no folder: {line!r}"
        path = PurePosixPath(*folders[depth - 1 : depth], name)
        folders[depth:] = [path] if name.endswith("/") else []
        paths.append((path, gloss))
    return paths


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    _hub, code = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    lines = re.findall(r"^layer \d: \d+% of the tokens flip$", capsys.readouterr().out, re.M)
    assert len(lines) == 4


def test_every_path_in_the_map_has_one_gloss() -> None:
    shown = [path for path, _ in drawn()]
    assert not [str(path) for path, gloss in drawn() if not gloss], "paths without a gloss"
    assert len(set(shown)) == len(shown), "paths shown twice"


def test_the_map_shows_nothing_that_is_not_there() -> None:
    there = files() | {folder for file in files() for folder in file.parents}
    assert not [str(path) for path, _ in drawn() if path not in there], "not in the repository"


def test_the_map_leaves_nothing_out() -> None:
    def must_be_shown(file: PurePosixPath) -> PurePosixPath:
        if file.parts[0] == "tests" and file.suffix == ".py":
            return file
        rooms = ("labutils", "notebooks", "tests")
        return PurePosixPath(*file.parts[: 2 if file.parts[0] in rooms else 1])

    shown = {path for path, _ in drawn()}
    shown |= {folder for path in shown for folder in path.parents}
    missing = {must_be_shown(file) for file in files()} - shown
    assert not sorted(map(str, missing)), "in the repository, and not on the map of the house"


def test_the_table_lists_every_notebook_with_its_question() -> None:
    header = r"\| *Notebook *\| *Question *\| *Minutes *\| *GPU\? *\|\n\|[-:| ]+\|\n((?:\|.*\n)+)"
    table = re.search(header, README)
    assert table, "README.md has no table `Notebook | Question | Minutes | GPU?`"
    rows = [[cell.strip() for cell in row.split("|")[1:5]] for row in table[1].splitlines()]
    listed = {re.search(r"notebooks/(\w+\.ipynb)", row[0])[1]: row[1] for row in rows}
    titles = {
        path.name: nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }
    assert listed == titles
    assert all(re.match(r"\d", minutes) and gpu for _, _, minutes, gpu in rows)
