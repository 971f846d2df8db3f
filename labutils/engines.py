"""A recipe taken elsewhere: code and files, ready to run, for the engines that people use.

`handouts` gives a `Handout` for each engine: a text to be saved as a file, how far it was checked
here, and warnings. Whatever the engine cannot express is in the warnings, with what stands in its
place; where nothing sensible can, it is refused. The functions that make one take a `Skeleton`, a
model without its weights and the recipe for it, and raise ValueError there.

| engine | text | checked |
|---|---|---|
| this lab | Python, `checkpoints.load` | loaded: the tests run it |
| transformers, with `RecipeConfig` | Python | loaded: the tests run it |
| transformers, with stock bitsandbytes | Python | loaded: the tests run it, and count |
| llm-compressor | a YAML recipe | schemes and targets parsed by compressed-tensors 0.20.0 |
| GPTQModel | Python | only printed; names read in its source, 7.3.4 |
| vLLM | shell | only printed; flags read in its documentation of 2026 |
| llama.cpp | shell | types and tensor names are those of its library, gguf 0.19.0 |

Read in August 2026: llm-compressor at ab1ba3e (its recipes and modifiers), GPTQModel at f4c327a
(`QuantizeConfig`, `dynamic`), vLLM's docs/serving/parallelism_scaling.md and
compressed_tensors_moe.py, llama.cpp's tools/quantize/quantize.cpp and src/llama-quant.cpp. None of
the four is installed here.
"""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import yaml
from torch import nn

from .anatomy import Weight, is_transposed, matrices
from .budget import read_config, skeleton, weight_bytes, weights_in
from .formats import FORMATS
from .ledger import PUBLISHED
from .meter import sized
from .recipes import Recipe, check_overrides
from .targets import patterns

LOADED, PARSED, PRINTED = "loaded", "parsed by its own library", "only printed"
REFUSED = "refused"
LOADABLE = ("bitsandbytes", "labutils")

INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
NEAREST_INTEGER = {f"nf{bits}": f"int{bits}" for bits in range(2, 9)} | {"fp4": "int4"}
GPTQMODEL_FORMATS = NEAREST_INTEGER | {"mxfp4": "int4", "nvfp4": "int4", "fp8_e4m3": "int8"}
GPTQMODEL_BLOCKS = (32, 64, 128, 256, 512, 1024)
MARLIN_BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class GgmlType:
    """A type that llama-quantize writes: its `name`, and how many weights share their scales."""

    name: str
    block: int


_Q2, _Q3, _Q6 = GgmlType("q2_k", 256), GgmlType("q3_k", 256), GgmlType("q6_k", 256)
_Q5, _Q8 = GgmlType("q5_0", 32), GgmlType("q8_0", 32)
GGML_TYPES = {
    "int2": _Q2,
    "int3": _Q3,
    "int4": GgmlType("q4_0", 32),
    "int5": _Q5,
    "int6": _Q6,
    "int7": _Q8,
    "int8": _Q8,
    "nf2": _Q2,
    "nf3": _Q3,
    "nf4": GgmlType("iq4_nl", 32),
    "nf5": _Q5,
    "nf6": _Q6,
    "nf7": _Q8,
    "nf8": _Q8,
    "fp4": GgmlType("mxfp4", 32),
    "mxfp4": GgmlType("mxfp4", 32),
    "fp8_e4m3": _Q8,
    "bf16": GgmlType("bf16", 1),
    "fp16": GgmlType("f16", 1),
    "fp32": GgmlType("f32", 1),
}
EXACT_IN_GGML = ("mxfp4", "bf16", "fp16", "fp32")
GGML_FTYPES = {"mxfp4": "MXFP4_MOE"}
GGML_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "shared_expert_gate": "ffn_gate_inp",
}
GGML_ENDINGS = {"experts": "_exps", "shared_experts": "_shexp"}


@dataclass(frozen=True)
class Handout:
    """What to save as `filename` and run, or read, for one engine.

    `checked` says how far it was tried here: "loaded", "parsed by its own library", "only printed",
    or "refused", with an empty text and the reason in `warnings`.
    """

    engine: str
    filename: str
    text: str
    checked: str
    warnings: tuple[str, ...] = ()


