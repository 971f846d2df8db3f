"""Load a Mixture-of-Experts checkpoint really quantized, and prove that it is.

`load` does what `from_pretrained` does, with four promises around it. Before a weight is read, the
files are looked over (all there, whole, as many experts as the config says) and the predicted
memory is compared with what is free. Afterwards `coverage` counts what every part of the model is
really stored in, and the model is handed over only if that is what was asked for.

    model = load("mistralai/Mixtral-8x7B-v0.1", Recipe(attention="nf4"))
    coverage(model).table
"""

import json
import math
import mmap
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TextStreamer,
)
from transformers.utils import logging as hf_logging

from .anatomy import COMPONENTS, Part, Weight, is_transposed, matrices, part_of
from .budget import Budget, budget_of, predict, skeleton, weights_of
from .experts import (
    DTYPES,
    RecipeConfig,
    UnusableWeight,
    count_used,
    first_device,
    storage_of,
)
from .formats import FORMATS
from .meter import GIB, available_bytes, mark, sized
from .readahead import ReadAhead
from .recipes import Recipe

HUB_TIMEOUT_SECONDS = 5
WANTED_FILES = ("*.json", "*.safetensors", "tokenizer*")
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
FLOAT_FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
DTYPE_FORMATS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a checkpoint in it: the config, and the tensors by name, none of them read."""

    folder: Path
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]

    @cached_property
    def weights(self) -> list[Weight]:
        """Every weight that the config describes."""
        return weights_of(self.config)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the checkpoint is stored in, read off the names and types of its tensors.

        For each component the most frequent format; weights stored otherwise become overrides.
        """
        stored = [(part_of(name), format) for name, format in self._formats()]
        usual = {}
        for component in {part.component for part, _ in stored} & set(Recipe().components):
            counts = Counter(format for part, format in stored if part.component == component)
            usual[component] = counts.most_common(1)[0][0]
        plain = self.float_format
        kept = {component: plain for component in Recipe().components} | usual
        exceptions = {
            part.path: format
            for part, format in stored
            if part.component in usual and format != usual[part.component]
        }
        return Recipe(**kept, overrides=exceptions, **self._constants())

    @property
    def float_format(self) -> str:
        """The format of most of what is not quantized."""
        floats = Counter(
            FLOAT_FORMATS[tensor.dtype]
            for name, tensor in self.tensors.items()
            if name.endswith(".weight") and tensor.dtype in FLOAT_FORMATS
        )
        return floats.most_common(1)[0][0]

    def _formats(self) -> Iterator[tuple[str, str]]:
        for name, tensor in self.tensors.items():
            if (name.removesuffix("weight") + "SCB") in self.tensors:
                yield name, "int8"
            elif blob := self._quant_state(name):
                yield name, blob.rpartition("__")[2]
            elif len(tensor.shape) >= 2 and tensor.dtype in FLOAT_FORMATS:
                yield name, self.float_format

    def _quant_state(self, name: str) -> str | None:
        blobs = (f"{name}.quant_state.bitsandbytes__{format}" for format in ("nf4", "fp4"))
        return next((blob for blob in blobs if blob in self.tensors), None)

    def _constants(self) -> dict:
        for name, codes in self.tensors.items():
            if self._quant_state(name):
                maxima = self.tensors[f"{name}.absmax"]
                weights = 2 * codes.shape[0] * codes.shape[1]
                return {
                    "block_size": weights // maxima.shape[0],
                    "double_quant": f"{name}.nested_absmax" in self.tensors,
                }
        return {}


