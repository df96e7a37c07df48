"""Folders of checkpoints: every format, every place of the state, steps from names, and files that mean harm."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from nbdyn.analysis.lca.checkpoint_files import read_steps
from nbdyn.analysis.lca.checkpoints import Checkpoints, from_checkpoints
from nbdyn.errors import CorruptRun, Incompatible, NbdynError
from nbdyn.recorder.describe import describe


class Net(nn.Module):
    """A layer, running statistics, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("grid", torch.zeros(2), persistent=False)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's as well."""

    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        if tie:
            self.out.weight = self.embed.weight


def make(seed: int, kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    model = kind()
    for buffer in model.buffers():
        buffer.fill_(seed + 1)
    return model


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


def save(folder: Path, n: int = 3, write: Callable[[Any, Path], None] = torch.save, name: str = "step_{}.pt") -> None:
    """Checkpoint k of step 10 k holds the weights of make(k)."""
    for k in range(n):
        path = folder / name.format(10 * k)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(make(k).state_dict(), path)


def assert_rows(found: Checkpoints, kind: Callable[[], nn.Module] = Net) -> None:
    for k in range(len(found)):
        np.testing.assert_array_equal(found.row(k), flat(make(k, kind)))
        assert found.row(k).dtype == np.float32


# Formats and places of the state ------------------------------------------------------------------------------------


def legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (torch.save, "step_{}.pt"),
        (torch.save, "model_{}.pth"),
        (torch.save, "net-{}.bin"),
        (legacy, "old{}.pt"),
        (save_file, "w{}.safetensors"),
        (save_file, "checkpoint-{}/model.safetensors"),
        (torch.save, "checkpoint-{}/pytorch_model.bin"),
        (lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path), "epoch=3-step={}.ckpt"),
    ],
)
def test_every_format(tmp_path: Path, write: Callable[[Any, Path], None], name: str):
    save(tmp_path, 3, write, name)
    found = from_checkpoints(tmp_path, make(9))
    assert found.steps.tolist() == [0, 10, 20] and found.steps.dtype == np.int64
    assert_rows(found)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_state_under_a_key_beside_an_optimizers(tmp_path: Path, key: str):
    def write(state: Any, path: Path) -> None:
        torch.save({"step": torch.tensor(3), "optimizer": {"state": {0: torch.ones(2)}}, key: state}, path)

    save(tmp_path, 2, write)
    assert_rows(from_checkpoints(tmp_path, make(9)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_are_left_out(tmp_path: Path, prefix: str):
    save(tmp_path, 2, lambda state, path: torch.save({prefix + name: t for name, t in state.items()}, path))
    assert_rows(from_checkpoints(tmp_path, make(9)))


def test_prefixes_stay_where_they_are_the_models_own(tmp_path: Path):
    def wrapped() -> nn.Module:
        return nn.ModuleDict({"model": nn.Linear(2, 1)})

    for k in range(2):
        torch.save({f"module.{n}": t for n, t in make(k, wrapped).state_dict().items()}, tmp_path / f"{k}.pt")
    found = from_checkpoints(tmp_path, make(9, wrapped))
    assert_rows(found, wrapped)
    assert [tensor["name"] for tensor in found.tensors] == ["model.weight", "model.bias"]


def test_a_compiled_model(tmp_path: Path):
    save(tmp_path, 2)
    assert_rows(from_checkpoints(tmp_path, torch.compile(make(9), backend="eager")))  # pyright: ignore


@pytest.mark.parametrize("write", [lambda m, p: torch.save(m.state_dict(), p), lambda m, p: save_model(m, str(p))])
def test_tied_weights_stand_once(tmp_path: Path, write: Callable[[nn.Module, Path], None]):
    """`save_model` of safetensors keeps but one of the names of a tied tensor, and not always the model's first."""
    for k in range(2):
        write(make(k, Tied), tmp_path / (f"{k}.pt" if write.__code__.co_names[0] == "torch" else f"{k}.safetensors"))
    found = from_checkpoints(tmp_path, make(9, Tied))
    assert [(t["name"], t["size"]) for t in found.tensors] == [("embed.weight", 12)]
    assert_rows(found, Tied)


def test_tied_in_the_model_but_not_in_the_file(tmp_path: Path):
    for k in range(2):
        torch.save(make(k, lambda: Tied(tie=False)).state_dict(), tmp_path / f"{k}.pt")
    with pytest.raises(Incompatible, match=r"embed\.weight and out\.weight differ"):
        from_checkpoints(tmp_path, make(9, Tied))


def test_weights_that_are_not_finite_are_read(tmp_path: Path):
    """A diverged training is worth a look: NaN of a tied tensor equals itself."""
    for k in range(2):
        model = make(k, Tied)
        with torch.no_grad():
            next(model.parameters())[0, 0] = torch.nan
        torch.save(model.state_dict(), tmp_path / f"{k}.pt")
    assert np.isnan(from_checkpoints(tmp_path, make(9, Tied)).row(1)).tolist() == [True] + [False] * 11


def test_half_precision_is_widened_and_float64_kept(tmp_path: Path):
    model = nn.Linear(2, 1)
    for k in range(2):
        torch.save(model.bfloat16().state_dict(), tmp_path / f"{k}.pt")
    row = from_checkpoints(tmp_path, nn.Linear(2, 1)).row(0)
    np.testing.assert_array_equal(row, torch.cat([p.reshape(-1) for p in model.parameters()]).float().detach())
    third = torch.full((1, 2), 1 / 3, dtype=torch.float64)
    for k in range(2):
        torch.save({"weight": third, "bias": third[0, :1]}, tmp_path / f"{k}.pt")
    row = from_checkpoints(tmp_path, nn.Linear(2, 1).double()).row(1)
    assert row.dtype == np.float64 and row.tolist() == [1 / 3] * 3


# What the engine reads ------------------------------------------------------------------------------------------------


def test_tensors_are_a_runs(tmp_path: Path):
    save(tmp_path, 2)
    model = make(9)
    run = describe(model, torch.optim.SGD(model.parameters(), 0.1), None, "every", 1, 1)["tensors"]
    found = from_checkpoints(tmp_path, model)
    assert found.tensors == [{key: value for key, value in entry.items() if key != "group"} for entry in run]
    assert len(found) == 2 and found.model is model
    assert repr(found) == f"<Checkpoints of Net: 2 at steps 0..10, 12 parameters, {tmp_path}>"


def test_buffers_are_of_their_checkpoint(tmp_path: Path):
    save(tmp_path, 3)
    found = from_checkpoints(tmp_path, make(9))
    for k in (2, 0, 1):
        buffers = found.buffers(k)
        assert list(buffers) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
        assert all((b == k + 1).all() for b in buffers.values())
        assert buffers["norm.num_batches_tracked"].dtype == torch.int64
    found.buffers(1)["norm.running_mean"].fill_(7)
    assert (found.buffers(1)["norm.running_mean"] == 2).all(), "a copy was given"
    found.row(0)
    assert (found.buffers(0)["norm.running_mean"] == 1).all()


def test_the_models_weights_are_left_alone(tmp_path: Path):
    save(tmp_path, 2)
    model = make(9)
    before = flat(model).copy()
    from_checkpoints(tmp_path, model).row(1)
    np.testing.assert_array_equal(flat(model), before)


def test_later_files_are_read_when_asked_for(tmp_path: Path):
    save(tmp_path, 2)
    (tmp_path / "step_10.pt").write_bytes(b"")
    found = from_checkpoints(tmp_path, make(9))
    found.row(0)
    with pytest.raises(CorruptRun, match=r"step_10\.pt is damaged"):
        found.row(1)
    (tmp_path / "step_10.pt").unlink()
    with pytest.raises(NbdynError, match=r"step_10\.pt cannot be read"):
        found.row(1)
    with pytest.raises(NbdynError, match="no checkpoint 2"):
        found.row(2)
    with pytest.raises(NbdynError, match="no checkpoint -1"):
        found.buffers(-1)


# Files that do not fit, are damaged, or mean harm ---------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any, Path], None]:
    def write(state: Any, path: Path) -> None:
        torch.save(change(dict(state)), path)

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {name.replace("first.weight", "first.wieght"): t for name, t in s.items()},
            r"lacks 1 of the 7 tensors of Net, such as first\.weight; the nearest name in the file is first\.wieght",
        ),
        (lambda s: {"zzz": torch.ones(1)}, r"lacks 7 of the 7 .* the file has zzz"),
        (
            lambda s: s | {"first.bias2": torch.ones(1)},
            r"has 1 tensors that Net lacks, such as first\.bias2; .* is first\.bias",
        ),
        (lambda s: s | {"first.weight": torch.ones(2, 4)}, r"first\.weight has shape \(2, 4\), the model's \(2, 3\)"),
        (lambda s: s | {"first.bias": torch.ones(2, dtype=torch.int8)}, r"first\.bias is torch\.int8"),
        (lambda s: {name: t for name, t in s.items() if "mean" not in name}, r"lacks .* norm\.running_mean"),
        (lambda s: {}, "no weights by name"),
        (lambda s: [1, 2], "no weights by name"),
        (lambda s: torch.ones(3), "no weights by name"),
    ],
)
def test_names_and_shapes_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str):
    save(tmp_path, 2, changed(change))
    with pytest.raises(Incompatible, match=message):
        from_checkpoints(tmp_path, make(9))


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, (HARM,)