def handouts(model_name: str, config, recipe: Recipe) -> tuple[Handout, ...]:
    """A handout for each engine; one that cannot express the recipe says why.

    `config` describes the model; a name in `ledger.PUBLISHED`, a folder, a file or a hub name will
    do. `model_name` is written into the texts: a hub name or a folder.

    Raises ValueError for an override that fits no part of the model, for a model without experts,
    and for a name that is empty or looks like an option.
    """
    model = Skeleton.of(model_name, config, recipe)
    makers: dict[str, Callable[[Skeleton], Handout]] = {
        "this lab": labutils,
        "transformers, this lab's quantizer": transformers,
        "transformers, stock bitsandbytes": bitsandbytes,
        "llm-compressor": llm_compressor,
        "GPTQModel": gptqmodel,
        "vLLM, one GPU": vllm,
        "vLLM, two GPUs": partial(vllm, gpus=2),
        "vLLM, two machines": partial(vllm, gpus=2, nodes=2),
        "llama.cpp": llama_cpp,
    }
    made = []
    for engine, make in makers.items():
        try:
            made.append(replace(make(model), engine=engine))
        except ValueError as error:
            made.append(Handout(engine, "", "", REFUSED, (str(error),)))
    return tuple(made)


# ------------------------------------------------------------------- transformers and Python


def labutils(model: "Skeleton") -> Handout:
    """Code that loads the model through `checkpoints.load`: checked before, proved afterwards.

    Checked by running it on the stand-in.

    Raises ValueError for a recipe that can only be simulated or mixes floating-point formats, for
    experts that are no plain gate, up and down matrices (gpt-oss, Llama-4), and for a model that
    another method has quantized.
    """
    model.require_loadable()
    text = f"""\
from labutils.checkpoints import coverage, load
from labutils.recipes import Recipe

recipe = {_code(model.recipe)}
model = load({_literal(model.name)}, recipe)
print(coverage(model).table)
"""
    return Handout("this lab", "load_checked.py", text, LOADED)


def transformers(model: "Skeleton") -> Handout:
    """Code that loads the model with transformers alone and this lab's quantizer.

    Checked by running it on the stand-in.

    Raises ValueError for a recipe that can only be simulated or mixes floating-point formats, for
    experts that are no plain gate, up and down matrices (gpt-oss, Llama-4), and for a model that
    another method has quantized.
    """
    model.require_loadable()
    text = f"""\
import torch
from transformers import AutoModelForCausalLM

from labutils.experts import RecipeConfig
from labutils.recipes import Recipe

recipe = {_code(model.recipe)}
model = AutoModelForCausalLM.from_pretrained(
    {_literal(model.name)},
    quantization_config=RecipeConfig(recipe),
    dtype={_dtype(model.recipe)},
    device_map="auto",
)
"""
    return Handout("transformers, this lab's quantizer", "load_plain.py", text, LOADED)


def bitsandbytes(model: "Skeleton") -> Handout:
    """Code for `BitsAndBytesConfig` as transformers 5 has it, with the warning of what it skips.

    It replaces modules that are exactly `nn.Linear`. The fused experts of transformers 5 are none,
    nor are routers and embeddings: what the recipe quantizes there stays in 16 bits, and is counted
    in the warning. Checked by running it on the stand-in: the warning's numbers are those of
    `checkpoints.coverage`.

    Raises ValueError unless the recipe quantizes in one format, which is nf4, fp4 or int8, and
    bitsandbytes would quantize anything at all.
    """
    recipe = model.recipe
    wanted = model.quantized
    formats = {model.formats[module] for module in wanted}
    if len(formats) != 1 or not formats <= {"nf4", "fp4", "int8"}:
        raise ValueError(
            f"Stock bitsandbytes has one format for the whole model, nf4, fp4 or int8; the recipe "
            f"has {_listed(sorted(formats)) or 'none that is quantized'}."
        )
    (format,) = formats
    reached = [module for module in wanted if module.name in model.linears]
    if not reached:
        raise ValueError(
            "All that the recipe quantizes is skipped by stock bitsandbytes, which replaces "
            f"nn.Linear modules only: {_listed(_components(wanted))}."
        )
    kept = sorted(set(model.linears) - {module.name for module in reached})
    choices = {"llm_int8_skip_modules": patterns(kept, model.linears)}
    if format == "int8":
        choices = {"load_in_8bit": True} | choices
    else:
        choices = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": format,
            "bnb_4bit_use_double_quant": recipe.double_quant,
        } | choices
    lines = "".join(f"    {name}={_literal(value)},\n" for name, value in choices.items())
    compute = f"    bnb_4bit_compute_dtype={_dtype(recipe)},\n" if format != "int8" else ""
    text = f"""\
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

settings = BitsAndBytesConfig(
{lines}{compute})
model = AutoModelForCausalLM.from_pretrained(
    {_literal(model.name)},
    quantization_config=settings,
    dtype={_dtype(recipe)},
    device_map="auto",
)
"""
    warnings = [*_skipped(model, reached), *_plain_rounding(recipe, "bitsandbytes")]
    if format != "int8" and recipe.block_size != 64:
        warnings.append(
            f"BitsAndBytesConfig has no block size: blocks of 64, not of {recipe.block_size}."
        )
    return Handout(
        "transformers, stock bitsandbytes", "load_bitsandbytes.py", text, LOADED, tuple(warnings)
    )


