"""This lab's 4-bit Mixtral against its peers: what loading, prefill and decoding take, as ratios.

    python benchmarks/peers.py [--rounds 3] [--checkpoint FOLDER] [--json FILE] [--without WORDS]
    python benchmarks/peers.py --grow [--rounds 3] [--json FILE]

Without a checkpoint a random one of 738 million parameters is made, in the published layout. Each
peer is measured in a process of its own, with default settings and all cores, and every round
measures each peer once, so that what disturbs the machine falls on all alike. The files lie in the
system's cache. Memory is anonymous, above what the imports took. Absolute figures mean nothing on
another machine; ratios are taken within a round.

Two peers must be installed beside the lab, and are left out where they are not:

    pip install torchao==0.18.0
    pip install gguf==0.19.0 llama-cpp-python==0.3.36    # builds llama.cpp, some minutes

`--grow` measures instead how loading and decoding grow with the width, the layers, the experts and
the tokens before, this lab beside transformers in bf16.
"""

import argparse
import datetime
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch
from bitsandbytes import functional as bnb_functional
from llamacpp import KINDS, STEPS, LlamaCpp, write_quantized
from peer_models import (
    BF16,
    BY_NAME,
    GROUPED_MM,
    OURS,
    PEERS,
    SAVED,
    Peer,
    Transformers,
    active_bytes,
    load_eager,
    load_ours,
)
from peer_tables import (
    QUANTIZED_SHAPE,
    Grown,
    Measured,
    Quantizing,
    grown_table,
    print_comparison,
)
from random_checkpoints import mixtral_config, write_mixtral
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from labutils.checkpoints import save
from labutils.experts import quantize_4bit
from labutils.meter import Meter, machine

PROMPT, LONG_PROMPT = 64, 512
BATCHES = (1, 4, 16)
FEWEST_STEPS = 4
REPEATS = 7
BUDGET_SECONDS = 3.0
READ_BYTES = 2**30
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")

SHAPE = {"hidden": 1024, "ffn": 3584, "layers": 8, "experts": 8, "vocab": 4096}

# Shapes of `--grow`: the base, and what is changed of it, one thing at a time.
BASE = {"hidden": 512, "ffn": 1792, "layers": 4, "experts": 8, "vocab": 1024}
GROWN = [
    ("width", {"hidden": 256, "ffn": 896}),
    ("width", {}),
    ("width", {"hidden": 1024, "ffn": 3584}),
    *(("layers", {"layers": layers}) for layers in (2, 4, 8)),
    *(("experts", {"experts": experts}) for experts in (4, 8, 16)),
]
GROWN_TOKENS = (64, 256, 1024)

LOGITS = "logits.pt"  # what bf16 answers, for all peers to be held against


# ------------------------------------------------- functions that run in a process of their own


def prepare_saved(room: str) -> None:
    save(load_ours(Path(room) / BF16), Path(room) / SAVED)


def prepare_logits(room: str) -> None:
    """What bf16 answers to the prompt."""
    model = load_eager(Path(room) / BF16)
    torch.save(Transformers(model).logits(prompts(model.config, 1, PROMPT)), Path(room) / LOGITS)


def prepare_gguf(room: str) -> None:
    write_quantized(Path(room) / BF16, Path(room))


def measure(name: str, room: str, turn: int) -> Measured:
    """All about one peer: the load, the first prompt, then everything once more, warm."""
    peer, source = BY_NAME[name], Path(room) / BY_NAME[name].source
    for package in peer.needs:
        importlib.import_module(package)
    config = AutoConfig.from_pretrained(Path(room) / BF16)
    prompt, long_prompt = prompts(config, 1, PROMPT), prompts(config, 1, LONG_PROMPT)
    meter = Meter()
    with meter("load"):
        loaded = peer.load(source)
    runner = loaded if isinstance(loaded, LlamaCpp) else Transformers(loaded)
    with meter("first"):
        first_token_seconds = seconds_of(lambda: runner.prefill(prompt))
        runner.step(prompt[:, :1])
    prefill_64_seconds = prefill_seconds(runner, prompt)
    prefill_512_seconds = prefill_seconds(runner, long_prompt)
    with meter("long"):
        runner.prefill(long_prompt)
    rates = [batch / decode_seconds(runner, config, batch, PROMPT) for batch in BATCHES]
    loading, first, long = meter.runs
    weights = expert_weights(config)
    return Measured(
        peer=name,
        turn=turn,
        load_seconds=loading.seconds,
        load_peak_bytes=loading.peak_above_start_bytes,
        loaded_bytes=loading.kept_bytes,
        first_token_seconds=first_token_seconds,
        first_peak_bytes=first.peak_bytes - loading.start_bytes,
        steady_bytes=first.end_bytes - loading.start_bytes,
        long_peak_bytes=long.peak_bytes - loading.start_bytes,
        mapped_bytes=mapped_bytes(source),
        prefill_64_seconds=prefill_64_seconds,
        prefill_512_seconds=prefill_512_seconds,
        decode_1_per_second=rates[0],
        decode_4_per_second=rates[1],
        decode_16_per_second=rates[2],
        bits_on_disk=runner.bits_on_disk(source, weights),
        bits_in_memory=8 * runner.expert_bytes / weights,
        active_bytes=active_bytes(runner, config),
        logits_distance=distance(runner.logits(prompt), torch.load(Path(room) / LOGITS)),
    )


