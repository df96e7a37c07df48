"""The five questions side by side: nbdyn, DuckDB on Parquet, h5py, zarr, cells in TileDB, and replay.

    python -m tests.benchmarks.questions run                     # 2.1e8 cells, Markdown; --json FILE for the numbers
    python -m tests.benchmarks.questions run --size small --repeats 1 --only DuckDB replay

Everybody records the same training: bit for bit the same weights, per-sample gradients out of the one ordinary
backward pass. Everybody stores the weights of every step and a row a visit; the rivals store the gradient of every
sample besides (sparse ones leave zeros out). Each measurement has a process of its own, systems are interleaved, and
medians over the repeats are shown. "Cold" is the first answer of a store just opened in a new process (libraries are
imported before, and the files are in the page cache); "warm" is the median of the second to fifth answer. Both end
when the frame is there. All answers are compared with each other; if two differ, the benchmark fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from tests.benchmarks.rivals import SYSTEMS, missing
from tests.benchmarks.rivals.asked import COLUMNS, QUESTIONS, Answer, Asked, check, choose
from tests.benchmarks.rivals.factors import tidy
from tests.benchmarks.rivals.training import SIZES, Plain, Problem, prepare, train

PLAIN = "plain loop"
ANSWERS = 5
"""The first is cold, the others warm."""

# One measurement, in a process of its own ------------------------------------------------------------------------


def record(name: str, problem: Problem, folder: Path) -> float:
    """Record run "a" with gradients and run "b", another ordering, without; seconds of "a"."""
    two_steps = dataclasses.replace(problem, samples=2 * problem.batch, epochs=1)

    def trained(run: str, what: Problem, seed: int) -> float:
        path = folder / name.replace(" ", "-") / run
        shutil.rmtree(path, ignore_errors=True)
        observer = Plain() if name == PLAIN else SYSTEMS[name].observer(path, run != "b", what)
        return train(what, seed, observer, folder)

    train(problem, 0, Plain(), folder)  # warms torch and the data
    trained("warm", two_steps, 0)
    seconds = trained("a", problem, 0)
    trained("b", problem, 1)
    return seconds


def n_bytes(name: str, folder: Path) -> tuple[int, int]:
    """On disk, of run "a": all, and all but the weights."""
    path = folder / name.replace(" ", "-") / "a"
    files = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    weights = path / SYSTEMS[name].weights
    return sum(files.values()), sum(n for file, n in files.items() if weights not in (file, *file.parents))


def ask(
    name: str, question: int, asked: Asked, problem: Problem, folder: Path, times: int = ANSWERS
) -> tuple[list[float], Answer]:
    """Open the store and ask so many times: the seconds of each, and the first answer."""
    for module in (*SYSTEMS[name].packages, *SYSTEMS[name].modules):
        importlib.import_module(module)
    path = folder / name.replace(" ", "-")
    seconds, answer = [], ()
    began = time.perf_counter()
    reader = SYSTEMS[name].reader((path / "a", path / "b"), problem)
    for number in range(times):
        found = getattr(reader, f"q{question}")(asked)
        seconds.append(time.perf_counter() - began)
        if not number:
            answer = found if isinstance(found, tuple) else (found,)
        began = time.perf_counter()
    if name == "nbdyn":
        answer = tidy(answer)
    return seconds, tuple(frame[list(names)] for frame, names in zip(answer, COLUMNS[question], strict=True))


def measure(chosen: argparse.Namespace) -> None:
    """One measurement: seconds as JSON, answers as files."""
    folder, problem = chosen.folder, SIZES[chosen.size]
    if chosen.question is None:
        print(json.dumps(record(chosen.system, problem, folder)))
        return
    asked = Asked(**json.loads((folder / "asked.json").read_text()))
    seconds, answer = ask(chosen.system, chosen.question, asked, problem, folder)
    for frame, path in zip(answer, _answer_files(chosen.system, chosen.question, folder), strict=True):
        frame.to_csv(path, index=False)
    print(json.dumps(seconds))


def _answer_files(name: str, question: int, folder: Path) -> list[Path]:
    return [folder / f"{name}-{question}-{part}.csv" for part in range(len(COLUMNS[question]))]


def measured(name: str, question: int | None, chosen: argparse.Namespace, folder: Path) -> Any:
    """One measurement in a fresh process."""
    words = ["measure", "--system", name, "--size", chosen.size, "--folder", str(folder)]
    words += [] if question is None else ["--question", str(question)]
    command = [sys.executable, "-m", "tests.benchmarks.questions", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"{name}, question {question}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# All of them -----------------------------------------------------------------------------------------------------


def agree(answers: dict[str, Answer], question: int, asked: Asked, problem: Problem) -> None:
    """Compare all answers to a question with that of replay, or of the first where it is not among them.

    Raises:
        AssertionError: if two of them differ.
    """
    base = "replay" if "replay" in answers else next(iter(answers))
    for name, answer in answers.items():
        try:
            check(question, answers[base], answer, asked, problem)
        except AssertionError as error:
            raise AssertionError(f"{name} and {base} do not agree on {error}") from error


def compare(names: list[str], chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements, interleaved."""
    problem = SIZES[chosen.size]
    prepare(problem, folder)
    asked = choose(problem, folder)
    (folder / "asked.json").write_text(json.dumps(dataclasses.asdict(asked)))
    seconds: dict[str, list[float]] = {PLAIN: [], **{name: [] for name in names}}
    answers: dict[str, dict[int, list[list[float]]]] = {name: {q: [] for q in chosen.questions} for name in names}
    for _ in range(chosen.repeats):
        for name, found in seconds.items():
            found.append(measured(name, None, chosen, folder))
    for _ in range(chosen.repeats):
        for question in chosen.questions:
            for name in names:
                answers[name][question].append(measured(name, question, chosen, folder))
            frames = {
                name: tuple(pd.read_csv(file) for file in _answer_files(name, question, folder)) for name in names
            }
            agree(frames, question, asked, problem)
    return {
        "problem": dataclasses.asdict(problem),
        "asked": dataclasses.asdict(asked),
        "machine": machine(names),
        "record": seconds,
        "bytes": {name: n_bytes(name, folder) for name in names},
        "answers": answers,
    }