def _skipped(model: "Skeleton", reached: Sequence["_Module"]) -> list[str]:
    """What the recipe quantizes and bitsandbytes will leave in 16 bits, in a sentence."""
    names = {module.name for module in reached}
    skipped = [module for module in model.quantized if module.name not in names]
    if not skipped:
        return []
    parameters = sum(module.parameters for module in skipped)
    kept_bytes = parameters * FORMATS[model.recipe.float_format].weight_bits // 8
    asked_bytes = sum(weight_bytes(module, model.recipe) for module in skipped)
    return [
        f"Stock bitsandbytes skips the {_listed(_components(skipped))}, without a word: "
        f"{parameters:,} parameters, {parameters / model.parameters:.2%} of the model, stay in "
        f"{model.recipe.float_format} and take {sized(kept_bytes)} instead of {sized(asked_bytes)}."
    ]


# ------------------------------------------------------------------------- calibrating engines


def llm_compressor(model: "Skeleton") -> Handout:
    """A YAML recipe for llm-compressor: one group for each format, its modules by regular name.

    The patterns fit the names that transformers 5 gives to experts taken apart, as llm-compressor's
    `load_context` does (`mlp.experts.3.gate_proj`), and the published ones of Mixtral
    (`block_sparse_moe.experts.3.w1`). The recipe's method becomes QuantizationModifier (rtn),
    GPTQModifier, or AWQModifier before a QuantizationModifier. NF-k and FP4 become integers of as
    many bits; routers and embeddings, which are no `nn.Linear`, stay in 16 bits. Checked with
    compressed-tensors: its `QuantizationScheme` takes every group, its `match_name` finds every
    module in the right one.

    Raises ValueError if nothing is left to quantize, or blocks do not divide a row.
    """
    chosen, warnings = _in_reach(model, NEAREST_INTEGER, "compressed-tensors")
    _check_rows(chosen, model.recipe)
    groups = {
        f"group_{number}": {
            "targets": [f"re:{pattern}" for pattern in patterns(_of(chosen, format), model.apart)],
            "weights": _scheme(format, model.recipe),
        }
        for number, format in enumerate(dict.fromkeys(chosen.values()))
    }
    quantized = {module.name for module in chosen}
    kept = [name for name in model.apart if name not in quantized]
    settings = {
        "config_groups": groups,
        "ignore": [f"re:{pattern}" for pattern in patterns(kept, model.apart)],
    }
    modifiers = {
        "rtn": {"QuantizationModifier": settings},
        "gptq": {"GPTQModifier": settings},
        "awq": {"AWQModifier": {}, "QuantizationModifier": settings},
    }[model.recipe.method]
    body = yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False)
    data = "" if model.recipe.method == "rtn" else ", dataset=CALIBRATION_TEXTS"
    text = f"""\
# A recipe for llm-compressor. To run it:
#   from llmcompressor import oneshot
#   from llmcompressor.utils import load_context
#   from transformers import AutoModelForCausalLM
#   with load_context():
#       model = AutoModelForCausalLM.from_pretrained({json.dumps(model.name)}, dtype="auto")
#   oneshot(model=model, recipe="recipe.yaml"{data})
#   model.save_pretrained("quantized", save_compressed=True)
{body}"""
    if data:
        warnings.append(
            "The recipe names no calibration text: put yours in place of CALIBRATION_TEXTS."
        )
    return Handout("llm-compressor", "recipe.yaml", text, PARSED, tuple(warnings))