def inspect(folder: Path | str) -> Checkpoint:
    """Look over the checkpoint in `folder`, headers only: seconds, whatever its size.

    Raises FileNotFoundError for a missing folder, config or shard, and ValueError for a truncated
    or foreign file, for a checkpoint that some other method has quantized, and for one whose
    weights are not those that its config describes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: it is no checkpoint, or its saving was interrupted."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_method(config)
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_header(file)
    checkpoint = Checkpoint(folder, config, tensors)
    _check_weights(checkpoint)
    return checkpoint


def _check_method(config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method", "bitsandbytes")
    if method not in ("bitsandbytes", "labutils"):
        raise ValueError(
            f"The checkpoint is quantized with {method}, which this loader does not read; take the "
            "16-bit checkpoint, or a bitsandbytes one."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`.

    Raises FileNotFoundError for a missing one, ValueError for a damaged index.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        names = _shard_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} shards are missing in {folder}, {missing[0]} for "
                "one; download the checkpoint again, finished files are kept."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json; only "
        "safetensors are read, and an interrupted save leaves neither."
    )


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is damaged; download it again.") from None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone.

    The file begins with the header's length in eight bytes, then the header in JSON, then the data.
    Raises ValueError if the file is no safetensors file, or shorter than its header says.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            entries = json.loads(stream.read(length) if length <= size_bytes else "")
            entries.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(
                f"{file} ({size_bytes:,} bytes) does not begin like a safetensors file; "
                "download it again."
            ) from None
    needed_bytes = 8 + length + max(ends, default=0)
    if size_bytes != needed_bytes:
        raise ValueError(
            f"{file} has {size_bytes:,} bytes where its header describes {needed_bytes:,}; "
            "download it again."
        )
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()
    }


def _check_weights(checkpoint: Checkpoint) -> None:
    """ValueError if the weights in the files are not those that the config describes."""
    expected = defaultdict(list)
    for weight in checkpoint.weights:
        expected[weight.part].append(weight.shape)
    found = defaultdict(list)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for name, format in checkpoint._formats():
        for weight in matrices(name, shapes[name], is_transposed(name, shapes)):
            found[weight.part].append(None if FORMATS[format].scaled else weight.shape)
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 1 and name.endswith((".weight", ".bias", ".sinks")):
            found[part_of(name)].append(tensor.shape)
    for part, shapes in expected.items():
        if len(found[part]) < len(shapes):
            raise ValueError(_missing(part, expected, found))
    for part, shapes in expected.items():
        if differing := set(found[part]) - set(shapes) - {None}:
            raise ValueError(
                f"{part.path} has shape {differing.pop()} in the files, {shapes[0]} by the config."
            )


def _missing(part: Part, expected: dict, found: dict) -> str:
    if part.component != "experts":
        return f"The files hold nothing for {part.path}, which the config describes."
    siblings = [other for other in expected if replace(other, expert=part.expert) == part]
    there = [other for other in siblings if found[other]]
    return (
        f"Layer {part.layer} has {len(there)} experts in the files, {len(siblings)} by the config; "
        f"{part.path} is the first that is missing."
    )


def load(
    path_or_id: str | Path,
    recipe: Recipe | None = None,
    device_map: str | dict | None = None,
    force: bool = False,
) -> PreTrainedModel:
    """The model at `path_or_id`, stored as `recipe` says, checked before and proved afterwards.

    `path_or_id` is a folder or a hub name; `recipe=None` takes the checkpoint as it is stored, be
    that 16 bits, this lab's own, or one that transformers 4 saved in NF4. `device_map` is that of
    transformers: None takes the first GPU if there is one and the CPU if not, "auto" spreads over
    all GPUs. `force=True` goes on where memory is predicted to run out.

    Raises what `inspect` and `locate` raise; MemoryError with both numbers; ValueError for a recipe
    that does not fit the model, for a weight to be quantized that is NaN or infinite (with its
    name), and for a quantized checkpoint that is asked for in another recipe; `NotCovered` if what
    was loaded is not what was asked for.
    """
    if not isinstance(recipe, Recipe | None):
        raise TypeError(f"{recipe!r} is no recipe; write Recipe(experts='nf4').")
    if recipe:
        recipe.require_storable()
    folder = locate(path_or_id, recipe, device_map, force)
    with ReadAhead(weight_files(folder)) as ahead:
        return _load(folder, recipe, device_map, force, ahead)


def _load(
    folder: Path,
    recipe: Recipe | None,
    device_map: str | dict | None,
    force: bool,
    ahead: ReadAhead,
) -> PreTrainedModel:
    checkpoint = inspect(folder)
    parts = [weight.part for weight in checkpoint.weights]
    if recipe is None:
        recipe = checkpoint.recipe
    elif checkpoint.recipe.quantizes and not recipe.stores_alike(checkpoint.recipe, parts):
        raise ValueError(
            f"{checkpoint.folder} is stored as {checkpoint.recipe}; quantized weights are not "
            "quantized again. Load it with recipe=None, or take the 16-bit checkpoint."
        )
    check_memory(budget_of(checkpoint.weights, recipe), device_map, force)
    mark("read")
    with _showing_bytes(ahead, folder.name):
        try:
            model = _from_pretrained(checkpoint, recipe, device_map)
        except UnusableWeight as stop:
            raise ValueError(str(stop)) from None
        if recipe.stores_alike(checkpoint.recipe, parts):
            ahead.wait()
            _touch(model)
    coverage(model).require(recipe)
    return model


@contextmanager
def _showing_bytes(ahead: ReadAhead, name: str) -> Iterator[None]:
    """A bar of the bytes that were used up, in place of transformers' own, if it may show one."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=ahead.total_bytes, desc=name, disable=not shown, **units) as bar:

        def count(count_bytes: int) -> None:
            ahead.used(count_bytes)
            bar.update(count_bytes)

        before = count_used.set(count)
        try:
            yield
            bar.update(ahead.total_bytes - bar.n)
        finally:
            count_used.reset(before)
            if shown:
                hf_logging.enable_progress_bar()


