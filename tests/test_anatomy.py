import pytest

from labutils.anatomy import Part, Weight, is_transposed, matrices, part_of

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
    "model.layers.3.feed_forward.up_proj.weight": Part("dense_mlp", 3, None, "up_proj"),
    "model.layers.3.feed_forward.router.weight": Part("router", 3),
    "model.layers.3.feed_forward.shared_expert.up_proj.weight": Part(
        "shared_experts", 3, None, "up_proj"
    ),
    "model.layers.3.feed_forward.experts.down_proj": Part("experts", 3, None, "down_proj"),
    "model.layers.3.mlp.experts.down_proj_bias": Part("experts", 3, None, "down_proj"),
    "model.layers.3.mlp.router.bias": Part("router", 3),
    "model.layers.3.self_attn.sinks": Part("attention", 3),
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


FUSED = "model.layers.3.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("gate_up", "down", "transposed"),
    [
        ((8, 192, 128), (8, 128, 96), False),
        ((8, 128, 192), (8, 96, 128), True),
        ((8, 128, 128), (8, 128, 64), False),  # 2 * ffn is the hidden size: down decides
        ((8, 128, 128), (8, 64, 128), True),
    ],
)
def test_two_shapes_tell_how_fused_experts_lie(gate_up, down, transposed):
    shapes = {FUSED: gate_up, FUSED.replace("gate_up", "down"): down, f"{FUSED}_bias": (8, 192)}
    assert is_transposed(FUSED, shapes) is transposed
    gate, up = matrices(FUSED, gate_up, transposed)[10:12]
    hidden, ffn = (down[2], down[1]) if transposed else (down[1], down[2])
    assert gate == Weight(Part("experts", 3, 5, "gate_proj"), (ffn, hidden))
    assert up == Weight(Part("experts", 3, 5, "up_proj"), (ffn, hidden))
    assert not is_transposed(f"{FUSED}_bias", shapes)


def test_biases_of_fused_experts_belong_to_each_matrix():
    biases = matrices(f"{FUSED}_bias", (8, 192))
    assert len(biases) == 16
    assert biases[3] == Weight(Part("experts", 3, 1, "up_proj"), (96,))
    down = matrices("model.layers.3.mlp.experts.down_proj_bias", (8, 128))
    assert down[7] == Weight(Part("experts", 3, 7, "down_proj"), (128,))


def test_nothing_but_fused_experts_is_transposed():
    shapes = {"model.layers.3.mlp.up_proj.weight": (256, 128)}
    assert not is_transposed("model.layers.3.mlp.up_proj.weight", shapes)