def _scheme(format: str, recipe: Recipe) -> dict:
    """How one format is stored, in the fields of compressed-tensors' `QuantizationArgs`."""
    if format in ("mxfp4", "nvfp4"):
        mx = format == "mxfp4"
        return {
            "num_bits": 4,
            "type": "float",
            "strategy": "group" if mx else "tensor_group",
            "group_size": 32 if mx else 16,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8" if mx else "torch.float8_e4m3fn",
            "zp_dtype": "torch.uint8" if mx else "torch.float8_e4m3fn",
        }
    by_row = FORMATS[format].scaled == "row"
    return {
        "num_bits": FORMATS[format].weight_bits,
        "type": "int" if format in INTEGERS else "float",
        "strategy": "channel" if by_row else "group",
        **({} if by_row else {"group_size": recipe.block_size}),
        "symmetric": True,
        "dynamic": False,
    }


def gptqmodel(model: "Skeleton") -> Handout:
    """Code that quantizes the model with GPTQModel, exceptions as `dynamic` patterns.

    The format of most parameters is the base; `+:` patterns give others their bits and groups, `-:`
    patterns leave modules alone. All formats become integers of as many bits, int8 a scale a row.
    Only printed: the names of the fields were read in its source, the patterns tried with `re`.

    Raises ValueError for AWQ, which this handout has no form for; for block sizes that GPTQModel
    has not; if nothing is left to quantize, or blocks do not divide a row.
    """
    recipe = model.recipe
    if recipe.method == "awq":
        raise ValueError("GPTQModel's AWQ has 4 bits alone; take llm-compressor for this recipe.")
    chosen, warnings = _in_reach(model, GPTQMODEL_FORMATS, "GPTQModel")
    _check_rows(chosen, recipe)
    in_blocks = any(FORMATS[format].scaled == "block" for format in chosen.values())
    if in_blocks and recipe.block_size not in GPTQMODEL_BLOCKS:
        raise ValueError(
            f"GPTQModel has groups of {_listed(map(str, GPTQMODEL_BLOCKS))}, not of "
            f"{recipe.block_size}."
        )
    counted = Counter()
    for module, format in chosen.items():
        counted[format] += module.parameters
    base = counted.most_common(1)[0][0]
    head = [module for module in chosen if module.part.component == "lm_head"]
    dynamic = {
        f"+:{pattern}": _bits(format, recipe)
        for format in counted
        if format != base
        for pattern in patterns(_of(chosen, format), model.apart)
    }
    quantized = {module.name for module in chosen}
    kept = [name for name in model.apart if name not in quantized and name != "lm_head"]
    dynamic |= {f"-:{pattern}": {} for pattern in patterns(kept, model.apart)}
    choices = _bits(base, recipe) | {"sym": True, "desc_act": False, "lm_head": bool(head)}
    lines = "".join(f"    {name}={_literal(value)},\n" for name, value in choices.items())
    entries = "".join(
        f"        {_literal(key)}: {_literal(value)},\n" for key, value in dynamic.items()
    )
    text = f"""\
import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig

settings = QuantizeConfig(
{lines}    dynamic={{
{entries}    }},
)
calibration = Path(sys.argv[1]).read_text().split("\\n\\n")  # a file of paragraphs
model = GPTQModel.load({_literal(model.name)}, settings)
model.quantize(calibration, batch_size=1)
model.save("quantized-gptq")
"""
    if recipe.method == "rtn":
        warnings.append(
            "GPTQModel rounds by what calibration texts show; the recipe rounds plainly."
        )
    return Handout("GPTQModel", "quantize_gptqmodel.py", text, PRINTED, tuple(warnings))


def _bits(format: str, recipe: Recipe) -> dict[str, int]:
    by_row = FORMATS[format].scaled == "row"
    return {
        "bits": FORMATS[format].weight_bits,
        "group_size": -1 if by_row else recipe.block_size,
    }


