"""The house stands: one lock in two spellings, and a Makefile that says plainly what is missing."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def lock() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_conda_environment_equals_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, block = environment["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    assert block["pip"] == [*lock(), "--editable .[test]"]


def test_lock_pins_each_package_once_and_without_build_tag() -> None:
    pins = [Requirement(line) for line in lock()]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert sorted(set(names)) == sorted(names)
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and "+" not in exact.version, f"{pin} is not one version"


def test_lock_holds_every_direct_dependency() -> None:
    house = tomllib.loads((ROOT / "pyproject.toml").read_text())
    direct = house["project"]["dependencies"] + house["project"]["optional-dependencies"]["test"]
    pinned = {canonicalize_name(Requirement(line).name) for line in lock()}
    assert {canonicalize_name(name) for name in direct} <= pinned
    (build,) = house["build-system"]["requires"]
    assert build in lock()


def make(folder: Path, target: str, python3: str | None) -> subprocess.CompletedProcess[str]:
    """Run `make target` in a copy of the house where `python3` is this script, or is not there."""
    (folder / "labutils").mkdir(exist_ok=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "labutils/kernels.cpp"):
        shutil.copy(ROOT / name, folder / name)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cat", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    if python3 is not None:
        (tools / "python3").write_text(f"#!/bin/sh\n{python3}\n")
        (tools / "python3").chmod(0o755)
    # A `make test` around this one would hand down its flags, its depth and its PYTHON.
    inherited = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        [shutil.which("make"), target],
        cwd=folder,
        env=environment | {"PATH": str(tools)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("python3", "seen", "mend"),
    [
        (None, "python3 does not run", "apt-get install python3-venv"),
        ("exit 127", "python3 does not run", "apt-get install python3-venv"),
        ("echo 2.7.18", "python3 is Python 2.7.18", "make PYTHON=/path/to/python3.12"),
        ("echo 3.10.12", "python3 is Python 3.10.12", "brew install python"),
        (
            'case "$2" in *ensurepip*) echo Traceback >&2; exit 1 ;; *) echo 3.12.3 ;; esac',
            "python3 is Python 3.12.3 without it",
            "apt-get install python3.12-venv",
        ),
    ],
    ids=["missing", "broken", "python2", "too-old", "no-venv"],
)
def test_set_up_says_in_one_sentence_what_is_missing(
    tmp_path: Path, python3: str | None, seen: str, mend: str
) -> None:
    made = make(tmp_path, "lab", python3)
    sentence, verdict = made.stderr.splitlines()
    assert sentence.startswith("The lab needs Python 3.11 or newer")
    assert seen in sentence and mend in sentence
    assert verdict.startswith("make: ***")
    assert made.stdout == "" and not (tmp_path / ".venv").exists()


def test_set_up_says_at_once_that_the_disk_is_too_small(tmp_path: Path) -> None:
    python3 = 'case "$2" in *disk_usage*) echo 2100 ;; *version*) echo 3.11.9 ;; esac'
    made = make(tmp_path, "lab", python3)
    sentence, verdict = made.stderr.splitlines()
    assert sentence.startswith("Setting up takes 3000 MB of disk, and 2100 MB are free in ")
    assert "move the lab to another disk" in sentence and verdict.startswith("make: ***")
    assert made.stdout == "" and not (tmp_path / ".venv").exists()


def test_moved_environment_is_not_ready(tmp_path: Path) -> None:
    stamp = tmp_path / ".venv" / "ready"
    stamp.parent.mkdir()
    stamp.write_text("/where/it/was/made\n")
    make(tmp_path, "help", None)
    assert not stamp.exists()


def test_make_alone_lists_what_it_makes(tmp_path: Path) -> None:
    made = make(tmp_path, "help", None)
    assert made.returncode == 0 and made.stderr == ""
    listed = [line.split()[1] for line in made.stdout.splitlines()]
    assert listed == ["lab", "test", "notebooks", "lint", "clean"]