HARM = ""


@pytest.mark.parametrize("write", [torch.save, legacy])
def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any):
    monkeypatch.setitem(globals(), "HARM", str(tmp_path / "harm"))
    save(tmp_path, 2, lambda state, path: write({**state, "extra": Hostile()}, path))
    with pytest.raises(NbdynError, match=r"step_0\.pt holds a posix\.mkdir, which only pickle") as caught:
        from_checkpoints(tmp_path, make(9))
    assert not isinstance(caught.value, CorruptRun)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "step_0.pt", weights_only=False)
    assert (tmp_path / "harm").exists(), "the file did mean harm"


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"state_dict": {}, "hparams": argparse.Namespace(lr=1)}])
def test_objects_that_need_pickle_are_refused(tmp_path: Path, content: Any):
    save(tmp_path, 2, lambda state, path: torch.save(content, path))
    with pytest.raises(NbdynError, match=r"holds a (torch\.nn\.modules\.linear\.Linear|argparse\.Namespace), which"):
        from_checkpoints(tmp_path, make(9))


@pytest.mark.parametrize(
    ("write", "suffix"), [(torch.save, "pt"), (legacy, "pt"), (save_file, "safetensors")], ids=["zip", "legacy", "safe"]
)
@pytest.mark.parametrize("keep", [0, 1, 4, 10, 100, 0.5, -1])
def test_truncated_files(tmp_path: Path, write: Callable[[Any, Path], None], suffix: str, keep: float):
    save(tmp_path, 2, write, "{}." + suffix)
    path = tmp_path / f"0.{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(CorruptRun, match=rf"0\.{suffix} is damaged"):
        from_checkpoints(tmp_path, make(9))


