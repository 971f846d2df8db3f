"""The lab in a terminal: `python -m labutils doctor`, `plan`, `load` and `train-standin`.

python -m labutils doctor
python -m labutils plan Mixtral-8x7B --attention nf4 --card "RTX 4090" --context 8192
python -m labutils plan ./my-mixtral --recipe experts4.yaml
python -m labutils load mistralai/Mixtral-8x7B-v0.1 --experts nf4 --attention nf4
python -m labutils load ./my-mixtral --experts nf4 --save ./my-mixtral-nf4
python -m labutils train-standin ./standin
"""

import argparse
import re
import sys
from importlib.metadata import version
from pathlib import Path

from . import kernels, standin
from .budget import predict
from .checkpoints import NotCovered, coverage, load, locate, save
from .formats import FORMATS, STORABLE
from .meter import GIB, Meter, machine
from .planner import CARDS, Card, Machine, Plan, card_named, plan, plans_table
from .recipes import Recipe

LIBRARIES = ("torch", "transformers", "bitsandbytes", "jupyterlab", "ipywidgets", "plotly")
MANY_CARDS = 8


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 1 after an error, which is printed as one sentence."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except (OSError, ValueError, MemoryError, RuntimeError, OverflowError, NotCovered) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m labutils", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser(
        "doctor", help="what this machine is, and whether the lab is whole"
    )
    doctor.set_defaults(run=_doctor)

    planning = commands.add_parser("plan", help="what fits where, before a byte is downloaded")
    planning.add_argument(
        "model", help="a hub name, a folder, a config.json, or a name like OLMoE-1B-7B"
    )
    planning.add_argument("--recipe", metavar="FILE", help="a recipe in a file, instead of formats")
    _add_formats(planning, tuple(FORMATS))
    planning.add_argument(
        "--card", help=f"all are shown without; cpu for none at all, or one of {', '.join(CARDS)}"
    )
    planning.add_argument(
        "--card-gib", type=_gib, help="memory in GiB of a card that is not among them"
    )
    planning.add_argument("--cards", type=_positive, default=1, help="how many of it (1)")
    planning.add_argument("--host-gib", type=_gib, default=64, help="main memory in GiB (64)")
    planning.add_argument("--context", type=_positive, default=4096, help="tokens (4096)")
    planning.add_argument("--batch", type=_positive, default=1, help="sequences at once (1)")
    planning.set_defaults(run=_plan)

    loading = commands.add_parser("load", help="load a checkpoint quantized, and prove that it is")
    loading.add_argument("checkpoint", type=_named, help="a folder or a hub name")
    _add_formats(loading, STORABLE)
    loading.epilog += "; with none given it is loaded as it is stored"
    loading.add_argument("--save", metavar="FOLDER", help="save it as it is stored")
    loading.add_argument("--device-map", help="as in transformers: auto, cpu, cuda:0")
    loading.add_argument("--force", action="store_true", help="go on where memory may run out")
    loading.set_defaults(run=_load)

    training = commands.add_parser("train-standin", help="train the shipped small Mixtral anew")
    training.add_argument("folder", nargs="?", default="standin", help="where to put it")
    training.add_argument("--steps", type=_positive, help="fewer, to see how it begins")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=_train)
    return parser


def _add_formats(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    """An option for the format of each component; the end of the help names them."""
    defaults = Recipe()
    parser.epilog = f"formats: {', '.join(formats)}"
    for component in defaults.components:
        parser.add_argument(
            f"--{component.replace('_', '-')}",
            type=str.lower,
            choices=formats,
            metavar="FORMAT",
            help=f"format of {component.replace('_', ' ')} ({getattr(defaults, component)})",
        )


def _formats(chosen: argparse.Namespace) -> dict[str, str]:
    """The formats that were given, by component."""
    return {name: getattr(chosen, name) for name in Recipe().components if getattr(chosen, name)}


def _positive(text: str) -> int:
    """A whole number from 1 on, with or without commas at the thousands."""
    plain = text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text
    if not re.fullmatch(r"\d{1,15}", plain) or int(plain) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number from 1 on; write it in digits, like 4096 or 4,096"
        )
    return int(plain)


