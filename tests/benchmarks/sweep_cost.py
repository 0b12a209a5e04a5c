"""What a 16-point sweep takes against 16 separate runs of the same points.

    python -m tests.benchmarks.sweep_cost --directory DIR            both sides, then the table
    python -m tests.benchmarks.sweep_cost --directory DIR --do sweep | runs | table
    python -m tests.benchmarks.sweep_cost --do grid                  a 32-point reward grid against 32 fits; no Ray

Every side is a process of its own, so that start-up counts. What is there is not done again: a part that was killed is
repeated. The table shows wall seconds, reserved CPU-seconds from the ledgers, and the ratios. The sweep measures no
drift; the runs measure it on as few prompts as there can be.

The reward grid is eight ensemble sizes with four replicates each, on made-up states of the size of the embedded data,
one thread. Both sides run in turn; that the grid equals the fits is shown in tests/tuning/test_grid.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from raylign.config import load_config
from raylign.cost.rows import Cost, read_ledger, total
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.phases import versions, write_json
from raylign.runtime.reward_job import head_fitter
from tests.benchmarks.ensemble_grid import NUM_PAIRS, NUM_VALID, made_up
from tuning.grid import fit_sizes

AXES = {"constraint.multiplier": [0.5, 1.0, 2.0, 5.0], "reward.num_heads": [1, 2, 4, 8]}
COMMON = {
    "constraint.kind": "rectified",
    "reward.kind": "ensemble",
    "data.max_pairs": 300,
    "train.max_steps": 12,
    "train.learning_rate": 1e-4,
    "evaluate.num_prompts": 48,
    "evaluate.max_new_tokens": 32,
}
RUN_ONLY = {"evaluate.drift_prompts": 4, "evaluate.drift_candidates": 2}
SIDES = ("sweep", "runs")
SIZES, REPLICATES = (1, 2, 3, 4, 5, 6, 8, 10), 4


def points() -> list[dict[str, float]]:
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def command(*arguments: str, keys: dict[str, object]) -> None:
    shown = [f"{key}={value}" for key, value in keys.items()]
    subprocess.run([sys.executable, "-m", "launch.cli", *arguments, *shown], check=True, stdout=subprocess.DEVNULL)


def timed(directory: Path, name: str, *arguments: str, keys: dict[str, object]) -> None:
    """Run one process unless it is done; its wall seconds go into `<name>.json`."""
    record = directory / f"{name}.json"
    if record.exists():
        return
    shutil.rmtree(directory / name, ignore_errors=True)
    start = time.monotonic()
    command(*arguments, keys={**keys, "run.storage": directory / name, "run.name": "it"})
    write_json(record, {"wall_s": time.monotonic() - start})


def sweep(directory: Path) -> None:
    space = directory / "space.yaml"
    space.write_text("".join(f"{key}: {{grid: {values}}}\n" for key, values in AXES.items()), encoding="utf-8")
    timed(directory, "sweep", "sweep", "--space", str(space), keys=dict(COMMON))


def runs(directory: Path, limit: int) -> None:
    left = [index for index in range(len(points())) if not (directory / f"run-{index:02d}.json").exists()]
    for index in left[:limit]:
        timed(directory, f"run-{index:02d}", "align", keys={**COMMON, **RUN_ONLY, **points()[index]})


def cost_below(directory: Path) -> Cost:
    """Of all ledgers below a directory."""
    return sum((total(read_ledger(found)) for found in directory.rglob(LEDGER_DIR)), Cost())


def table(directory: Path) -> str:
    """Both sides and their ratio; an estimate, and called one, when not all runs have been made."""
    names = [f"run-{index:02d}" for index in range(len(points()))]
    done = [name for name in names if (directory / f"{name}.json").exists()]
    if not done or not (directory / "sweep.json").exists():
        return f"not measured: {directory} holds {len(done)} of {len(names)} runs, and a sweep or none"
    wall = {name: json.loads((directory / f"{name}.json").read_text())["wall_s"] for name in ("sweep", *done)}
    cpu = {name: cost_below(directory / name).device_s["cpu"] for name in ("sweep", *done)}
    scale = len(names) / len(done)
    separate = tuple(scale * sum(of[name] for name in done) for of in (wall, cpu))
    label = "16 separate runs" + ("" if len(done) == len(names) else f" (estimate: {len(done)} of them x {scale:.2f})")
    lines = ["| | wall, s | reserved CPU-seconds (ledgers) |", "|---|---|---|"]
    lines.append(f"| {label} | {separate[0]:,.0f} | {separate[1]:,.0f} |")
    lines.append(f"| one sweep | {wall['sweep']:,.0f} | {cpu['sweep']:,.0f} |")
    lines.append(f"| ratio | {separate[0] / wall['sweep']:.2f} | {separate[1] / cpu['sweep']:.2f} |")
    each = sorted(wall[name] for name in done)
    lines.append(f"\none run: {each[0]:.0f} to {each[-1]:.0f} s; settings {json.dumps(COMMON)}")
    return "\n".join([*lines, json.dumps(versions())])


def grid(repeats: int) -> str:
    """Seconds of one pass over all sizes and replicates, and of a fit for each."""
    torch.set_num_threads(1)
    train, valid = made_up(NUM_PAIRS, 0), made_up(NUM_VALID, 1)
    configs = {size: load_config(values={"reward": {"kind": "ensemble", "num_heads": size}}) for size in SIZES}

    def one_pass() -> None:
        fit_sizes(train, valid, configs[max(SIZES)], [(size, True) for size in SIZES], REPLICATES)

    def separate() -> None:
        for replicate in range(REPLICATES):
            for config in configs.values():
                run = config.run.model_copy(update={"seed": replicate})
                seeded = config.model_copy(update={"run": run})
                head_fitter(train, ["one"] * NUM_PAIRS, valid, seeded)(torch.arange(NUM_PAIRS))

    seconds: dict[str, list[float]] = {"one pass": [], "32 fits": []}
    for _ in range(repeats):
        for name, work in (("one pass", one_pass), ("32 fits", separate)):
            seconds[name].append(elapsed(work))
    ratios = [apart / together for together, apart in zip(*seconds.values(), strict=True)]
    lines = [
        f"sizes {SIZES} x {REPLICATES} replicates, {repeats} repeats",
        "",
        "| side | seconds, median |",
        "|---|---|",
    ]
    lines += [f"| {name} | {statistics.median(values):.2f} |" for name, values in seconds.items()]
    lines.append(f"| ratio | {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] |")
    return "\n".join([*lines, json.dumps(versions())])


def elapsed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep-cost"))
    parser.add_argument("--do", choices=[*SIDES, "all", "table", "grid"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="of the reward grid")
    parser.add_argument("--limit", type=int, default=len(points()), help="separate runs at most, in this call")
    arguments = parser.parse_args()
    if arguments.do == "grid":
        print(grid(arguments.repeats))
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.do in ("sweep", "all"):
        sweep(arguments.directory)
    if arguments.do in ("runs", "all"):
        runs(arguments.directory, arguments.limit)
    print(table(arguments.directory))


if __name__ == "__main__":
    main()
