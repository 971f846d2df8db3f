"""The lab in a terminal: `python -m labutils doctor`, `load` and `train-standin`.

python -m labutils doctor
python -m labutils load mistralai/Mixtral-8x7B-v0.1 --experts nf4 --attention nf4
python -m labutils load ./my-mixtral --experts nf4 --save ./my-mixtral-nf4
python -m labutils train-standin ./standin
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from . import standin
from .budget import predict
from .checkpoints import NotCovered, coverage, load, locate, save
from .experts import has_cpu_kernel
from .formats import STORABLE
from .meter import GIB, Meter, machine
from .recipes import Recipe

LIBRARIES = ("torch", "transformers", "bitsandbytes", "jupyterlab", "ipywidgets", "plotly")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 1 after an error, which is printed as one sentence."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except (OSError, ValueError, MemoryError, NotCovered) as error:
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

    loading = commands.add_parser("load", help="load a checkpoint quantized, and prove that it is")
    loading.add_argument("checkpoint", help="a folder or a hub name")
    defaults = Recipe()
    for component in defaults.components:
        loading.add_argument(
            f"--{component.replace('_', '-')}",
            choices=STORABLE,
            help=f"its format ({getattr(defaults, component)} where another is given)",
        )
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


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


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
        kernel = (
            "the fused 4-bit CPU kernel works"
            if has_cpu_kernel()
            else ("no fused 4-bit CPU kernel (it needs AVX512-BF16): 4-bit runs slower than 16-bit")
        )
        print(f"GPU      none; {kernel}")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    standin.verify()
    print(f"stand-in whole, {standin.scores()['parameters']:,} parameters")


def _load(chosen: argparse.Namespace) -> None:
    asked = {name: getattr(chosen, name) for name in Recipe().components if getattr(chosen, name)}
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