def _named(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is missing between the quotes")
    return text


def _gib(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of GiB; write it without a unit, like 24 or 23.5"
        ) from None


def _doctor(chosen: argparse.Namespace) -> None:
    here = machine()
    print(f"{here.platform}, {here.cores} cores")
    print(
        f"memory   {here.available_bytes / GIB:.1f} of {here.total_bytes / GIB:.1f} GiB available"
    )
    for gpu in here.gpus:
        free, total = gpu.free_bytes / GIB, gpu.total_bytes / GIB
        print(f"GPU      {gpu.name}, {free:.1f} of {total:.1f} GiB free")
    if not here.gpus:
        print(f"GPU      none; {_kernels()}")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    standin.verify()
    print(f"stand-in whole, {standin.scores()['parameters']:,} parameters")


def _kernels() -> str:
    if kernels.INSTRUCTIONS is None:
        return (
            "4-bit kernels are not compiled, and 4 bits run slower than 16: install a C++ compiler "
            "(Debian: `sudo apt-get install g++`), then `make clean lab`"
        )
    return f"4-bit kernels with {kernels.INSTRUCTIONS.label}"


def _plan(chosen: argparse.Namespace) -> None:
    asked = _formats(chosen)
    if chosen.recipe and asked:
        raise ValueError("Give a recipe in a file or formats, not both.")
    recipe = Recipe.read(chosen.recipe) if chosen.recipe else Recipe(**asked)
    one_kind = chosen.card is not None or chosen.card_gib is not None
    cards = [_card(chosen)] if one_kind else list(CARDS.values())
    machines = [Machine(card, chosen.cards, chosen.host_gib) for card in cards]
    machines += [] if one_kind else [Machine(host_gib=chosen.host_gib)]
    first = plan(chosen.model, recipe, machines[0], chosen.context, chosen.batch)
    print(f"{first.model}, {first.budget.parameters:,} parameters\n{recipe}\n")
    print(_stacked(first))
    if one_kind:
        print(f"\n{_shares(first)}\n{first.sentence}")
    else:
        table = plans_table([chosen.model], recipe, machines, chosen.context, chosen.batch)
        print(f"\n{table.drop(columns='model').round(2).to_string(index=False)}")


def _card(chosen: argparse.Namespace) -> Card | None:
    """The card that was named or whose memory was given; None for the processor alone."""
    if chosen.card_gib is not None:
        return Card(chosen.card or f"card of {chosen.card_gib:g} GiB", chosen.card_gib)
    return None if chosen.card.lower() == "cpu" else card_named(chosen.card)


def _shares(made: Plan) -> str:
    """The bytes of each card, or where there are many those of the fullest, in GiB."""
    if made.machine.card is None:
        return f"in main memory {made.bytes_needed / GIB:.2f} GiB"
    if len(made.shares) > MANY_CARDS:
        return f"on the fullest of {len(made.shares)} cards {made.bytes_needed / GIB:.2f} GiB"
    return f"on each card {', '.join(f'{share / GIB:.2f}' for share in made.shares)} GiB"


def _stacked(made: Plan) -> str:
    """A line for each component, in GiB, and one for their sum."""
    sizes = made.budget.by_component | {"total": made.budget.total_bytes}
    return "\n".join(f"{name:14} {size / GIB:9.3f} GiB" for name, size in sizes.items())


def _load(chosen: argparse.Namespace) -> None:
    asked = _formats(chosen)
    recipe = Recipe(**asked) if asked else None
    if chosen.save and Path(chosen.save).exists():
        raise FileExistsError(f"{chosen.save} exists already; remove it or take another name.")
    folder = locate(chosen.checkpoint, recipe, chosen.device_map, chosen.force)
    if recipe is not None:
        predicted = predict(folder, recipe).total_bytes
        print(f"predicted {predicted / GIB:.3f} GiB for {recipe}")
    meter = Meter()
    with meter("load"):
        model = load(folder, recipe, chosen.device_map, chosen.force)
    covered = coverage(model)
    print(covered.table.round({"bits_per_weight": 3}).to_string(index=False))
    run = meter.runs[-1]
    print(
        f"stored {covered.total_bytes / GIB:.3f} GiB; loaded in {run.seconds:.1f} s, "
        f"peak {run.peak_above_start_bytes / GIB:.3f} GiB above the start"
    )
    if chosen.save:
        print(f"saved to {save(model, chosen.save)}")


def _train(chosen: argparse.Namespace) -> None:
    steps = {"steps": chosen.steps} if chosen.steps else {}
    record = standin.train(chosen.folder, seed=chosen.seed, **steps)
    print(f"{record.steps} steps in {record.seconds:.0f} s, loss {record.losses[-1]:.3f}")
    for language, score in standin.scores(chosen.folder)["languages"].items():
        print(f"{language:10} {score['correct']:4} of {score['examples']} right")