def test_a_file_of_something_else(tmp_path: Path):
    (tmp_path / "1.pt").write_text("hello")
    (tmp_path / "2.pt").write_text("hello")
    with pytest.raises(CorruptRun, match=r"1\.pt is damaged, cut short or no checkpoint"):
        from_checkpoints(tmp_path, make(9))


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_5.pt", "step_10.pt"], [5, 10]),
        (["step5.pt", "step0010.pt"], [5, 10]),
        (["epoch=3-step=880.ckpt", "epoch=4-step=1100.ckpt"], [880, 1100]),
        (["step=880-val_loss=0.12.ckpt", "step=990-val_loss=0.2.ckpt"], [880, 990]),
        (["checkpoint-500/model.safetensors", "checkpoint-1000/pytorch_model.bin"], [500, 1000]),
        (["global_step100/model_1.pt", "global_step100/model_2.pt"], [1, 2]),
        (["Step-3.pt", "STEP-4.pt"], [3, 4]),
        (["500steps.pt", "600steps.pt"], [500, 600]),
        (["steps_7.pt", "steps_8.pt"], [7, 8]),
        (["resnet18_10.pt", "resnet18_9.pt"], [10, 9]),
        (["loss0.5_10.pt", "loss0.4_20.pt"], [10, 20]),
        (["stepsize0.1_10.pt", "stepsize0.1_20.pt"], [10, 20]),
        (["2024-01-31_1.pt", "2024-02-01_2.pt"], [1, 2]),
        (["ckpt.9.pt", "ckpt.10.pt"], [9, 10]),
        (["0.pt", "9007199254740993.pt"], [0, 9007199254740993]),
    ],
)
def test_steps_in_names(names: list[str], steps: list[int]):
    assert read_steps(names) == steps


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["best.pt", "step_5.pt", "last.pt"], r"no step number in best\.pt, last\.pt; "),
        (["step1_step2.pt", "step3_step4.pt"], r'several numbers follow "step" in step1_step2\.pt'),
        (["step_5.pt", "epoch_6.pt"], r"step_5\.pt and epoch_6\.pt are not named alike"),
        (["resnet18.pt", "resnet18_100.pt"], "not named alike"),
        (["epoch=1-loss=0.12.pt", "epoch=2-loss=0.10.pt"], r"the last number in .* is 0\.12"),
        (["epoch0_batch50.pt", "epoch1_batch40.pt"], "disagree about which is later"),
        (["99999999999999999999.pt", "1.pt"], "whole number from 0 on"),
    ],
)
def test_steps_that_are_not_clear(names: list[str], message: str):
    with pytest.raises(NbdynError, match=message):
        read_steps(names)


