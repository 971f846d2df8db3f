import pytest
from random_checkpoints import mixtral_config, write_mixtral
from torch import Generator

from labutils import cli, standin
from labutils.budget import predict
from labutils.checkpoints import coverage, load
from labutils.meter import GIB
from labutils.planner import CARDS
from labutils.recipes import Recipe


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


def test_plan_stacks_up_the_bytes_and_says_what_to_do(capsys):
    command = ["plan", "OLMoE-1B-7B", "--attention", "nf4", "--card", "rtx 3060", "--cards", "2"]
    assert cli.main([*command, "--context", "9000", "--batch", "3"]) == 0
    printed = capsys.readouterr().out
    budget = predict("labutils/data/configs/OLMoE-1B-7B.json", Recipe(attention="nf4"), 9000, 3)
    for name, size in budget.by_component.items():
        assert f"{name:14} {size / GIB:9.3f} GiB\n" in printed
    assert f"{budget.total_bytes / GIB:9.3f} GiB" in printed
    assert "the fullest of 2 x RTX 3060 has" in printed
    assert "3 times 9,000 tokens" in printed


def test_plan_without_a_card_shows_them_all_and_the_cpu(capsys):
    assert cli.main(["plan", "Mixtral-8x7B", "--attention", "nf4", "--host-gib", "48"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for card in CARDS:
        assert sum(line.strip().startswith(f"{card} ") for line in lines) == 1
    assert any("CPU with 48 GiB" in line and line.endswith("fits") for line in lines)


def test_plan_reads_a_recipe_from_a_file(tmp_path, capsys):
    recipe = Recipe(experts="int3", overrides={"layers.0.experts": "int8"})
    path = recipe.save(tmp_path / "recipe.yaml")
    assert cli.main(["plan", "OLMoE-1B-7B", "--recipe", str(path), "--card", "T4"]) == 0
    size = predict("labutils/data/configs/OLMoE-1B-7B.json", recipe).by_component["experts"]
    assert f"experts        {size / GIB:9.3f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Mixtral-8x7B", "--card", "RTX 409"], "ValueError: Unknown card 'RTX 409'; did you mean"),
        (["Mixtral-8x77B"], "FileNotFoundError: There is no model 'Mixtral-8x77B'; did you mean"),
        (["./nowhere"], "FileNotFoundError: There is no model './nowhere'; give a folder"),
        (["Mixtral-8x7B", "--recipe", "no.yaml"], "FileNotFoundError: "),
        (["Mixtral-8x7B", "--recipe", "a.yaml", "--experts", "nf4"], "ValueError: Give a recipe"),
        (["Mixtral-8x7B", "--host-gib", "-1"], "ValueError: There is no machine"),
        (["Mixtral-8x7B", "--host-gib", "inf"], "ValueError: There is no machine"),
        (["Mixtral-8x7B", "--context", "9" * 15], "ValueError: 1 sequences of 999"),
        (["Mixtral-8x7B", "--card", ""], "ValueError: Unknown card ''; there are RTX 4060"),
        (["Mixtral-8x7B", "--card-gib", "0"], "ValueError: The memory of card"),
        (["Mixtral-8x7B", "--card", "cpu", "--cards", "2"], "ValueError: A machine without a card"),
        ([""], "ValueError: A model needs a name"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence_and_an_exit_status(arguments, said, capsys):
    assert cli.main(["plan", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1


def test_a_config_that_cannot_be_built_is_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "hidden_size": -4}')
    assert cli.main(["plan", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("ValueError: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "4k"], "'4k' is no whole number from 1 on; write it in digits"),
        (["--context", "1e5"], "'1e5' is no whole number"),
        (["--context", "4,09"], "'4,09' is no whole number"),
        (["--batch", "0"], "'0' is no whole number from 1 on"),
        (["--host-gib", "64GB"], "'64GB' is no number of GiB; write it without a unit"),
        (["--experts", "nf44"], "invalid choice: 'nf44'"),
    ],
)
def test_a_number_that_cannot_be_read_says_what_to_write(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "OLMoE-1B-7B", *arguments])
    assert said in capsys.readouterr().err


def test_load_wants_a_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["load", ""])
    assert "a name is missing" in capsys.readouterr().err


def test_commas_and_capitals_are_read(capsys):
    command = ["plan", "OLMoE-1B-7B", "--card", "T4"]
    assert cli.main([*command, "--context", "4,096", "--experts", "NF4"]) == 0
    first = capsys.readouterr().out
    assert cli.main([*command, "--context", "4096", "--experts", "nf4"]) == 0
    assert first == capsys.readouterr().out


def test_a_card_that_is_not_in_the_list_is_given_by_its_memory(capsys):
    assert cli.main(["plan", "Mixtral-8x7B", "--card", "B200", "--card-gib", "180"]) == 0
    assert "the B200 has 179.50: it fits" in capsys.readouterr().out
    assert cli.main(["plan", "Mixtral-8x7B", "--card-gib", "180"]) == 0
    assert "the card of 180 GiB has 179.50: it fits" in capsys.readouterr().out


def test_the_processor_alone_can_be_asked_for(capsys):
    assert cli.main(["plan", "OLMoE-1B-7B", "--card", "CPU", "--host-gib", "16"]) == 0
    printed = capsys.readouterr().out
    assert "\nin main memory " in printed and "CPU with 16 GiB has 12.00: it fits" in printed


def test_of_many_cards_only_the_fullest_is_shown(capsys):
    command = ["plan", "Mixtral-8x7B", "--card", "T4", "--cards"]
    assert cli.main([*command, "40"]) == 0
    assert "\non the fullest of 34 cards " in capsys.readouterr().out
    assert cli.main([*command, "4"]) == 0
    shares = capsys.readouterr().out.split("on each card ")[1].split(" GiB")[0]
    assert shares.count(", ") == 3


def test_help_says_which_formats_stand_where_none_is_given(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "format of experts (nf4)" in printed and "cpu for none at all" in printed