def machine(names: list[str]) -> dict[str, Any]:
    """Cores and versions."""
    packages = {package for name in names for package in SYSTEMS[name].packages}
    versions = {name: importlib.metadata.version(name) for name in sorted({*packages, "numpy", "pandas"})}
    import torch

    import nbdyn

    return {
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "nbdyn": nbdyn.__version__,
        **versions,
    }


def cold_and_warm(repeats: list[list[float]]) -> tuple[float, float]:
    """Medians over the repeats: of the first answers, and of the medians of the others."""
    return statistics.median(r[0] for r in repeats), statistics.median(statistics.median(r[1:]) for r in repeats)


def table(results: dict[str, Any], questions: list[int]) -> str:
    """Two Markdown tables: recording, and answers with how many times the best rival's time nbdyn's is."""
    plain = results["record"][PLAIN]
    lines = [
        "| | record, s | record / plain | MB on disk | without weights |\n|---|---|---|---|---|",
        f"| {PLAIN} | {statistics.median(plain):.2f} | 1 | - | - |",
    ]
    for name, (everything, rest) in results["bytes"].items():
        seconds = results["record"][name]
        ratio = statistics.median(a / b for a, b in zip(seconds, plain, strict=True))
        size = f"{everything / 1e6:.1f} | {rest / 1e6:.1f}"
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.1f} | {size} |")
    lines += [
        "",
        "| seconds, cold / warm | " + " | ".join(map(str, questions)) + " |",
        "|---|" + "---|" * len(questions),
    ]
    times = {n: {q: cold_and_warm(found[q]) for q in questions} for n, found in results["answers"].items()}
    for name, found in times.items():
        lines.append(f"| {name} | " + " | ".join(f"{a:.3f} / {b:.3f}" for a, b in found.values()) + " |")
    others = [name for name in times if name != "nbdyn"]
    if "nbdyn" in times and others:
        best = [[min(times[n][q][i] for n in others) / times["nbdyn"][q][i] for i in (0, 1)] for q in questions]
        lines.append("| best other / nbdyn | " + " | ".join(f"{a:.1f} / {b:.1f}" for a, b in best) + " |")
    return "\n".join(lines)


def run(chosen: argparse.Namespace) -> None:
    """Measure and print."""
    lacking = missing()
    names = [name for name in chosen.only if name not in lacking]
    problem = SIZES[chosen.size]
    with tempfile.TemporaryDirectory(prefix="nbdyn-benchmark-", dir=chosen.folder) as scratch:
        results = compare(names, chosen, Path(scratch))
    print(
        f"{problem.data}, MLP {'-'.join(map(str, problem.widths))}: {problem.parameters:,} parameters, "
        f"{problem.visits:,} visits of {problem.samples:,} samples in {problem.steps} steps, "
        f"{problem.visits * problem.parameters:.2g} cells. "
        + ", ".join(f"{key} {value}" for key, value in results["machine"].items())
        + f"; {chosen.repeats} interleaved repeats.\n"
    )
    print("\n".join(f"{number}. {QUESTIONS[number]}" for number in chosen.questions) + "\n")
    print(table(results, chosen.questions))
    print("".join(f"\n{name} was left out: {packages} not installed" for name, packages in lacking.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole, one = commands.add_parser("run"), commands.add_parser("measure")
    for command in (whole, one):
        command.add_argument("--size", choices=list(SIZES), default="full")
        command.add_argument("--folder", type=Path, help="where the stores are written (the system's scratch folder)")
    whole.add_argument("--repeats", type=int, default=3)
    whole.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM")
    whole.add_argument("--questions", nargs="+", type=int, choices=list(QUESTIONS), default=list(QUESTIONS))
    whole.add_argument("--json", type=Path, help="write all numbers there")
    one.add_argument("--system", choices=[PLAIN, *SYSTEMS], required=True)
    one.add_argument("--question", type=int, choices=list(QUESTIONS), help="ask instead of recording")
    chosen = parser.parse_args(arguments)
    {"run": run, "measure": measure}[chosen.command](chosen)


if __name__ == "__main__":
    main()
