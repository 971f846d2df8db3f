"""A recipe written out as a real checkpoint that other engines read: compressed-tensors.

`recipes.simulated` tries a recipe in memory, and `checkpoints.load` stores four formats of its own.
`to_compressed_tensors` writes what the compressed-tensors library (0.20.0) can hold, from files to
files, one matrix at a time:

    folder = to_compressed_tensors(standin.PATH, Recipe("int4", double_quant=False), "small")
    model = load_back(folder)

| format | its form there | what each weight matrix becomes |
|---|---|---|
| int2 to int7, in blocks | `pack-quantized`, strategy group | codes in int32, float32 scales |
| int8, a scale per row | `pack-quantized`, strategy channel | codes in int32, float32 scales |
| fp8_e4m3, in blocks | `naive-quantized`, strategy group | codes in float8, float32 scales |
| mxfp4 | `mxfp4-pack-quantized` | two codes to a byte, exponents in uint8 |

What that library decompresses equals what `quantize(...).dequantize()` gives, to the last bit. For
that, scales are written in float32; llm-compressor writes them in the weights' own 16 bits. What
would come back otherwise is refused. The codebooks of NF-k and FP4 and double-quantized maxima have
no form there, and NVFP4's scale for the whole matrix is stored as its inverse, which rounds
differently: in the stand-in 5,547 of 4.9 million weights come back as their neighbour in bf16.

**transformers** (5.23.0, tried) reads such a folder by itself, `from_pretrained(folder,
quantization_config=CompressedTensorsConfig(dequantize=True))`, if all experts share one format,
fp8_e4m3 excepted, and everything else that is quantized shares one. Mixed experts it decompresses
by the form that it finds first, and fails. In float32 its weights are the simulated ones; in a bf16
model it leaves the experts in float32, and without `dequantize=True` it rounds the other scales to
bf16, which moves weights by 0.2%. `load_back` reads every folder that is written here, exactly.

**vLLM** (not tried; read in its source of 2026) keeps the weights packed, and asks for more:

- one format for all experts of a layer: it looks at the three matrices of expert 0, refuses if they
  differ, and takes the other experts for the same; q, k and v of a layer must share one too;
- experts in int4, int8 or mxfp4, and routers in 16 bits. Its Marlin kernels want int4 in blocks of
  32, 64 or 128; for fp8_e4m3 in blocks along a row it has none;
- it looks for experts by the names gate_proj, up_proj and down_proj also where the files say w1, w3
  and w2: the targets written here fit both;
- it casts scales to the 16 bits that it computes in: bf16 moves a scale by up to 1/512.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.utils.match import match_name
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .anatomy import matrices, part_of
from .budget import predict
from .checkpoints import (
    Checkpoint,
    check_disk,
    from_tensors,
    inspect,
    locate,
    weight_files,
    written_whole,
)
from .experts import QUANTIZE_CHUNK
from .formats import FORMATS, Quantized, quantize
from .recipes import Recipe
from .targets import patterns

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
EXACT = (*INTEGERS, "fp8_e4m3", "mxfp4")
INDEX = "model.safetensors.index.json"
NOT_READ_BACK = {
    "embeddings": "transformers fails on them, for they are looked up and not multiplied",
    "router": "transformers leaves them random, for they are no linear layers, and vLLM knows none",
}
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "LICENSE*",
)


def to_compressed_tensors(
    checkpoint_folder: Path | str, recipe: Recipe, folder: Path | str
) -> Path:
    """The folder with the checkpoint in it, quantized as `recipe` says, weights rounded plainly.

    `checkpoint_folder` (a folder, or a hub name) holds a checkpoint of 16 or 32 bits under its
    published names, an expert's matrices each by itself. Its shards are kept, config.json gains
    `quantization_config`, and what is not quantized is cast to the recipe's `float_format`. The
    tensors take the bytes that `budget.predict` says and 16 more for each matrix of integers; in
    memory there is never more than one written shard and one matrix.

    Raises, before anything is written, ValueError for a format that compressed-tensors cannot hold,
    a method other than "rtn", a checkpoint that is quantized already or an override that fits
    nothing, or a `folder` within that of the checkpoint; FileExistsError if there is something
    under `folder`; OSError if the disk is too small.
    After a later error, such as ValueError for a weight that is NaN, nothing is left behind.
    """
    _check_method(recipe)
    folder = Path(folder).expanduser().absolute()
    source = inspect(locate(checkpoint_folder))
    if source.folder.resolve() in folder.resolve().parents:
        raise ValueError(f"{folder} is inside {source.folder}, the checkpoint; take another place.")
    plan = _Plan.of(source, recipe)
    with written_whole(folder) as unfinished:
        check_disk(plan.predicted_bytes, folder, "take fewer bits or a folder on another one")
        unfinished.mkdir(parents=True)
        weight_map = _write_weights(plan, unfinished)
        _write_config(plan, unfinished)
        if (source.folder / INDEX).is_file():
            _write_index(weight_map, unfinished)
        for pattern in COMPANIONS:
            for file in source.folder.glob(pattern):
                shutil.copyfile(file, unfinished / file.name)
    return folder


# ------------------------------------------------------------------- what goes into which form


@dataclass(frozen=True)
class _Plan:
    """Which matrices of a checkpoint are stored in which format, and which stay as they are."""

    source: Checkpoint
    recipe: Recipe
    quantized: dict[str, str]
    kept: tuple[str, ...]
    predicted_bytes: int

    @classmethod
    def of(cls, source: Checkpoint, recipe: Recipe) -> "_Plan":
        """The plan, if the form can hold it; ValueError with what to use instead, if not."""
        if source.recipe.quantizes:
            raise ValueError(
                f"{source.folder} is quantized already, as {source.recipe}; take the 16-bit "
                "checkpoint."
            )
        budget = predict(source.config, recipe)
        quantized, kept = {}, []
        for name, tensor in source.tensors.items():
            weights = matrices(name, tensor.shape)
            formats = {recipe.format_of(weight.part) for weight in weights} - {None}
            scaled = [format for format in formats if FORMATS[format].scaled]
            if scaled and len(tensor.shape) == 3:
                raise ValueError(
                    f"{name} holds all experts of a layer in one tensor; the form is for "
                    "checkpoints that hold each matrix of an expert by itself."
                )
            if len(tensor.shape) == 2 and name.endswith(".weight"):
                if scaled:
                    quantized[name] = scaled[0]
                else:
                    kept.append(name)
        plan = cls(source, recipe, quantized, tuple(kept), budget.total_bytes)
        plan._check()
        return plan

    def _check(self) -> None:
        if not self.quantized:
            raise ValueError(
                f"The recipe ({self.recipe}) quantizes nothing of {self.source.folder}; name a "
                f"format of fewer bits: {', '.join(EXACT)}."
            )
        _check_formats(set(self.quantized.values()), self.recipe.double_quant)
        for name, format in self.quantized.items():
            if (component := part_of(name).component) in NOT_READ_BACK:
                raise ValueError(
                    f"{name} in {format} would not be read back ({NOT_READ_BACK[component]}); "
                    f"take {component}='bf16'."
                )
            size, columns = _group_size(format, self.recipe), self.source.tensors[name].shape[1]
            if size and columns % size:
                raise ValueError(
                    f"{name} has rows of {columns:,} weights, which blocks of {size} do not "
                    "divide; the form has no blocks that go on in the next row. Take a smaller "
                    "block size."
                )


def _check_method(recipe: Recipe) -> None:
    if recipe.method != "rtn":
        raise ValueError(
            f"Weights are rounded plainly here, and the recipe asks for {recipe.method}; take "
            "method='rtn', or let llm-compressor calibrate and write the checkpoint."
        )


def _check_formats(formats: set[str], double_quant: bool) -> None:
    if foreign := sorted(formats - set(EXACT)):
        raise ValueError(
            f"compressed-tensors has no form that gives back {' or '.join(foreign)} exactly; take "
            "int4 with double_quant=False, or mxfp4."
        )
    nested = sorted(format for format in formats if FORMATS[format].scaled == "block")
    if double_quant and nested:
        raise ValueError(
            "compressed-tensors has no form for double-quantized block maxima, which the recipe "
            f"asks for in {' and '.join(nested)}; take double_quant=False, or mxfp4."
        )


def _group_size(format: str, recipe: Recipe) -> int | None:
    """How many weights of a row share a scale; None for the whole row."""
    if FORMATS[format].scaled == "row":
        return None
    return 32 if format == "mxfp4" else recipe.block_size


# --------------------------------------------------------------------------------- the weights


def _write_weights(plan: _Plan, folder: Path) -> dict[str, str]:
    """Write every shard; the names of the tensors and the shard that each is in."""
    files = weight_files(plan.source.folder)
    total_bytes = sum(file.stat().st_size for file in files)
    weight_map = {}
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            tensors = {}
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    tensors |= _stored(name, tensor, plan)
                    bar.update(tensor.nbytes)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
    return weight_map


def _stored(name: str, tensor: torch.Tensor, plan: _Plan) -> dict[str, torch.Tensor]:
    """The tensors that stand for one of the source, by name."""
    format = plan.quantized.get(name)
    if format is None:
        floats = FORMATS[plan.recipe.float_format].dtype
        return {name: tensor.to(floats) if tensor.is_floating_point() else tensor}
    module = name.removesuffix(".weight")
    stored = _compressed(name, tensor, format, plan.recipe)
    return {f"{module}.{key}": value for key, value in stored.items()}


def _compressed(
    name: str, weight: torch.Tensor, format: str, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """A matrix as the library stores it, under the library's names.

    Quantized some rows at a time, so that what that takes stays in the cache and small beside the
    matrix; no scale is shared between rows.
    """
    block_size = "row" if FORMATS[format].scaled == "row" else recipe.block_size
    pieces = []
    for rows in weight.split(max(1, QUANTIZE_CHUNK // weight.shape[1])):
        try:
            pieces.append(_packed(quantize(rows, format, block_size)))
        except ValueError as error:
            raise ValueError(f"{name}, from row {sum(map(_rows, pieces))} on: {error}") from None
    stored = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    return stored | ({"weight_shape": torch.tensor(weight.shape)} if format in INTEGERS else {})


def _rows(piece: Mapping[str, torch.Tensor]) -> int:
    return len(piece["weight_scale"])


def _packed(quantized: Quantized) -> dict[str, torch.Tensor]:
    """Rows of a matrix as the library stores them: codes and scales."""
    rows, codes = quantized.shape[0], quantized.codes
    if quantized.format == "mxfp4":
        pairs = codes[:, 0::2] | codes[:, 1::2] << 4
        return {"weight_packed": pairs, "weight_scale": quantized.scales.exponents.view(rows, -1)}
    scales = quantized.scales.units.view(rows, -1)
    if quantized.format == "fp8_e4m3":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    whole_numbers = quantized.codebook.values[codes.int()].to(torch.int8)
    words = pack_to_int32(whole_numbers, quantized.codebook.bits)
    return {"weight_packed": words, "weight_scale": scales}


# ------------------------------------------------------------------------------ config and index


def _write_config(plan: _Plan, folder: Path) -> None:
    config = json.loads((plan.source.folder / "config.json").read_text())
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[dtype_key] = str(FORMATS[plan.recipe.float_format].dtype).removeprefix("torch.")
    config["quantization_config"] = _quantization_config(plan).model_dump(mode="json") | {
        "version": compressed_tensors.__version__
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_index(weight_map: Mapping[str, str], folder: Path) -> None:
    files = {folder / name for name in weight_map.values()}
    total_bytes = sum(file.stat().st_size for file in files)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _quantization_config(plan: _Plan) -> QuantizationConfig:
    """What config.json says of the quantization: a group for each format, its modules by name."""
    modules = defaultdict(list)
    for name, format in plan.quantized.items():
        modules[format].append(name.removesuffix(".weight"))
    quantized = [name for names in modules.values() for name in names]
    kept = [name.removesuffix(".weight") for name in plan.kept]
    ignored = kept if "lm_head" in quantized + kept else [*kept, "lm_head"]
    everything = quantized + ignored
    schemes = [
        _scheme(format, plan.recipe, _targets(names, everything))
        for format, names in modules.items()
    ]
    forms = {scheme.format for scheme in schemes}
    return QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=_targets(ignored, everything),
    )


def _scheme(format: str, recipe: Recipe, targets: list[str]) -> QuantizationScheme:
    shared = {"symmetric": True, "dynamic": False, "num_bits": FORMATS[format].weight_bits}
    if (size := _group_size(format, recipe)) is None:
        shared |= {"strategy": "channel"}
    else:
        shared |= {"strategy": "group", "group_size": size}
    if format in INTEGERS:
        form, weights = "pack-quantized", QuantizationArgs(type="int", **shared)
    elif format == "fp8_e4m3":
        form, weights = "naive-quantized", QuantizationArgs(type="float", **shared)
    else:
        weights = QuantizationArgs(type="float", scale_dtype=torch.uint8, **shared)
        form = "mxfp4-pack-quantized"
    return QuantizationScheme(targets=targets, weights=weights, format=form)


def _targets(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    return [f"re:{pattern}" for pattern in patterns(names, everything)]


# ------------------------------------------------------------------------------------- and back


def load_back(folder: Path | str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The transformers model in `folder`, its weights decompressed, in `dtype` (the config's).

    compressed-tensors' own code decompresses each weight when transformers asks for it, by the form
    that config.json names for it, so that mixed formats come back too, and memory holds no more
    than the decompressed model. Raises FileNotFoundError for a folder that does not exist or holds
    no checkpoint, and ValueError for one that is stored in another way.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = (
            f"{folder} holds no config.json" if folder.is_dir() else f"There is no folder {folder}"
        )
        raise FileNotFoundError(f"{what}; give one that `to_compressed_tensors` wrote.")
    stated = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if stated.get("quant_method") != "compressed-tensors":
        raise ValueError(f"{folder} is not in compressed-tensors; `checkpoints.load` may read it.")
    groups = QuantizationConfig.model_validate(stated).config_groups.values()
    tensors = {}
    for file in weight_files(folder):
        opened = safe_open(file, "pt")
        modules = dict.fromkeys(name.rpartition(".")[0] for name in opened.keys())  # noqa: SIM118
        schemes = {module: _scheme_of(module, groups) for module in modules}
        for name in opened.keys():  # noqa: SIM118
            module = name.rpartition(".")[0]
            if (scheme := schemes[module]) is None:
                tensors[name] = opened.get_slice(name)
            else:
                tensors[f"{module}.weight"] = _Compressed(opened, module, scheme)
    return from_tensors(folder, tensors, dtype)


def _scheme_of(module: str, schemes: Iterable[QuantizationScheme]) -> QuantizationScheme | None:
    fitting = (s for s in schemes if any(match_name(module, target) for target in s.targets))
    return next(fitting, None)


@dataclass(frozen=True, eq=False)
class _Compressed:
    """A weight in a file that is decompressed when it is asked for: `compressed[...]`."""

    opened: object
    module: str
    scheme: QuantizationScheme

    def __getitem__(self, _all) -> torch.Tensor:
        compressor = BaseCompressor.get_value_from_registry(self.scheme.format)
        names = compressor.compression_param_names(self.scheme)
        stored = {name: self.opened.get_tensor(f"{self.module}.{name}") for name in names}
        return compressor.decompress(stored, self.scheme)["weight"]