# --------------------------------------------------------------------------------------- vLLM


def vllm(model: "Skeleton", gpus: int = 1, nodes: int = 1) -> Handout:
    """A shell script: the recipe exported to compressed-tensors, then served by vLLM.

    On `nodes` machines of `gpus` GPUs each: tensor parallel inside a machine, with whole experts on
    each GPU (`--enable-expert-parallel`), pipeline parallel from machine to machine, started on
    each of them with its rank and the first one's address. A calibrated recipe (GPTQ, AWQ) is
    served from the folder that llm-compressor writes. Only printed: the flags were read in vLLM's
    documentation; the export in it is run by the tests.

    vLLM has one kernel for all experts of a layer. Raises ValueError where theirs differ, for
    experts in anything but int4, int8 or mxfp4 (NF-k and FP4 become integers), and for numbers of
    GPUs or machines that do not divide attention heads or layers.
    """
    _check_parallel(model.config, gpus, nodes)
    chosen, warnings = _in_reach(model, NEAREST_INTEGER, "compressed-tensors")
    _check_rows(chosen, model.recipe)
    _check_kernels(chosen, model)
    serve = [*("vllm", "serve", "./quantized")]
    if gpus > 1:
        serve += ["--tensor-parallel-size", str(gpus), "--enable-expert-parallel"]
    lines = [shlex.join(serve)]
    if nodes > 1:
        lines = _on_machines(serve, nodes)
    if model.recipe.method == "rtn":
        model.require_plain_experts()
        lines = [f"[ -e ./quantized ] || {_export_command(model, chosen)}", *lines]
    else:
        warnings.append(
            f"This lab exports what is rounded plainly; put the folder that llm-compressor writes "
            f"with {model.recipe.method} at ./quantized."
        )
    usage = "# Run it on each machine, with its number from 0 and the first machine's address.\n"
    text = "#!/bin/sh\nset -e\n" + (usage if nodes > 1 else "") + "\n".join(lines) + "\n"
    return Handout("vLLM", f"serve_{nodes}x{gpus}.sh", text, PRINTED, tuple(warnings))


def _on_machines(serve: list[str], nodes: int) -> list[str]:
    each = [*serve, "--pipeline-parallel-size", str(nodes), "--nnodes", str(nodes)]
    command = f'{shlex.join(each)} --node-rank "$rank" --master-addr "$address"'
    return [
        'rank="${1:?number of this machine, from 0}"',
        'address="${2:?address of the first machine}"',
        f'if [ "$rank" = 0 ]; then {command}; else {command} --headless; fi',
    ]


def _export_command(model: "Skeleton", chosen: dict["_Module", str]) -> str:
    """A command that writes the export, in the formats that stand in for the recipe's own."""
    code = (
        "from labutils.export import to_compressed_tensors; from labutils.recipes import Recipe; "
        f"to_compressed_tensors({_literal(model.name)}, {_code(_exportable(model, chosen))}, "
        '"quantized")'
    )
    return shlex.join(["python", "-c", code])


def _exportable(model: "Skeleton", chosen: dict["_Module", str]) -> Recipe:
    """The recipe in the formats that stand in for its own, and in 16 bits what has no form."""
    recipe = model.recipe
    components = {name: _integer(getattr(recipe, name)) for name in recipe.components}
    kept = {
        part.component if part.layer is None else f"layers.*.{part.component}": recipe.float_format
        for part in (module.part for module in model.quantized if module not in chosen)
    }
    overrides = {path: _integer(f) for path, f in recipe.overrides.items() if path not in kept}
    return replace(recipe, **components, double_quant=False, overrides=overrides | kept)


def _integer(format: str) -> str:
    return NEAREST_INTEGER.get(format, format)


def _check_parallel(config, gpus: int, nodes: int) -> None:
    config = config.get_text_config()
    if gpus < 1 or nodes < 1:
        raise ValueError(f"gpus={gpus}, nodes={nodes}: at least 1 of each is needed.")
    if config.num_attention_heads % gpus:
        raise ValueError(
            f"{gpus} GPUs do not divide the model's {config.num_attention_heads} attention heads."
        )
    if nodes > config.num_hidden_layers:
        raise ValueError(f"{nodes} machines for {config.num_hidden_layers} layers are too many.")