def _touch(model: PreTrainedModel) -> None:
    """Put every page of mapped weights in its place, so that the first token need not."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _from_pretrained(
    checkpoint: Checkpoint, recipe: Recipe, device_map: str | dict | None
) -> PreTrainedModel:
    settings = RecipeConfig(recipe)
    quantizes_now = recipe.quantizes and not checkpoint.recipe.quantizes
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if checkpoint.recipe.quantizes:
        config.quantization_config = settings.to_dict()
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=config,
        quantization_config=settings if quantizes_now else None,
        dtype=DTYPES[recipe.float_format],
        device_map=device_map or first_device(),
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )


def loading_bytes(budget: Budget) -> int:
    """Memory to load what `budget` predicts: the weights, and 256 MiB to quantize one matrix."""
    return budget.weights_bytes + 256 * 2**20


def check_memory(budget: Budget, device_map: str | dict | None, force: bool) -> None:
    """MemoryError with the bytes needed and the bytes free, unless `force`.

    What counts is the memory free on the devices that `device_map` names: all GPUs for "auto" and
    its like, the current one for None; without a GPU, the main memory that is available, the
    container's limit included.
    """
    devices = _devices(device_map)
    on_gpu = bool(devices)
    free_bytes = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    if not on_gpu:
        free_bytes = available_bytes()
    needed_bytes = loading_bytes(budget)
    if needed_bytes > free_bytes and not force:
        raise MemoryError(
            f"The model takes {budget.weights_bytes / GIB:.2f} GiB and loading it "
            f"{needed_bytes / GIB:.2f} GiB; {'the GPU' if on_gpu else 'this machine'} has "
            f"{free_bytes / GIB:.2f} GiB free. Take a recipe with fewer bits or a smaller model, "
            "free some memory, or pass force=True to try all the same."
        )


def _devices(device_map: str | dict | None) -> list[torch.device]:
    """The GPUs that a device map names; none of them means main memory."""
    if not torch.cuda.is_available():
        return []
    if isinstance(device_map, str) and device_map in SPREADING:
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    named = device_map or first_device()
    places = set(named.values()) if isinstance(named, dict) else {named}
    devices = {
        torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for place in places
    }
    return [device for device in devices if device.type == "cuda"]


def locate(
    path_or_id: str | Path,
    recipe: Recipe | None = None,
    device_map: str | dict | None = None,
    force: bool = False,
) -> Path:
    """The folder that `path_or_id` names; for a hub name, after downloading what is missing.

    Before weights are downloaded, the config alone is fetched and, where a recipe is given, the
    predicted memory is compared with what is there; the disk is asked for room. Raises
    FileNotFoundError for a folder or a model that does not exist, PermissionError for one whose
    terms must be accepted, ConnectionError, within seconds, if the hub cannot be reached, and
    OSError if the disk is too small.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file; give the folder that holds it.")
    name = str(path_or_id)
    looks_like_a_path = name.count("/") != 1 or name[0] in "./~" or path.parent.is_dir()
    if looks_like_a_path:
        raise FileNotFoundError(f"There is no folder {path}, and no hub name looks like that.")
    try:
        return _from_hub(name, local_files_only=True)
    except FileNotFoundError:
        return _download(name, recipe, device_map, force)


