"""What is usually said of quantizing Mixtures of Experts, and what was measured.

A good article on the subject makes these claims. Each is measured in one of the notebooks, and its
verdict is computed from the measurement; the notebook prints it where the number was just seen.
"""

from dataclasses import dataclass

CLAIMS = {
    "C1": "Fewer bits shrink a model in proportion: from 16 to 4 bits an expert gets 4 times "
    "smaller.",
    "C2": "The experts hold the overwhelming majority of an MoE model's parameters.",
    "C3": "GPTQ and AWQ, applied expert by expert, lose less than plain rounding.",
    "C4": "Dequantizing on the fly is efficient, because moving fewer bytes is what counts.",
    "C5": "The router is far more sensitive than the experts: a small change of its logits sends "
    "tokens elsewhere.",
    "C6": "Keeping the router in 16 bits costs next to nothing.",
    "C7": "A router kept at full precision keeps routing stable.",
    "C8": "Few bits for the experts and a 16-bit router is the best trade.",
    "C9": "transformers and bitsandbytes are smart enough to leave the router and the head alone.",
    "C10": "That same configuration quantizes the experts.",
    "C11": "NF4 is the best 4-bit format for neural network weights, which are close to normal.",
    "C12": "Double quantization saves a further 0.4 bits per parameter.",
    "C13": "INT8 is nearly lossless; outliers need care.",
    "C14": "4 bits let very large MoE models run on consumer or single-server GPUs.",
    "C15": "Offloaded experts and speculative decoding combine with it into something practical.",
}


@dataclass(frozen=True)
class Verdict:
    """One claim held against one measurement.

    `limit` says where the claim stops being true; it is empty where no limit was found.

    >>> print(Verdict("C6", holds=True, measured="0.002% of the bytes"))
    C6 holds
      claim     Keeping the router in 16 bits costs next to nothing.
      measured  0.002% of the bytes

    Raises KeyError for a claim that is not in `CLAIMS`.
    """

    claim: str
    holds: bool
    measured: str
    limit: str = ""

    def __post_init__(self):
        CLAIMS[self.claim]

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "does not hold today"
        return "holds, with a limit" if self.limit else "holds"

    def __str__(self):
        lines = [
            f"{self.claim} {self.verdict}",
            f"  claim     {CLAIMS[self.claim]}",
            f"  measured  {self.measured}",
        ]
        return "\n".join([*lines, f"  limit     {self.limit}"] if self.limit else lines)