def _check_kernels(chosen: dict["_Module", str], model: "Skeleton") -> None:
    """ValueError for what vLLM keeps in one matrix and the recipe in two formats, or has no kernel.

    It keeps all experts of a layer in one, and q, k and v, and gate and up.
    """
    together = defaultdict(set)
    for module in model.modules:
        part = module.part
        apart = part.component != "experts" and part.projection in ("o_proj", "down_proj")
        if part.layer is not None and part.component != "router" and not apart:
            format = chosen.get(module, model.recipe.float_format)
            together[part.component, part.layer].add(format)
    for (component, layer), formats in together.items():
        if len(formats) > 1:
            what = "all experts" if component == "experts" else f"the {component}"
            raise ValueError(
                f"vLLM has one format for {what} of a layer; in layer {layer} the recipe has "
                f"{_listed(sorted(formats))}."
            )
    for module, format in chosen.items():
        if format not in ("int4", "int8", "mxfp4"):
            raise ValueError(
                f"vLLM is served int4, int8 and mxfp4 from here, not {format} ({module.name})."
            )
        if format == "int4" and model.recipe.block_size not in MARLIN_BLOCKS:
            raise ValueError(
                f"vLLM's kernel for int4 has blocks of {_listed(map(str, MARLIN_BLOCKS))}, not of "
                f"{model.recipe.block_size}."
            )


# ----------------------------------------------------------------------------------- llama.cpp


def llama_cpp(model: "Skeleton") -> Handout:
    """A shell script: convert_hf_to_gguf.py, then llama-quantize with a type for every tensor.

    Every format becomes the nearest ggml type (`GGML_TYPES`), in blocks of 32 or 256, each with a
    scale of its own. llama.cpp stacks the experts of a layer in one tensor, and keeps routers in 32
    bits. Weights are rounded plainly unless an importance matrix is given (`--imatrix`). Checked
    with the library gguf: its types, their blocks, and its names for the tensors.

    Raises ValueError where experts of a layer differ; for nvfp4, which llama-quantize does not
    write; for names that are unknown here; if nothing is quantized.
    """
    tensors = _ggml_tensors(model)
    counted = Counter()
    for module in model.quantized:
        if module.part.component != "router":
            counted[model.formats[module]] += module.parameters
    if not counted:
        raise ValueError("The recipe quantizes nothing that llama.cpp would quantize.")
    quantize = ["llama-quantize"]
    for option, name in (
        ("--token-embedding-type", "token_embd"),
        ("--output-tensor-type", "output"),
    ):
        if format := tensors.pop(name, None):
            quantize += [option, GGML_TYPES[format].name]
    for pattern, format in _ggml_patterns(tensors):
        quantize += ["--tensor-type", f"{pattern}={GGML_TYPES[format].name}"]
    base = GGML_TYPES[counted.most_common(1)[0][0]].name
    quantize += ["model.gguf", "model-quantized.gguf", GGML_FTYPES.get(base, base.upper())]
    here = Path(model.name).is_dir()
    source = model.name if here else "source"
    download = [] if here else [["hf", "download", model.name, "--local-dir", source]]
    convert = ["python", "convert_hf_to_gguf.py", source, "--outfile", "model.gguf"]
    convert += ["--outtype", GGML_TYPES[model.recipe.float_format].name]
    commands = map(shlex.join, [*download, convert, quantize])
    text = "\n".join(["#!/bin/sh", "set -e", *commands, ""])
    warnings = _ggml_warnings(model)
    return Handout("llama.cpp", "quantize_llama_cpp.sh", text, PARSED, warnings)


def _ggml_tensors(model: "Skeleton") -> dict[str, str]:
    """The format of each tensor as llama.cpp names it, without the routers."""
    tensors = defaultdict(set)
    for module in model.modules:
        if module.part.component != "router":
            tensors[_ggml_name(module)].add(model.formats[module])
    for name, formats in tensors.items():
        if len(formats) > 1:
            raise ValueError(
                f"llama.cpp stacks the experts of a layer in one tensor, so they share a format; "
                f"{name} would hold {_listed(sorted(formats))}. Overrides can be by layer and "
                "projection, not by expert."
            )
    found = {name: formats.pop() for name, formats in tensors.items()}
    if unknown := sorted(set(found.values()) - set(GGML_TYPES)):
        raise ValueError(f"llama-quantize writes nothing like {_listed(unknown)}; take mxfp4.")
    return found


