import pytest

from labutils.anatomy import Part, part_of

# Published names, transformers' own names, and names with constants behind them.
NAMES = {
    "model.embed_tokens.weight": Part("embeddings"),
    "lm_head.weight": Part("lm_head"),
    "model.norm.weight": Part("norms"),
    "model.layers.3.input_layernorm.weight": Part("norms", 3),
    "model.layers.3.self_attn.q_norm.weight": Part("norms", 3),
    "model.layers.3.self_attn.k_proj.weight": Part("attention", 3, None, "k_proj"),
    "model.layers.3.block_sparse_moe.gate.weight": Part("router", 3),
    "model.layers.3.mlp.gate.stored.weight": Part("router", 3),
    "model.layers.3.block_sparse_moe.experts.7.w1.weight": Part("experts", 3, 7, "gate_proj"),
    "model.layers.3.block_sparse_moe.experts.7.w2.weight": Part("experts", 3, 7, "down_proj"),
    "model.layers.3.mlp.experts.11.up_proj.weight": Part("experts", 3, 11, "up_proj"),
    "model.layers.3.mlp.experts.gate_up_proj": Part("experts", 3, None, "gate_up_proj"),
    "model.layers.3.mlp.shared_experts.up_proj.weight": Part("shared_experts", 3, None, "up_proj"),
    "model.layers.3.mlp.up_proj.weight": Part("dense_mlp", 3, None, "up_proj"),
    "model.something.else": Part("other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_kind_have_their_part(name):
    assert part_of(name) == NAMES[name]


def test_the_path_is_the_same_for_every_family():
    mixtral = part_of("model.layers.0.block_sparse_moe.experts.3.w3.weight")
    olmoe = part_of("model.layers.0.mlp.experts.3.up_proj.weight")
    assert mixtral.path == olmoe.path == "layers.0.experts.3.up_proj"
    assert part_of("lm_head.weight").path == "lm_head"
