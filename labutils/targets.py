"""Many modules in few words: the regular expressions by which other engines are told them.

An engine that reads a format for each of 768 experts' matrices takes patterns of names. These here
are anchored at both ends, so that they fit the modules they are made for, and no others. Experts
go by two kinds of names, `block_sparse_moe.experts.3.w1` where Mixtral is published, and
`mlp.experts.3.gate_proj` elsewhere and inside of engines; a pattern fits both.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from .anatomy import PROJECTIONS

BLOCKS = ("mlp", "block_sparse_moe")


def patterns(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Anchored patterns that fit `names` and nothing else of `everything`.

    >>> everything = [f"layers.{layer}.{leaf}" for layer in range(3) for leaf in "qk"]
    >>> patterns(["layers.0.q", "layers.0.k", "layers.2.q", "layers.2.k"], everything)
    ['^layers\\.(0|2)\\.(q|k)$']
    """
    chosen, present = _by_kind(names), _by_kind(everything)
    alike = defaultdict(list)
    for (*path, leaf), numbers in chosen.items():
        indices = _indices(numbers, present[*path, leaf])
        alike[tuple(path), tuple(indices)].append(leaf)
    return [
        _pattern(path, numbers, leaves)
        for (path, indices), leaves in alike.items()
        for numbers in indices
    ]


def _by_kind(names: Iterable[str]) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Names without their numbers, and the numbers that occur in each."""
    kinds = defaultdict(set)
    for name in names:
        pieces = name.split(".")
        kind = tuple("#" if piece.isdigit() else piece for piece in pieces)
        kinds[kind].add(tuple(piece for piece in pieces if piece.isdigit()))
    return kinds


def _indices(
    chosen: Iterable[tuple[str, ...]], present: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Patterns for the numbers, from the outside in; any number where all are chosen."""
    chosen, present = set(chosen), set(present)
    if chosen == present:
        return [(r"\d+",) * len(next(iter(present)))]
    alike = defaultdict(list)
    for first in sorted({numbers[0] for numbers in chosen}, key=int):
        inner = [{n[1:] for n in numbers if n[0] == first} for numbers in (chosen, present)]
        alike[tuple(_indices(*inner))].append(first)
    return [(_any_of(firsts), *rest) for rests, firsts in alike.items() for rest in rests]


def _pattern(path: tuple[str, ...], numbers: tuple[str, ...], leaves: list[str]) -> str:
    left = iter(numbers)
    pieces = [next(left) if piece == "#" else re.escape(piece) for piece in path]
    if "experts" in path:
        pieces = [_any_of(BLOCKS) if piece in BLOCKS else piece for piece in pieces]
        meant = {PROJECTIONS.get(leaf) for leaf in leaves}
        leaves = [*leaves, *(name for name, its in PROJECTIONS.items() if its in meant)]
    names = [re.escape(leaf) for leaf in dict.fromkeys(leaves)]
    return "^" + r"\.".join([*pieces, _any_of(names)]) + "$"


def _any_of(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    return pieces[0] if len(pieces) == 1 else f"({'|'.join(pieces)})"