def _ggml_name(module: "_Module") -> str:
    part, leaf = module.part, module.name.rpartition(".")[2]
    if part.component in ("embeddings", "lm_head"):
        return {"embeddings": "token_embd", "lm_head": "output"}[part.component]
    if leaf not in GGML_NAMES or part.layer is None:
        raise ValueError(f"The name that llama.cpp has for {module.name} is not known here.")
    return f"blk.{part.layer}.{GGML_NAMES[leaf]}{GGML_ENDINGS.get(part.component, '')}"


def _ggml_patterns(tensors: dict[str, str]) -> list[tuple[str, str]]:
    """Regular expressions for tensors' names, each with a format; layers gathered.

    DeepSeek's attn_kv_b is also cut in two there, attn_k_b and attn_v_b.
    """
    names = defaultdict(list)
    for name, format in tensors.items():
        names[format].append(f"{name}.weight")
    everything = [name for alike in names.values() for name in alike]
    return [
        (pattern.replace("attn_kv_b", "attn_(kv|k|v)_b"), format)
        for format in names
        for pattern in patterns(names[format], everything)
    ]


def _ggml_warnings(model: "Skeleton") -> tuple[str, ...]:
    routers = [module for module in model.quantized if module.part.component == "router"]
    wanted = {m: model.formats[m] for m in model.quantized if m.part.component != "router"}
    types = {format: GGML_TYPES[format] for format in sorted(set(wanted.values()))}
    warnings = [
        f"{format} becomes {type.name}, blocks of {type.block} with a scale each: other levels and "
        "other bytes."
        for format, type in types.items()
        if format not in EXACT_IN_GGML
    ]
    if routers:
        warnings.append("llama.cpp never quantizes routers: they stay in 32 bits.")
    uneven = [module for module, f in wanted.items() if module.shape[1] % types[f].block]
    if uneven:
        warnings.append(
            f"Rows of {uneven[0].shape[1]} weights are no whole blocks, in {uneven[0].name} and "
            f"{len(uneven) - 1} more: llama-quantize takes another type there."
        )
    nested = _nested(model.recipe, wanted.values())
    return (*warnings, *nested, *_plain_rounding(model.recipe, "llama-quantize"))


# ----------------------------------------------------------------------- what all of them need