def _from_hub(repo_id: str, patterns=WANTED_FILES, **settings) -> Path:
    folder = snapshot_download(
        repo_id, allow_patterns=patterns, ignore_patterns=["consolidated*"], **settings
    )
    if settings.get("local_files_only") and "*.safetensors" in patterns:
        weight_files(Path(folder))
    return Path(folder)


def _download(
    repo_id: str, recipe: Recipe | None, device_map: str | dict | None, force: bool
) -> Path:
    with _hub_errors(repo_id):
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS)
        with_config = _from_hub(repo_id, ["config.json"])
    if recipe is not None:
        check_memory(predict(with_config, recipe), device_map, force)
    weights = [file for file in info.siblings if file.rfilename.endswith(".safetensors")]
    missing_bytes = sum(
        file.size or 0
        for file in weights
        if not file.rfilename.startswith("consolidated")
        and not (with_config / file.rfilename).is_file()
    )
    check_disk(missing_bytes, with_config, "set HF_HOME to a folder on a larger one")
    with _hub_errors(repo_id):
        return _from_hub(repo_id)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Says in one sentence what the hub's errors mean for the reader."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} asks for its terms to be accepted: do so on its page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"The hub has no model {repo_id!r}, or it is private and you are not logged in."
        ) from error
    except Exception as error:
        raise ConnectionError(
            f"The hub could not be reached for {repo_id!r} ({error}), and the model is not in the "
            "local cache. Give a folder that holds the checkpoint, or begin with the shipped "
            "stand-in: load(standin.PATH)."
        ) from error


def save(model: PreTrainedModel, folder: str | Path, tokenizer=None) -> Path:
    """Save the model as it is stored; `load(folder)` gives the same logits, without the original.

    Written beside and renamed when whole, so that an interrupted save leaves nothing under the
    name. Raises FileExistsError if there is something under it already, and OSError if the disk has
    no room for it, before anything is written.
    """
    folder = Path(folder).expanduser()
    with written_whole(folder) as unfinished:
        check_disk(coverage(model).total_bytes, folder, "name a folder on another one")
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
    return folder


def check_disk(needed_bytes: int, folder: Path, remedy: str) -> None:
    """Raises OSError, with what to do about it, if the disk of `folder` has too few bytes free."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise OSError(
            f"{folder} would take {sized(needed_bytes)} and its disk has {sized(free_bytes)} free; "
            f"{remedy}."
        )


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to write a folder under; it becomes `folder` if all goes well.

    After an error nothing is left under either name. Raises FileExistsError if there is something
    under `folder` already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or take another name.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def from_tensors(
    folder: Path, tensors: Mapping[str, object], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that `folder`'s config describes, with these weights in place of the files'.

    `tensors` go by their published names; `dtype` is the config's if None. Each value is asked for
    its tensor with `value[...]` when its turn comes, so that a value may read or decompress it only
    then. How the files are quantized is passed over. Raises ValueError for a missing weight.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    family = type(skeleton(config))
    model, loaded = family.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype or config.dtype,
        device_map=first_device(),
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder} holds nothing for {missing[0]}, which its config describes.")
    return model


class _MarkingStreamer(TextStreamer):
    """Prints tokens as they come; marks that the first one is under way, and that it is there."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._phases = iter(("first token", "generate"))

    def put(self, value):
        mark(next(self._phases, "generate"))
        super().put(value)


