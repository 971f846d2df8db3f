"""Whose parameters are they: every component of a model, and what a token meets of it.

A Mixture-of-Experts model has two sizes. All its parameters must be *kept*; for one token only
those of the chosen experts are *active*, and everything that is not an expert:

    active = all others + experts x top_k / (number of experts)

Mixtral-8x7B keeps 46.7 billion and meets 12.9 billion with each token (Jiang et al. 2024,
arXiv:2401.04088, section 1, says 47 and 13).

`PUBLISHED` are the configurations of eight models, as their authors give them: the numbers that
decide a shape, and the longest context. They can be counted, and given to `budget.predict`,
without a download:

| model | parameters | active | published in |
|---|---|---|---|
| Mixtral-8x7B | 46.7 B | 12.9 B | arXiv:2401.04088 |
| Mixtral-8x22B | 141 B | 39 B | mistral.ai/news/mixtral-8x22b |
| OLMoE-1B-7B | 6.9 B | 1.3 B | arXiv:2409.02060 |
| Qwen3-30B-A3B | 30.5 B | 3.3 B | arXiv:2505.09388 |
| DeepSeek-V2-Lite | 15.7 B | 2.4 B | arXiv:2405.04434, appendix B |
| Qwen1.5-MoE-A2.7B | 14.3 B | 2.7 B | qwenlm.github.io/blog/qwen-moe |
| gpt-oss-20b | 20.9 B | 3.6 B | arXiv:2508.10925, table 1 |
| Llama-4-Scout-17B-16E | 109 B | 17 B | ai.meta.com/blog/llama-4-multimodal-intelligence |

What is counted as active differs a little: here the embeddings are, all rows of them. DeepSeek's
2.4 B and gpt-oss's 3.6 B leave them out on the way in; with them it is 2.7 B and 4.2 B. Of Llama-4,
which also sees pictures, only the text model is here, 107.8 B.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .anatomy import COMPONENTS
from .budget import read_config, weights_of

PUBLISHED: dict[str, Path] = {
    name: Path(__file__).parent / "data" / "configs" / f"{name}.json"
    for name in (
        "Mixtral-8x7B",
        "Mixtral-8x22B",
        "OLMoE-1B-7B",
        "Qwen3-30B-A3B",
        "DeepSeek-V2-Lite",
        "Qwen1.5-MoE-A2.7B",
        "gpt-oss-20b",
        "Llama-4-Scout-17B-16E",
    )
}


@dataclass(frozen=True)
class Ledger:
    """How many parameters each component of a model holds, and how many experts share them.

    `parameters` has an entry for every component that the model has; `experts` are those that a
    router chooses `top_k` of, in each layer that has one. Experts that every token goes through
    are a component of their own, `shared_experts`.
    """

    parameters: dict[str, int]
    experts: int
    top_k: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Parameters that one token meets."""
        idle = self.experts - self.top_k
        return self.total - self.parameters["experts"] * idle // self.experts

    @property
    def experts_share(self) -> float:
        """The experts' share of all parameters, between 0 and 1."""
        return self.parameters["experts"] / self.total

    @property
    def experts_share_of_active(self) -> float:
        """The chosen experts' share of what one token meets."""
        return self.parameters["experts"] * self.top_k // self.experts / self.active

    def with_experts(self, experts: int, top_k: int) -> Ledger:
        """The same model with another number of experts, and another number of them for a token.

        Experts and the router grow in proportion, everything else stays.

        >>> ledger_of(PUBLISHED["Mixtral-8x7B"]).with_experts(16, 2).total
        91800997888

        Raises ValueError unless 1 <= top_k <= experts.
        """
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k}: with {experts} experts it must be 1 to {experts}.")
        grown = {
            name: size * experts // self.experts if name in ("experts", "router") else size
            for name, size in self.parameters.items()
        }
        return Ledger(grown, experts, top_k)


def ledger_of(config_or_path) -> Ledger:
    """The ledger of the model that a config describes; a folder, a file or a hub name will do.

    Counted on the meta device: no weight is read or made.

    >>> ledger_of(PUBLISHED["Mixtral-8x7B"]).parameters["experts"]
    45097156608

    Raises ValueError for a model without experts.
    """
    config = read_config(config_or_path)
    weights = weights_of(config)
    counted = Counter()
    for weight in weights:
        counted[weight.part.component] += weight.parameters
    if not counted["experts"]:
        raise ValueError(f"A {type(config).__name__} model has no experts that a router chooses.")
    return Ledger(
        {name: counted[name] for name in COMPONENTS if name in counted},
        1 + max(w.part.expert for w in weights if w.part.expert is not None),
        config.get_text_config().num_experts_per_tok,
    )