@dataclass(frozen=True)
class _Module(Weight):
    """A matrix by the name that transformers 5 gives its module, experts taken apart."""

    name: str


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its weights: the matrices that a recipe speaks of.

    `linears` are the names of its `nn.Linear`s, an output head that is tied to the embeddings
    included; `parameters` counts all, norms too. Experts are `odd_experts` if they have biases or
    are transposed: the lab cannot take such apart.
    """

    name: str
    config: object
    recipe: Recipe
    modules: tuple[_Module, ...]
    linears: tuple[str, ...]
    parameters: int
    odd_experts: bool

    @classmethod
    def of(cls, name: str, config_or_path, recipe: Recipe) -> "Skeleton":
        if not name or name.startswith("-"):
            raise ValueError(f"{name!r} is no model: a hub name or a folder is needed.")
        if isinstance(config_or_path, str):
            config_or_path = PUBLISHED.get(config_or_path, config_or_path)
        config = read_config(config_or_path)
        model = skeleton(config)
        parts = [weight.part for weight in weights_in(model)]
        if not any(part.component == "experts" for part in parts):
            raise ValueError(f"A {type(config).__name__} model has no experts to choose from.")
        check_overrides(recipe, parts)
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        odd = any(
            is_transposed(name, shapes) or "experts.down_proj_bias" in name for name in shapes
        )
        return cls(name, config, recipe, tuple(_modules(shapes)), tuple(linears), parameters, odd)

    def require_loadable(self) -> None:
        """ValueError if `checkpoints.load` would refuse the recipe, or a model of this config."""
        self.recipe.require_storable()
        self.require_plain_experts()
        self.recipe.float_format  # noqa: B018
        stored = getattr(self.config, "quantization_config", None) or {}
        method = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
        if method not in (None, *LOADABLE):
            raise ValueError(
                f"The checkpoint is quantized with {method}, which this lab does not read; take "
                "the 16-bit checkpoint."
            )

    def require_plain_experts(self) -> None:
        """ValueError if experts are to be quantized that this lab can neither store nor export."""
        if self.odd_experts and "experts" in _components(self.quantized):
            raise ValueError(
                "This model's experts have biases or a transposed layout; this lab stores and "
                "exports plain gate, up and down matrices. Take llm-compressor."
            )

    @cached_property
    def formats(self) -> dict[_Module, str]:
        return {module: self.recipe.format_of(module.part) for module in self.modules}

    @cached_property
    def quantized(self) -> tuple[_Module, ...]:
        """What the recipe stores in fewer than 16 bits."""
        return tuple(module for module in self.modules if FORMATS[self.formats[module]].scaled)

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """Every name that can be a target where experts are taken apart."""
        experts = [module.name for module in self.modules if module.part.component == "experts"]
        return tuple(dict.fromkeys([*self.linears, *experts]))


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Module]:
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        for weight in matrices(name, shape, is_transposed(name, shapes)):
            part = weight.part
            if len(weight.shape) == 2 and part.component in Recipe().components:
                inner = f".{part.expert}.{part.projection}" if len(shape) == 3 else ""
                yield _Module(part, weight.shape, module + inner)


def _in_reach(
    model: Skeleton, stand_ins: dict[str, str], engine: str
) -> tuple[dict[_Module, str], list[str]]:
    """The matrices that an engine quantizes and their formats there, and warnings of the rest.

    Raises ValueError if there are none.
    """
    targets = set(model.apart)
    wanted = {module: model.formats[module] for module in model.quantized}
    chosen = {m: stand_ins.get(f, f) for m, f in wanted.items() if m.name in targets}
    if not chosen:
        raise ValueError("The recipe quantizes nothing that this engine would quantize.")
    replaced = {wanted[module]: format for module, format in chosen.items()}
    warnings = [
        f"{engine} has no {format}: {stand_in} stands in for it, with other levels."
        for format, stand_in in replaced.items()
        if format != stand_in
    ]
    if left := [module for module in wanted if module not in chosen]:
        warnings.append(
            f"Left in {model.recipe.float_format}: {_listed(_components(left))}. This engine "
            "quantizes linear layers and experts alone."
        )
    return chosen, [*warnings, *_nested(model.recipe, wanted.values())]


def _check_rows(chosen: dict[_Module, str], recipe: Recipe) -> None:
    """ValueError for a matrix whose rows are no whole blocks."""
    for module, format in chosen.items():
        block = _scheme(format, recipe).get("group_size", 1)
        if module.shape[1] % block:
            raise ValueError(
                f"{module.name} has rows of {module.shape[1]:,} weights, which blocks of {block} "
                "do not divide; take a smaller block size."
            )


def _nested(recipe: Recipe, formats: Iterable[str]) -> list[str]:
    if not recipe.double_quant or not any(FORMATS[format].scaled == "block" for format in formats):
        return []
    return ["There is no double quantization there: each block keeps a scale of 16 or 32 bits."]


def _plain_rounding(recipe: Recipe, engine: str) -> list[str]:
    if recipe.method == "rtn":
        return []
    return [f"{engine} rounds to the nearest level; the recipe asks for {recipe.method}."]


def _of(chosen: dict[_Module, str], format: str) -> list[str]:
    return [module.name for module, its in chosen.items() if its == format]


def _components(modules: Iterable[_Module]) -> list[str]:
    return list(dict.fromkeys(module.part.component for module in modules))


def _code(recipe: Recipe) -> str:
    """The recipe as an expression, without what is default."""
    default = Recipe().to_dict()
    chosen = {name: value for name, value in recipe.to_dict().items() if value != default[name]}
    return f"Recipe({', '.join(f'{name}={_literal(value)}' for name, value in chosen.items())})"


def _literal(value: str | bool | int | dict | list) -> str:
    """A value as it stands in Python code, in double quotes, whatever is in it."""
    if isinstance(value, str | dict | list):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _dtype(recipe: Recipe) -> str:
    return str(FORMATS[recipe.float_format].dtype)


def _listed(names: Iterable[str]) -> str:
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
