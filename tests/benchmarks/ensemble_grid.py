"""Cost of a grid of ensemble sizes and seeds in one vectorised pass, against a fit per grid point.

    python -m tests.benchmarks.ensemble_grid

States are made up, of the size of the embedded data (1,319 pairs, 6 layers of width 192); what a fit costs depends on
their shapes alone. Both sides run in one process, in turn, `--repeats` times; the table shows medians and ratios.
That members of one pass equal members of a smaller fit, up to rounding, is checked first on three of one seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from raylign.rewards.fit import fit_hybrid, member_weights, predict
from raylign.runtime.phases import versions

SIZES = (1, 2, 3, 5, 8, 10)
NUM_PAIRS, NUM_VALID, NUM_LAYERS, WIDTH = 1319, 145, 6, 192


def made_up(num_pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected states apart along one direction, float16 as on disk."""
    generator = torch.Generator().manual_seed(seed)
    direction = 0.3 * torch.randn(NUM_LAYERS, WIDTH, generator=torch.Generator().manual_seed(99)) / WIDTH**0.5
    noise = torch.randn(2, num_pairs, NUM_LAYERS, WIDTH, generator=generator)
    return (noise[0] + direction).half(), (noise[1] - direction).half()


def fit(weights: torch.Tensor, seed: int = 0) -> Any:
    """One pass over members whose data are the columns of `weights`."""
    chosen, rejected = made_up(NUM_PAIRS, 0)
    valid_chosen, valid_rejected = made_up(NUM_VALID, 1)
    return fit_hybrid(
        chosen,
        rejected,
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        epochs=10,
        batch_size=32,
        learning_rate=1e-4,
        weight_decay=0.01,
        ridge=0.1,
        bce_weight=1.0,
        margin_target=1.0,
        train_probes=True,
        seed=seed,
        num_heads=weights.shape[1],
        weights=weights,
    ).head


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    largest = max(SIZES)
    weights = member_weights(NUM_PAIRS, largest * arguments.seeds, head_data="bootstrap", seed=0)
    assert weights is not None
    own = [weights[:, seed * largest : (seed + 1) * largest] for seed in range(arguments.seeds)]

    chosen, _ = made_up(NUM_PAIRS, 0)
    together = predict(fit(own[0]), chosen).head_rewards[:, :3]
    torch.testing.assert_close(together, predict(fit(own[0][:, :3]), chosen).head_rewards, rtol=1e-3, atol=1e-3)

    sides = {
        "grid in one pass": lambda: fit(weights),
        "largest ensemble, one seed": lambda: fit(own[0]),
        "one member": lambda: fit(own[0][:, :1]),
        "a fit per grid point": lambda: [fit(part[:, :size]) for part in own for size in SIZES],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, work in sides.items():
            seconds[name].append(timed(work))
    grid = seconds["grid in one pass"]
    print(f"sizes {SIZES}, {arguments.seeds} seeds, {arguments.repeats} repeats, {arguments.threads} thread(s)\n")
    print("| side | seconds, median | over the grid in one pass, median of ratios [least, most] |")
    print("|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, grid, strict=True)]
        print(
            f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] |"
        )
    print(json.dumps(versions()))


if __name__ == "__main__":
    main()
