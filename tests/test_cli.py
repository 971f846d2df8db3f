import pytest
from random_checkpoints import mixtral_config, write_mixtral
from torch import Generator

from labutils import cli, standin
from labutils.checkpoints import coverage, load


@pytest.fixture
def published(tmp_path):
    return write_mixtral(tmp_path / "model", mixtral_config(), Generator().manual_seed(0))


def test_the_doctor_says_what_is_here_and_that_the_standin_is_whole(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "GiB available" in printed
    assert "stand-in whole" in printed


def test_load_prints_the_proof_and_saves_what_it_loaded(published, tmp_path, capsys):
    command = ["load", str(published), "--attention", "nf4", "--save", str(tmp_path / "saved")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "bits_per_weight" in printed
    assert coverage(load(tmp_path / "saved")).bits_per_weight("attention") < 6


def test_load_takes_a_checkpoint_as_it_is_stored(published, capsys):
    assert cli.main(["load", str(published)]) == 0
    assert "nf4" not in capsys.readouterr().out


def test_an_error_is_one_sentence_and_an_exit_status(capsys):
    assert cli.main(["load", "./nowhere"]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: There is no folder")


def test_train_standin_writes_a_checkpoint_that_verifies(tmp_path, capsys):
    assert cli.main(["train-standin", str(tmp_path / "standin"), "--steps", "3"]) == 0
    standin.verify(tmp_path / "standin")
    assert "3 steps" in capsys.readouterr().out
