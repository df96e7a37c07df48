"""Files of checkpoints: which there are, of which step each is, and their tensors, read without running their code."""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nbdyn.errors import CorruptRun, NbdynError

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a folder of their own, such as `checkpoint-500/`, as the Trainer of transformers writes them."""
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "training_args")
"""Stems of files that stand beside weights and hold none; and all that begin with `rng_state`."""
AFTER_STEP = re.compile(r"steps?[ =_:-]*(\d+)", re.IGNORECASE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def find(folder: Path, pattern: str | None) -> list[str]:
    """Names of the files of checkpoints relative to a folder, numbers in them in numeric order.

    Args:
        folder: where they are, or the folders of single checkpoints.
        pattern: a glob relative to `folder`, such as "run1_*.pt"; None for every file with a suffix of checkpoints.

    Raises:
        NbdynError: if there is no such folder or no such file, or a model is spread over several files.
    """
    if not folder.is_dir():
        raise NbdynError(f"{folder} is no folder; give the folder that holds the files of the checkpoints.")
    if pattern is not None:
        found = [path for path in folder.glob(pattern) if path.is_file()]
    else:
        found = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file() and _has_weights(path)]
        found += [path for name in IN_FOLDERS for path in folder.glob(f"*/{name}")]
        shards = next((path for at in ("*", "*/*") for path in folder.glob(f"{at}.index.json")), None)
        if shards is not None:
            raise NbdynError(f"{shards} lists a model spread over several files; save each checkpoint as one file.")
    if not found:
        wanted = f'files like "{pattern}"' if pattern is not None else f"files *{', *'.join(SUFFIXES)}"
        raise NbdynError(f'{folder} holds no {wanted}; give another folder, or pattern="..." relative to it.')
    return sorted((path.relative_to(folder).as_posix() for path in found), key=_natural)


def _has_weights(path: Path) -> bool:
    return path.stem not in NO_WEIGHTS and not path.name.startswith(("rng_state", "."))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting by this puts a10 after a9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# Steps ----------------------------------------------------------------------------------------------------------------


def steps_of(names: Sequence[str], steps: Sequence[int] | Callable[[str], int] | None) -> list[int]:
    """The step of each file: as given, else the number in its name.

    Args:
        names: relative names, with "/" between folders.
        steps: one for each of the names; or a function from a name to its step; None to read them from the names.

    Raises:
        NbdynError: if a name has no number or it is not clear which, the given steps are not one whole number a file,
            or two files are of one step.
    """
    if steps is None:
        found = read_steps(names)
    else:
        given = [steps(name) for name in names] if callable(steps) else list(steps)
        if len(given) != len(names):
            raise NbdynError(f"{len(given)} steps for {len(names)} files; give one for each of {_listed(names)}.")
        found = [_whole(step, name) for step, name in zip(given, names, strict=True)]
    owner: dict[int, str] = {}
    for name, step in zip(names, found, strict=True):
        if step in owner:
            raise _unclear(f"{owner[step]} and {name} are both of step {step}", names)
        owner[step] = name
    return found


def read_steps(names: Sequence[str]) -> list[int]:
    """The number after "step" in each name, else the last number of each.

    Of a name with folders, the last part that has a number counts.

    Raises:
        NbdynError: if there is none, or several readings.

    >>> read_steps(["epoch=3-step=880.ckpt", "epoch=4-step=1100.ckpt"])
    [880, 1100]
    >>> read_steps(["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"])
    [500, 1000]
    """
    parts = [_telling_part(name) for name in names]
    silent = [name for name, part in zip(names, parts, strict=True) if not NUMBER.search(part)]
    if silent:
        raise _unclear(f"no step number in {_listed(silent)}", names)
    after = [{int(number) for number in AFTER_STEP.findall(part)} for part in parts]
    if all(after):
        several = next((name for name, numbers in zip(names, after, strict=True) if len(numbers) > 1), None)
        if several is not None:
            raise _unclear(f'several numbers follow "step" in {several}', names)
        return [_whole(number, name) for (number,), name in zip(after, names, strict=True)]
    return _last_numbers(names, parts)


def _telling_part(name: str) -> str:
    """The stem, or the nearest folder that has a number where the stem has none."""
    path = PurePosixPath(name)
    return next((part for part in (path.stem, *reversed(path.parts[:-1])) if NUMBER.search(part)), path.stem)


def _last_numbers(names: Sequence[str], parts: list[str]) -> list[int]:
    """The last number of each name, where names differ in numbers alone and those before it do not run against it."""
    numbers = [NUMBER.findall(part) for part in parts]
    for name, part, found in zip(names, parts, numbers, strict=True):
        if "." in found[-1]:
            raise _unclear(f"the last number in {name} is {found[-1]}", names)
        if NUMBER.sub("#", part) != NUMBER.sub("#", parts[0]):
            raise _unclear(f"{names[0]} and {name} are not named alike", names)
    steps = [_whole(int(found[-1]), name) for found, name in zip(numbers, names, strict=True)]
    ordered = sorted(range(len(names)), key=steps.__getitem__)
    for before, after in itertools.pairwise(ordered):
        if _whole_numbers(numbers[before][:-1]) > _whole_numbers(numbers[after][:-1]):
            raise _unclear(f"the numbers in {names[before]} and {names[after]} disagree about which is later", names)
    return steps


def _whole_numbers(numbers: list[str]) -> list[int]:
    """Epochs and dates among numbers, in their order; not a loss such as 0.25."""
    return [int(number) for number in numbers if "." not in number]


def _whole(step: Any, name: str) -> int:
    """A step as an int that fits int64."""
    try:
        found = index(step)
    except TypeError:
        raise NbdynError(f"the step of {name} is {step!r}; give a whole number.") from None
    if not 0 <= found < 2**63:
        raise NbdynError(f"the step of {name} is {step}; give a whole number from 0 on.")
    return found


def _unclear(problem: str, names: Sequence[str]) -> NbdynError:
    return NbdynError(
        f'{problem}; leave files out with pattern="...", or say the steps: steps=[...], one for each of '
        f"{_listed(names)} in this order, or steps=lambda name: ..."
    )


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} files)" if len(names) > limit else "")


# Tensors --------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    """What a file of a checkpoint holds, on the CPU. Nothing in it is run: tensors, numbers, text, containers.

    Files of torch in its zip format are mapped, so that what is not looked at (the optimizer's state) costs no memory.

    Raises:
        CorruptRun: if the file is damaged, or no checkpoint.
        NbdynError: if it cannot be opened, or holds objects that only pickle could make.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise NbdynError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # bytes at random make torch's readers raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            text = str(error).partition("\n")[0][:200]
            raise CorruptRun(
                f"{path} is damaged, cut short or no checkpoint of torch ({type(error).__name__}: {text}); copy it "
                'again from where it was made, or leave it out with pattern="...".'
            ) from error
        raise NbdynError(
            f"{path} holds a {refused[1]}, which only pickle could make, and pickle can run any code: it was not "
            "loaded. Save weights alone, torch.save(model.state_dict(), path); or, if you trust the class, let torch "
            "make it: torch.serialization.add_safe_globals([...])."
        ) from error


def mappings_of_tensors(content: Any, keys: Iterable[str]) -> list[Mapping[str, torch.Tensor]]:
    """The mappings from names to tensors in a checkpoint: under those of the keys that hold one, else itself."""
    if not isinstance(content, Mapping):
        return []
    inner = [_tensors(content[key]) for key in keys if key in content]
    return [found for found in inner if found] or [found for found in [_tensors(content)] if found]


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, torch.Tensor)}
