"""DPO throughput and memory against TRL, on the same pairs in one run.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.dpo_throughput --peer trl

Sides (float32, the same batches of 8 pairs, AdamW, gradient clipping, linear decay):

    raylign           the trainer's own update on cached reference log-probabilities
    trl               DPOTrainer's defaults: reference forward in every step, gradient checkpointing
    trl_precomputed   precompute_ref_log_probs=True
    trl_tuned         precomputed and no gradient checkpointing: the fastest DPOTrainer gets here

Repeats are interleaved and the median of the per-round ratios is reported. "all_in" adds what each side spends on
reference log-probabilities before training, for one epoch; "cpu_ratio" compares processor seconds of the updates, for
machines that do other things meanwhile. Peak memory is measured in a fresh process per side: the
highest resident set minus the resident set after loading one copy of the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import statistics
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from raylign.models.loading import load_policy, resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.dpo_sides import Pair, Timing

PEERS = {
    "trl": {"precompute": False, "gradient_checkpointing": True},
    "trl_precomputed": {"precompute": True, "gradient_checkpointing": True},
    "trl_tuned": {"precompute": True, "gradient_checkpointing": False},
}
TARGETS = {"trl": 3.0, "trl_precomputed": 2.0}


def sides() -> dict[str, Callable[[str, list[Pair]], Timing]]:
    from tests.benchmarks.dpo_sides import run_raylign, run_trl

    return {"raylign": run_raylign} | {name: partial(run_trl, **options) for name, options in PEERS.items()}


def measure_speed(model_dir: str, pairs: list[Pair], repeats: int) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {name: [] for name in sides()}
    for repeat in range(repeats):
        for name, run in sides().items():
            timing = run(model_dir, pairs)
            timings[name].append(timing)
            print(
                f"repeat {repeat}  {name:16s} {timing.pairs_per_s:7.2f} pairs/s   "
                f"reference {timing.reference_s:6.2f} s   loss {timing.loss:.5f}",
                flush=True,
            )
    return timings


def summarize(timings: dict[str, list[Timing]], num_pairs: int) -> dict[str, dict[str, float]]:
    """Median rate of each side and median over rounds of raylign's advantage."""
    ours = timings["raylign"]
    summary: dict[str, dict[str, float]] = {}
    for name, theirs in timings.items():
        summary[name] = {
            "pairs_per_s": statistics.median(t.pairs_per_s for t in theirs),
            "reference_s": max(t.reference_s for t in theirs),
            "ratio": statistics.median(a.pairs_per_s / b.pairs_per_s for a, b in zip(ours, theirs, strict=True)),
            "cpu_ratio": statistics.median(b.cpu_s / a.cpu_s for a, b in zip(ours, theirs, strict=True)),
            "all_in_ratio": statistics.median(
                all_in_s(b, num_pairs) / all_in_s(a, num_pairs) for a, b in zip(ours, theirs, strict=True)
            ),
        }
    return summary


def all_in_s(timing: Timing, num_pairs: int) -> float:
    """Seconds of one epoch over `num_pairs`, references included."""
    return timing.reference_s + num_pairs / timing.pairs_per_s


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak MiB above the loaded model, each side in its own process."""
    peaks = {}
    for name in sides():
        command = [sys.executable, "-m", "tests.benchmarks.dpo_throughput", "--memory-of", name]
        command += ["--model", arguments.model, "--pairs", str(arguments.pairs)]
        command += ["--data", arguments.data] if arguments.data else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
        print(f"memory  {name:16s} {peaks[name]:7.0f} MiB above the loaded model", flush=True)
    return peaks


def memory_of(name: str, arguments: argparse.Namespace) -> None:
    """Run one side and print its peak; everything that both need is loaded before the baseline is taken."""
    import trl  # noqa: F401  both sides carry the same imports
    from trl import DPOTrainer  # noqa: F401

    from tests.benchmarks.dpo_sides import load_pairs

    pairs = load_pairs(arguments.model, arguments.data, arguments.pairs)
    model = load_policy(arguments.model, dtype="float32")
    del model
    # The imports alone peak above a training step, so the high-water mark is set back to the present first (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    baseline = _peak_mib()
    sides()[name](arguments.model, pairs)
    print(json.dumps({"peak_mib": _peak_mib() - baseline}))


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--model", default="embedded", help="directory, or 'embedded'")
    parser.add_argument("--data", help="jsonl(.gz) of prompt, chosen, rejected message lists; default: embedded")
    parser.add_argument("--pairs", type=int, default=96, help="pairs of one repeat, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--memory-of", choices=list(sides()), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = resolve_model(arguments.model)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments)
        return
    from tests.benchmarks.dpo_sides import load_pairs

    if arguments.json:
        sys.stdout = sys.stderr
    pairs = load_pairs(arguments.model, arguments.data, arguments.pairs)
    lengths = [len(p.tokens.prompt_ids) for p in pairs]
    print(
        f"{len(pairs)} pairs, {statistics.mean(lengths):.0f} prompt tokens and "
        f"{statistics.mean(p.tokens.num_tokens for p in pairs):.0f} shared tokens on average, "
        f"{torch.get_num_threads()} threads"
    )
    summary = summarize(measure_speed(arguments.model, pairs, arguments.repeats), len(pairs))
    for name, peak in measure_memory(arguments).items():
        summary[name]["peak_mib"] = peak
    for name, target in TARGETS.items():
        print(
            f"{name}: {summary[name]['ratio']:.2f}x in pairs/s (target {target}x), "
            f"{summary[name]['all_in_ratio']:.2f}x with references, "
            f"{summary['raylign']['peak_mib'] / summary[name]['peak_mib']:.2f} of its peak memory"
        )
    result = {
        "figure": "dpo_pairs_per_s_over_trl_defaults",
        "ratio": round(summary["trl"]["ratio"], 3),
        "sides": {name: {k: round(v, 3) for k, v in values.items()} for name, values in summary.items()},
        "num_pairs": len(pairs),
        "num_threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "versions": {n: importlib.metadata.version(n) for n in ("trl", "transformers", "torch")},
    }
    sys.stdout = sys.__stdout__
    print(json.dumps(result))


if __name__ == "__main__":
    main()
