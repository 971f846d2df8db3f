"""A Mixtral at its real widths in 4 bits, on this machine: load, memory, tokens a second.

    python benchmarks/full_width.py FOLDER --layers 8

Hidden 4096, ffn 14336, 8 experts, vocabulary 32000; weights are random, as speed does not depend
on them. FOLDER gets the checkpoint in 16 bits (2.9 GB a layer, one layer in memory at a time)
unless it is there already, and beside it FOLDER-nf4, the same saved in 4 bits. All 32 layers are
the shape of the real Mixtral-8x7B: 93 GB on the disk.
"""

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import torch
from peer_models import Transformers, active_bytes
from peers import bytes_read_per_second
from random_checkpoints import mixtral_config, write_mixtral

from labutils.checkpoints import coverage, load, save
from labutils.meter import GIB, Meter
from labutils.recipes import Recipe

PROMPT_TOKENS, NEW_TOKENS = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    chosen = parser.parse_args()
    if not chosen.folder.exists():
        config = mixtral_config(4096, 14336, chosen.layers, experts=8, vocab=32000)
        write_mixtral(chosen.folder, config, torch.Generator().manual_seed(0))
    on_disk_bytes = sum(file.stat().st_size for file in chosen.folder.iterdir())
    print(
        f"{chosen.layers} layers, {on_disk_bytes / GIB:.1f} GiB in 16 bits, {os.cpu_count()} cores"
    )
    model = loaded("quantized while loading", chosen.folder, Recipe(attention="nf4"))
    run(model)
    saved = chosen.folder.with_name(chosen.folder.name + "-nf4")
    if not saved.exists():
        save(model, saved)
    del model
    gc.collect()
    run(loaded("saved in 4 bits", saved, None))


def loaded(label: str, folder: Path, recipe: Recipe | None) -> torch.nn.Module:
    meter = Meter()
    with meter(label):
        model = load(folder, recipe)
    took = meter.runs[0]
    stored_bytes = coverage(model).total_bytes
    print(
        f"{label}: {took.seconds:.1f} s, peak {took.peak_above_start_bytes / GIB:.2f} GiB, "
        f"{took.kept_bytes / GIB:.2f} GiB stay, {stored_bytes / GIB:.2f} GiB are stored"
    )
    return model


@torch.no_grad()
def run(model: torch.nn.Module) -> None:
    """A prompt and a continuation, against what memory allows."""
    seconds = []
    tokens = torch.arange(PROMPT_TOKENS, device=model.device)[None]
    began = time.perf_counter()
    step = model(tokens, use_cache=True)
    prompt_seconds = time.perf_counter() - began
    for _ in range(NEW_TOKENS):
        began = time.perf_counter()
        chosen = step.logits[:, -1:].argmax(-1)
        step = model(chosen, past_key_values=step.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - began)
    pace = statistics.median(seconds)
    floor = active_bytes(Transformers(model), model.config) / bytes_read_per_second()
    print(
        f"  {PROMPT_TOKENS} tokens of prompt in {prompt_seconds:.2f} s, {1 / pace:.2f} tokens/s "
        f"({1 / max(seconds):.2f} to {1 / min(seconds):.2f}); memory allows {1 / floor:.2f}: "
        f"{floor / pace:.0%} of it"
    )


if __name__ == "__main__":
    main()
