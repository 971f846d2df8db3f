"""Which part of a model a weight belongs to.

Everything in this lab that speaks of "the experts" or "the router" (a recipe, a budget, a coverage
table) means the same set of weights by it. The names of the weights decide, and this module reads
them: both the names that transformers 5 gives its modules (`mlp.experts.gate_up_proj`) and the
published ones in the checkpoint files (`block_sparse_moe.experts.3.w1.weight`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

COMPONENTS = (
    "embeddings",
    "attention",
    "router",
    "experts",
    "shared_experts",
    "dense_mlp",
    "norms",
    "lm_head",
    "other",
)

PROJECTIONS = {
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "gate_proj": "gate_proj",
    "down_proj": "down_proj",
    "up_proj": "up_proj",
}

# The first pattern found in a name decides, so the special ones come first.
_PATTERNS = tuple(
    (component, re.compile(pattern))
    for component, pattern in (
        ("norms", r"norm"),
        ("shared_experts", r"shared_expert|shared_mlp"),
        ("experts", r"\.experts\."),
        ("router", r"\.(gate|router)\b"),
        ("attention", r"attn|attention"),
        ("dense_mlp", r"\.(mlp|feed_forward)\."),
        ("lm_head", r"lm_head"),
        ("embeddings", r"embed_tokens|embed_in|wte\b"),
    )
)


@dataclass(frozen=True)
class Part:
    """The place of one weight in a model.

    `layer`, `expert` and `projection` are None where they make no sense: an embedding has no layer,
    a fused experts tensor has no single expert.

    >>> part_of("model.layers.2.block_sparse_moe.experts.5.w2.weight").path
    'layers.2.experts.5.down_proj'
    """

    component: str
    layer: int | None = None
    expert: int | None = None
    projection: str | None = None

    @property
    def path(self) -> str:
        """The place in one line, from the outside in, the same for every model family."""
        layer = f"layers.{self.layer}." if self.layer is not None else ""
        inner = [self.component, self.expert, self.projection]
        return layer + ".".join(str(piece) for piece in inner if piece is not None)


def part_of(name: str) -> Part:
    """The part of the model that the weight or module called `name` belongs to.

    >>> part_of("model.layers.0.self_attn.q_proj")
    Part(component='attention', layer=0, expert=None, projection='q_proj')
    >>> part_of("lm_head.weight")
    Part(component='lm_head', layer=None, expert=None, projection=None)

    A name that fits nothing known is `other`: it is counted, and never quantized.
    """
    layer = re.search(r"\blayers\.(\d+)\.", name)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    leaf = re.search(r"\.(\w+_proj|w[123])(_bias)?(\.|$)", name)
    component = next((label for label, pattern in _PATTERNS if pattern.search(name)), "other")
    has_projection = leaf and component not in ("norms", "router")
    return Part(
        component,
        int(layer[1]) if layer else None,
        int(expert[1]) if expert else None,
        PROJECTIONS.get(leaf[1], leaf[1]) if has_projection else None,
    )


@dataclass(frozen=True)
class Weight:
    """One weight as a recipe sees it: a fused experts tensor counts as one `Weight` per matrix.

    A matrix has the shape (outputs, inputs), however its tensor lies in memory.
    """

    part: Part
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def matrices(name: str, shape: tuple[int, ...], transposed: bool = False) -> list[Weight]:
    """The weights that the parameter called `name` holds: more than one where experts are fused.

    >>> len(matrices("model.layers.0.mlp.experts.gate_up_proj", (8, 28672, 4096)))
    16

    Fused experts are (experts, outputs, inputs), or (experts, inputs, outputs) if `transposed`, as
    `is_transposed` finds out; their biases are (experts, outputs). Whether gate and up come one
    after the other or take turns, as in gpt-oss, changes no shape and no byte.
    """
    part = part_of(name)
    is_bias = name.endswith("_bias")
    if part.component != "experts" or len(shape) != (2 if is_bias else 3):
        return [Weight(part, shape)]
    experts, outputs, *inputs = (shape[0], *reversed(shape[1:])) if transposed else shape
    fused = part.projection == "gate_up_proj"
    projections = ("gate_proj", "up_proj") if fused else (part.projection,)
    each = (outputs // len(projections), *inputs)
    return [
        Weight(Part("experts", part.layer, expert, projection), each)
        for expert in range(experts)
        for projection in projections
    ]


def is_transposed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the fused experts tensor called `name` holds each matrix as (inputs, outputs).

    Most families keep (experts, 2 * ffn, hidden) beside (experts, hidden, ffn); gpt-oss and Llama-4
    keep (experts, hidden, 2 * ffn) beside (experts, ffn, hidden). One shape alone does not tell,
    the two together do. `shapes` are those of all parameters of the model, by name.
    """
    module = name.rpartition(".")[0]
    gate_up, down = (shapes.get(f"{module}.{leaf}", ()) for leaf in ("gate_up_proj", "down_proj"))
    if len(gate_up) != 3 or len(down) != 3 or name.endswith("_bias"):
        return False
    return gate_up[1] == down[2] and gate_up[2] == 2 * down[1]
