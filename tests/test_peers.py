"""What `benchmarks/peers.py` and its modules compute and write, beside the clock."""

import datetime
import json
import math
import platform
import sys
from dataclasses import asdict, replace

import llamacpp
import peer_models
import peer_tables
import peers
import pytest
import torch
from gguf import GGUFReader
from peer_models import GROUPED_MM, OURS, PEERS, Peer, Transformers
from peer_tables import Grown, Measure, Measured, Quantizing
from random_checkpoints import mixtral_config, read_tensors, write_mixtral
from torch import nn
from transformers import AutoConfig

SECONDS = Measure("load s", "load_seconds", 1, 2)


def measured(peer: str, turn: int, seconds: float) -> Measured:
    rest = dict.fromkeys(Measured.__dataclass_fields__, 1.0)
    return Measured(**rest | {"peer": peer, "turn": turn, "load_seconds": seconds})


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """What the peers are measured in, with a small checkpoint and what bf16 answers."""
    folder = tmp_path_factory.mktemp("room")
    config = mixtral_config(hidden=256, experts=4)
    write_mixtral(folder / peers.BF16, config, torch.Generator().manual_seed(0))
    peers.prepare_logits(str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(room):
    return room / peers.BF16


# --------------------------------------------------------------------------------------- the tables


def test_ratios_are_taken_within_a_round():
    records = [
        measured("ours", 0, 1.0),
        measured("theirs", 0, 2.0),
        measured("ours", 1, 3.0),
        measured("theirs", 1, 4.0),
        measured("theirs", 2, 4.0),  # ours failed
    ]
    assert peer_tables.ratios(records, "ours", "theirs", SECONDS) == [0.5, 0.75]


def test_nothing_is_divided_by_nothing():
    records = [measured("ours", 0, 1.0), measured("theirs", 0, 0.0)]
    assert peer_tables.ratios(records, "ours", "theirs", SECONDS) == []
    assert "-" in peer_tables.ratios_table(records, "ours", (SECONDS,)).splitlines()[1]


def test_a_cell_shows_the_range_where_there_is_one():
    assert peer_tables.cell([2.0], 1) == peer_tables.cell([2.0, 2.0], 1) == "2.0"
    assert peer_tables.cell([1.0, 4.0, 2.0], 0) == "2 (1..4)"


def test_columns_are_aligned():
    lines = peer_tables.table(["", "s"], [["short", "1"], ["a long name", "1,000"]]).splitlines()
    assert len(set(map(len, lines))) == 1
    assert lines[1] == "short            1"


def test_the_floor_is_what_the_bytes_allow():
    decoding = replace(measured("one", 0, 1.0), active_bytes=100, decode_1_per_second=25.0)
    last = peer_tables.floors_table([decoding], bytes_per_second=10_000).splitlines()[-1]
    assert last.split() == ["one", "0.0", "100", "25"]


def test_a_growing_shape_has_one_row_for_both_peers():
    shape = {"varied": "width", "hidden": 1, "ffn": 2, "layers": 3, "experts": 4, "tokens": 5}
    grown = [
        Grown(peer.name, turn, **shape, load_seconds=seconds, decode_seconds=seconds)
        for turn in range(2)
        for peer, seconds in ((OURS, 0.001), (GROUPED_MM, 0.002))
    ]
    assert peer_tables.grown_table(grown).splitlines()[1:] == [
        "width       1       3        4       5      1.0   2.0   0.50       1.0   2.0   0.50"
    ]


def test_every_function_that_runs_apart_is_known_by_its_name():
    assert all(getattr(peers, name) is function for name, function in peers.FUNCTIONS.items())
    assert {peer.source for peer in PEERS} == {peers.BF16, peers.SAVED, *llamacpp.KINDS}


def test_a_peer_is_missing_until_all_it_needs_is_there():
    assert not Peer("", print, needs=("json",)).missing
    assert Peer("", print, needs=("json", "no_such_package")).missing


def test_peers_are_left_out_by_words_of_their_names():
    left = [peer.name for peer in peers.without(PEERS, ["replace_parameter", "eager", "llama"])]
    assert left == [
        *("this lab, from bf16", "this lab, saved in 4 bits", "transformers bf16, grouped_mm"),
        *("bitsandbytes, stock", "bitsandbytes, a Linear4bit each", "torchao int4"),
    ]
    assert peers.without(PEERS, []) == list(PEERS)


def test_what_is_left_out_is_neither_made_nor_measured(monkeypatch, tmp_path, capsys):
    """The file says what is needed to read it later: records, date and processor."""
    asked = []

    def apart(function, *arguments):
        asked.append((function.__name__, *arguments))
        if function is peers.measure:
            name, _room, turn = arguments
            return asdict(measured(name, turn, 1.0))
        if function is peers.measure_quantizing:
            return dict.fromkeys(Quantizing.__dataclass_fields__, 1)

    monkeypatch.setattr(peers, "apart", apart)
    monkeypatch.setattr(peers, "write_checkpoint", lambda folder, **shape: folder)
    file = tmp_path / "peers.json"
    words = ["bitsandbytes", "torchao", "llama", "saved", "eager"]
    monkeypatch.setattr(sys, "argv", ["peers.py", "--json", str(file), "--without", *words])
    peers.main()
    names = {name for name, *_ in asked}
    assert names == {"prepare_logits", "measure_quantizing", "measure"}
    kept = json.loads(file.read_text())
    assert [each["peer"] for each in kept["measured"]] == [OURS.name, GROUPED_MM.name] * 3
    assert kept["date"] == datetime.date.today().isoformat()
    assert kept["processor"] == peers.processor()
    assert "bitsandbytes, stock" not in capsys.readouterr().out


def test_a_processor_is_named_with_what_it_has_for_bf16(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    core = "model name\t: One of Many\nflags\t\t: fpu amx_bf16 avx512_bf16 avx512f\n\n"
    cpuinfo.write_text(core * 2)
    assert peers.processor(cpuinfo) == "One of Many, avx512_bf16, amx_bf16"
    cpuinfo.write_text("model name\t: Old: and slow\nflags\t\t: fpu\n")
    assert peers.processor(cpuinfo) == "Old: and slow"
    assert peers.processor(tmp_path / "none") == platform.processor()


@pytest.mark.parametrize(("budget", "times"), [(math.inf, 5), (0.0, 2)])
def test_a_budget_ends_repetitions_but_not_before_the_fewest(monkeypatch, budget, times):
    monkeypatch.setattr(peers, "BUDGET_SECONDS", budget)
    assert len(peers.within_budget(lambda: None, most=5, fewest=2)) == times


# ------------------------------------------------------------------------------- what a model holds


def test_bytes_are_counted_once_with_every_constant():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    linear = peer_models.bitsandbytes_linear(weight)
    state = linear.weight.quant_state
    constants = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    expected = 64 * 128 // 2 + sum(tensor.nbytes for tensor in constants)
    assert (
        peer_models.held_bytes([linear])
        == peer_models.held_bytes([linear, linear.weight])
        == expected
    )


def test_views_of_one_storage_are_one():
    module = nn.Module()
    module.one = nn.Parameter(torch.zeros(8))
    module.other = module.one.detach()[:4]
    assert peer_models.held_bytes([module]) == 32


def test_in_bf16_experts_have_16_bits_and_a_token_reads_all_but_embeddings(checkpoint):
    runner = Transformers(peer_models.load_eager(checkpoint))
    weights = peers.expert_weights(runner.model.config)
    assert runner.bits_on_disk(checkpoint, weights) == 16
    assert 8 * runner.expert_bytes / weights == 16
    embeddings = runner.model.model.embed_tokens.weight.nbytes
    total = sum(parameter.nbytes for parameter in runner.model.parameters())
    rotary = runner.model.model.rotary_emb
    buffers = sum(buffer.nbytes for buffer in rotary.buffers())
    assert 0 <= runner.outer_bytes + runner.expert_bytes + embeddings - total <= buffers


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc/self/smaps")
def test_mapped_pages_count_once_they_are_touched(tmp_path):
    (tmp_path / "file").write_bytes(bytes(2**20))
    mapped = torch.from_file(str(tmp_path / "file"), size=2**20, dtype=torch.uint8)
    before = peers.mapped_bytes(tmp_path)
    mapped.sum()
    assert before < peers.mapped_bytes(tmp_path) == peers.mapped_bytes(tmp_path / "file") == 2**20


# ---------------------------------------------------------------------------------------- the peers


def plain_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_a_linear_for_each_matrix_computes_what_the_fused_experts_do(room, checkpoint):
    runner = Transformers(peer_models.filled(checkpoint, plain_linear))
    tokens = peers.prompts(runner.model.config, 1, peers.PROMPT)
    assert peers.distance(runner.logits(tokens), torch.load(room / peers.LOGITS)) < 0.005


@pytest.mark.parametrize("name", [OURS.name, "bitsandbytes, replace_parameter"])
def test_all_is_measured(monkeypatch, room, name):
    monkeypatch.setattr(peers, "BUDGET_SECONDS", 0.0)
    found = peers.measure(name, str(room), 0)
    assert (found.peer, found.turn, found.bits_on_disk) == (name, 0, 16)
    assert 4 < found.bits_in_memory < 5
    assert 0 < found.logits_distance < 0.1
    assert min(found.prefill_512_seconds, found.decode_16_per_second) > 0
    assert found.load_peak_bytes >= found.loaded_bytes


# ----------------------------------------------------------------------------- llama.cpp's own file


def test_rows_are_interleaved_head_by_head():
    weight = torch.arange(8)[:, None]
    assert llamacpp.interleaved(weight, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_gguf_file_holds_the_checkpoint(tmp_path, checkpoint):
    llamacpp.write_gguf(checkpoint, tmp_path / "file.gguf")
    reader = GGUFReader(tmp_path / "file.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    published = read_tensors(checkpoint)
    assert set(stored) == {llamacpp.gguf_name(name) for name in published}
    config = AutoConfig.from_pretrained(checkpoint)
    assert reader.fields["llama.expert_count"].contents() == config.num_local_experts

    def bf16(name):
        return torch.from_numpy(stored[name].data.copy()).view(torch.bfloat16)

    for expert in range(config.num_local_experts):
        down = published[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(bf16("blk.1.ffn_down_exps.weight")[expert], down)
    queries = published["model.layers.0.self_attn.q_proj.weight"]
    heads = config.num_attention_heads
    assert torch.equal(bf16("blk.0.attn_q.weight"), llamacpp.interleaved(queries, heads))
    router = torch.from_numpy(stored["blk.0.ffn_gate_inp.weight"].data.copy())
    assert torch.equal(router, published["model.layers.0.block_sparse_moe.gate.weight"].float())