def stream(model: PreTrainedModel, tokenizer, prompt: str, max_new_tokens: int = 50) -> None:
    """Print `prompt` and the model's greedy continuation, token by token as they come.

    A meter that is recording gets the phases `first token` and `generate`.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=_MarkingStreamer(tokenizer),
    )


class NotCovered(AssertionError):
    """What is stored is not what was asked for; the message names the component and both."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a loaded model, as it lies in memory.

    `bytes` counts codes and every constant.
    """

    part: Part
    shape: tuple[int, ...]
    stored_as: str
    bytes: int
    block_size: int | None = None
    double_quant: bool | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Coverage:
    """What every weight of a model is stored in."""

    weights: tuple[StoredWeight, ...]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each component and format: parameters, bits per weight, bytes, constants in."""
        rows = pd.DataFrame(
            {
                "component": weight.part.component,
                "parameters": weight.parameters,
                "stored_as": weight.stored_as,
                "bytes": weight.bytes,
            }
            for weight in self.weights
        )
        groups = rows.groupby(["component", "stored_as"], as_index=False).sum()
        groups["bits_per_weight"] = 8 * groups["bytes"] / groups["parameters"]
        order = groups["component"].map(COMPONENTS.index)
        columns = ["component", "parameters", "stored_as", "bits_per_weight", "bytes"]
        return groups.loc[order.sort_values(kind="stable").index, columns].reset_index(drop=True)

    @property
    def total_bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)

    def by_component(self) -> dict[str, int]:
        """Bytes by component, as a `Budget` has them."""
        sizes = Counter()
        for weight in self.weights:
            sizes[weight.part.component] += weight.bytes
        return {name: sizes[name] for name in COMPONENTS if name in sizes}

    def bits_per_weight(self, component: str) -> float:
        """Bits per weight of one component, every constant counted."""
        chosen = [weight for weight in self.weights if weight.part.component == component]
        if not chosen:
            there = ", ".join(self.by_component())
            raise ValueError(f"The model has no {component}; it has {there}.")
        return 8 * sum(w.bytes for w in chosen) / sum(w.parameters for w in chosen)

    def require(self, recipe: Recipe) -> None:
        """Nothing if the model is stored as `recipe` says; `NotCovered` if any weight is not.

        Biases are no weights that a recipe is asked for.
        """
        for weight in self.weights:
            asked = recipe.format_of(weight.part)
            if asked is None or len(weight.shape) == 1:
                continue
            blocks = (recipe.block_size, recipe.double_quant)
            wrong_blocks = FORMATS[asked].scaled == "block" and blocks != (
                weight.block_size,
                weight.double_quant,
            )
            if weight.stored_as != asked or wrong_blocks:
                raise NotCovered(self._difference(weight, asked, recipe))

    def _difference(self, weight: StoredWeight, asked: str, recipe: Recipe) -> str:
        alike = [
            other
            for other in self.weights
            if other.part.component == weight.part.component and other.stored_as == weight.stored_as
        ]
        found = f"{weight.stored_as}, {8 * weight.bytes / weight.parameters:.2f} bits per weight"
        if weight.stored_as == asked:
            found += f", block {weight.block_size}, double_quant={weight.double_quant}"
            asked += f", block {recipe.block_size}, double_quant={recipe.double_quant}"
        return (
            f"{weight.part.component}: asked for {asked}, found {found} in "
            f"{sum(other.parameters for other in alike):,} parameters, first in {weight.part.path}."
        )


def coverage(model: nn.Module) -> Coverage:
    """What every weight of `model` is stored in, counted from the tensors that it really holds.

    Works on any transformers model, however it was loaded. Shared weights count once; buffers are
    left out.
    """
    return Coverage(
        tuple(
            weight
            for name, parameter in model.named_parameters()
            for weight in _stored_weights(model, name, parameter)
        )
    )


def _stored_weights(model: nn.Module, name: str, parameter: nn.Parameter) -> list[StoredWeight]:
    path, _, leaf = name.rpartition(".")
    storage = storage_of(model.get_submodule(path)) if leaf == "weight" else None
    if storage is not None:
        return [
            StoredWeight(
                part_of(name),
                tuple(storage.shape),
                storage.format,
                storage.stored_bytes,
                storage.block_size,
                storage.double_quant,
            )
        ]
    stored_as = DTYPE_FORMATS.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
    return [
        StoredWeight(
            weight.part, weight.shape, stored_as, weight.parameters * parameter.element_size()
        )
        for weight in matrices(name, tuple(parameter.shape))
    ]