def test_two_files_of_a_step(tmp_path: Path):
    save(tmp_path, 2, name="epoch=0-step={}.ckpt")
    save(tmp_path, 1, name="epoch=0-step={}-v1.ckpt")
    with pytest.raises(NbdynError, match=r"0-step=0-v1\.ckpt and .*0-step=0\.ckpt are both of step 0; .*steps=\[") as e:
        from_checkpoints(tmp_path, make(9))
    assert "epoch=0-step=10.ckpt" in str(e.value), "the order of the files is named"
    assert from_checkpoints(tmp_path, make(9), pattern="*[!1].ckpt").steps.tolist() == [0, 10]


def test_files_are_ordered_by_step_not_by_name(tmp_path: Path):
    for k, name in enumerate(["c9", "c10", "c100"]):
        torch.save(make(k).state_dict(), tmp_path / f"{name}.pt")
    found = from_checkpoints(tmp_path, make(9))
    assert found.files == ["c9.pt", "c10.pt", "c100.pt"]
    assert_rows(found)


def test_steps_that_are_given(tmp_path: Path):
    for k, name in enumerate(["2", "10", "b"]):
        torch.save(make(k).state_dict(), tmp_path / f"a{name}.pt")
    found = from_checkpoints(tmp_path, make(9), steps=[0, 5, 6])
    assert found.steps.tolist() == [0, 5, 6] and found.files == ["a2.pt", "a10.pt", "ab.pt"]
    assert_rows(found)
    backwards = from_checkpoints(tmp_path, make(9), steps={"a2.pt": 3, "a10.pt": 2, "ab.pt": 1}.__getitem__)
    assert backwards.files == ["ab.pt", "a10.pt", "a2.pt"] and backwards.steps.tolist() == [1, 2, 3]
    with pytest.raises(NbdynError, match="2 steps for 3 files"):
        from_checkpoints(tmp_path, make(9), steps=[1, 2])
    with pytest.raises(NbdynError, match=r"ab\.pt is 1\.5; give a whole number"):
        from_checkpoints(tmp_path, make(9), steps=[1, 2, 1.5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(NbdynError, match=r"a2\.pt is -1; give a whole number from 0 on"):
        from_checkpoints(tmp_path, make(9), steps=np.array([-1, 2, 3]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(NbdynError, match="both of step 2"):
        from_checkpoints(tmp_path, make(9), steps=lambda name: 2)


# Folders --------------------------------------------------------------------------------------------------------------


def test_what_a_trainer_leaves_beside_weights_is_passed_by(tmp_path: Path):
    save(tmp_path, 2, save_file, "checkpoint-{}/model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / "checkpoint-0" / name).write_bytes(b"")
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("7")
    assert_rows(from_checkpoints(tmp_path, make(9)))
    save_file(make(5).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(NbdynError, match=r"no step number in model\.safetensors; .*pattern="):
        from_checkpoints(tmp_path, make(9))
    assert_rows(from_checkpoints(tmp_path, make(9), pattern="checkpoint-*/model.safetensors"))


def test_folders_without_two_checkpoints(tmp_path: Path):
    with pytest.raises(NbdynError, match="nowhere is no folder"):
        from_checkpoints(tmp_path / "nowhere", make(9))
    with pytest.raises(NbdynError, match=r"holds no files \*\.pt"):
        from_checkpoints(tmp_path, make(9))
    save(tmp_path, 1)
    with pytest.raises(NbdynError, match='holds no files like "x\\*"'):
        from_checkpoints(tmp_path, make(9), pattern="x*")
    with pytest.raises(NbdynError, match=r"one checkpoint, step_0\.pt; a change of the loss is between two"):
        from_checkpoints(tmp_path, make(9))


def test_a_model_over_several_files(tmp_path: Path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(NbdynError, match="several files"):
        from_checkpoints(tmp_path, make(9))


def test_tiny_models(tmp_path: Path):
    for k in range(2):
        torch.save({"bias": torch.tensor(float(k))}, tmp_path / f"{k}.pt")
    scalar = nn.Module()
    scalar.bias = nn.Parameter(torch.zeros(()))
    assert from_checkpoints(tmp_path, scalar).row(1).tolist() == [1.0]
    with pytest.raises(Incompatible, match="no parameters"):
        from_checkpoints(tmp_path, nn.ReLU())