def measure_grown(name: str, folder: str, turn: int, varied: str, tokens: int) -> Grown:
    """The load of one shape, and a token after `tokens` others, once warm."""
    began = perf_counter()
    model = BY_NAME[name].load(Path(folder))
    load_seconds = perf_counter() - began
    config, runner = model.config, Transformers(model)
    runner.prefill(prompts(config, 1, tokens))
    return Grown(
        peer=name,
        turn=turn,
        varied=varied,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        layers=config.num_hidden_layers,
        experts=config.num_local_experts,
        tokens=tokens,
        load_seconds=load_seconds,
        decode_seconds=decode_seconds(runner, config, 1, tokens),
    )


def measure_quantizing(turn: int) -> Quantizing:
    """This lab's quantizer and bitsandbytes' in turn, after one of each to warm up."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(QUANTIZED_SHAPE, generator=generator)).to(torch.bfloat16)

    def ours():
        return quantize_4bit(weight, "nf4", 64, True)

    def theirs():
        return bnb_functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )

    peaks, kept = [], []
    for quantizer in (ours, theirs):
        meter = Meter()
        with meter("quantize"):
            kept.append(quantizer())
        (run,) = meter.runs
        peaks.append(run.peak_above_start_bytes - run.kept_bytes)
    (codes, state), (their_codes, their_state) = kept
    pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(REPEATS)]
    seconds, their_seconds = map(statistics.median, zip(*pairs, strict=True))
    return Quantizing(
        turn=turn,
        ours_weights_per_second=weight.numel() / seconds,
        bitsandbytes_weights_per_second=weight.numel() / their_seconds,
        ours_temporary_bytes=peaks[0],
        bitsandbytes_temporary_bytes=peaks[1],
        equal=torch.equal(codes, their_codes) and torch.equal(state.absmax, their_state.absmax),
        bytes_read_per_second=bytes_read_per_second(),
    )


FUNCTIONS = {
    function.__name__: function
    for function in (
        prepare_saved,
        prepare_logits,
        prepare_gguf,
        measure,
        measure_grown,
        measure_quantizing,
    )
}


# ---------------------------------------------------------------------------- what they are made of


def seconds_of(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def prefill_seconds(runner, prompt: torch.Tensor) -> float:
    """The median of some repetitions, after one that is not counted."""
    runner.prefill(prompt)
    return statistics.median(within_budget(lambda: runner.prefill(prompt), REPEATS, fewest=1))


def decode_seconds(runner, config, batch: int, length: int) -> float:
    """The median token for each of `batch` sequences, after prompts of `length` tokens."""
    runner.prefill(prompts(config, batch, length))
    steps = iter(prompts(config, batch, STEPS, seed=2).split(1, dim=1))
    return statistics.median(within_budget(lambda: runner.step(next(steps)), STEPS, FEWEST_STEPS))


def within_budget(work: Callable[[], object], most: int, fewest: int) -> list[float]:
    """Seconds of each repetition; after the budget none is begun."""
    taken = []
    while len(taken) < fewest or (len(taken) < most and sum(taken) < BUDGET_SECONDS):
        taken.append(seconds_of(work))
    return taken


def prompts(config, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens (batch, length), the same for every peer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def expert_weights(config) -> int:
    one = 3 * config.hidden_size * config.intermediate_size
    return one * config.num_local_experts * config.num_hidden_layers


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def mapped_bytes(source: Path) -> int:
    """Pages of this file, or of the files in this folder, that this process holds mapped; Linux."""
    smaps = Path("/proc/self/smaps")
    files = {str(file.resolve()) for file in (source.iterdir() if source.is_dir() else [source])}
    total, ours = 0, False
    for line in smaps.read_text().splitlines() if smaps.exists() else ():
        key, *rest = line.split(maxsplit=5)
        if not key.endswith(":"):
            ours = bool(rest) and rest[-1] in files
        elif key == "Rss:" and ours:
            total += 1024 * int(rest[0])
    return total


def bytes_read_per_second() -> float:
    """The fastest of several sums over a gibibyte, which all cores read from memory."""
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / min(seconds_of(numbers.sum) for _ in range(REPEATS))


# ------------------------------------------------------------------------------------ the whole run


def apart(function: Callable, *arguments) -> dict | None:
    """What `function` answers in a fresh process; RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, "apart", function.__name__, json.dumps(arguments)],
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        raise RuntimeError(f"{function.__name__}: ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(f"{function.__name__}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(name: str, arguments: str) -> None:
    transformers_logging.disable_progress_bar()
    result = FUNCTIONS[name](*json.loads(arguments))
    print(json.dumps(result and asdict(result)))


def write_checkpoint(folder: Path, **shape) -> Path:
    return write_mixtral(folder, mixtral_config(**shape), torch.Generator().manual_seed(0))


def prepare(room: Path, peers: list[Peer]) -> list[Peer]:
    """Make what the peers load; those whose file could be made."""
    apart(prepare_logits, str(room))
    for function, sources in ((prepare_saved, {SAVED}), (prepare_gguf, set(KINDS))):
        if any(peer.source in sources for peer in peers):
            try:
                apart(function, str(room))
            except RuntimeError as error:
                print(f"Left out: {', '.join(sorted(sources))}. {error}", flush=True)
                peers = [peer for peer in peers if peer.source not in sources]
    return peers


def measured_rounds(
    room: Path, peers: list[Peer], rounds: int
) -> tuple[list[Measured], list[Quantizing]]:
    """Every peer once a round; one that fails is named and left out from then on."""
    measured, quantizing, failed = [], [], set()
    for turn in range(rounds):
        quantizing.append(Quantizing(**apart(measure_quantizing, turn)))
        for peer in peers:
            if peer.name in failed:
                continue
            print(f"round {turn + 1} of {rounds}: {peer.name}", file=sys.stderr, flush=True)
            try:
                measured.append(Measured(**apart(measure, peer.name, str(room), turn)))
            except RuntimeError as error:
                failed.add(peer.name)
                print(f"Left out: {peer.name}. {error}", flush=True)
    return measured, quantizing


def grown_rounds(room: Path, rounds: int) -> list[Grown]:
    """Both peers at every shape, a shape's two after each other."""
    tried = [(varied, change, PROMPT) for varied, change in GROWN]
    tried += [("tokens", {}, tokens) for tokens in GROWN_TOKENS]
    grown = []
    for turn in range(rounds):
        for varied, change, tokens in tried:
            shape = BASE | change
            folder = room / "-".join(map(str, shape.values()))
            if not folder.exists():
                write_checkpoint(folder, **shape)
            for peer in (OURS, GROUPED_MM):
                arguments = (peer.name, str(folder), turn, varied, tokens)
                grown.append(Grown(**apart(measure_grown, *arguments)))
    return grown


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Its name, and which instructions for bf16 it has; on Linux, elsewhere what Python knows."""
    if not cpuinfo.exists():
        return platform.processor()
    entries = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in entries}
    flags = facts.get("flags", "").split()
    found = [flag for flag in BF16_FLAGS if flag in flags]
    return ", ".join([facts.get("model name", platform.processor()), *found])


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "bitsandbytes", "torchao", "llama_cpp_python")
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--checkpoint", type=Path, help="a Mixtral in bf16, instead of a random one"
    )
    parser.add_argument("--json", type=Path, help="write all records into this file")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WORDS",
        help="leave out peers whose name contains one of these words",
    )
    parser.add_argument("--grow", action="store_true", help="how time grows with the shape instead")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = grow if asked.grow else compare
        records = run(Path(folder), asked)
    if asked.json:
        facts = {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "machine": asdict(machine()),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        asked.json.write_text(json.dumps(facts | records, indent=1) + "\n")


def without(peers: Sequence[Peer], words: Sequence[str]) -> list[Peer]:
    """The peers whose name contains none of the words."""
    return [peer for peer in peers if not any(word in peer.name for word in words)]


def grow(room: Path, asked: argparse.Namespace) -> dict:
    grown = grown_rounds(room, asked.rounds)
    print(grown_table(grown))
    return {"grown": [asdict(each) for each in grown]}


def compare(room: Path, asked: argparse.Namespace) -> dict:
    peers = without(PEERS, asked.without)
    for peer in peers:
        if peer.missing:
            print(f"Left out: {peer.name}, which is not installed: {peer.install}")
    if asked.checkpoint:
        (room / BF16).symlink_to(asked.checkpoint.resolve())
    else:
        write_checkpoint(room / BF16, **SHAPE)
    peers = prepare(room, [peer for peer in peers if not peer.missing])
    measured, quantizing = measured_rounds(room, peers, asked.rounds)
    print_comparison(measured, quantizing)
    return {
        "measured": [asdict(each) for each in measured],
        "quantizing": [asdict(each) for each in quantizing],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["apart"]:
        answer(*sys.argv[2:])
    else:
        main()
