"""Best-of-n against reward models in a world whose true reward is known: which rule over members holds out longest.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.overoptimisation --figures build/overoptimisation

Twelve seeds, each a world with its own gold reward, pairs, members and candidates (`raylign.evaluation.gold_bench`).
Best-of-n is exact over all subsets of a seed's candidates. Prints, as markdown: gold of the selected candidate in
standard deviations by n with standard errors over seeds; differences paired by seed; the same without far candidates;
accuracy of the rules and AUROC of disagreement by flip rate. The last line is JSON. Draws the over-optimisation curves
and gold by w_nominal; their bands are 95 % intervals of the mean over seeds, by Student's t.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from raylign.cost.compare import student_t
from raylign.evaluation.best_of_n import kl_bound
from raylign.evaluation.gold_bench import (
    GoldSetup,
    RuleCurves,
    bench_rules,
    build_bench,
    disagreement_auroc,
    rule_accuracy,
    rule_curves,
)
from raylign.report.plots import to_png
from raylign.report.reward_plots import OptimisationCurve, WeightSweep, gold_by_w_nominal, overoptimisation
from raylign.types import Interval

W_NOMINALS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TABLE_SIZES = (1, 16, 64, 256, 4096)
CURVE_SIZES = tuple(2**power for power in range(13))
FLIP_RATES = (0.0, 0.1, 0.25)
DRAWN_RULES = ("single", "mean", "min", "uwo 2", "brme 0.2", "brme 0.8")
DRAWN_SIZES = (16, 64, 256, 4096)
DIFFERENCES = (
    ("mean", "single"),
    ("min", "single"),
    ("min", "mean"),
    ("uwo .5", "mean"),
    ("uwo 2", "single"),
    ("uwo 2", "min"),
    ("brme 0.2", "single"),
    ("brme 0.2", "min"),
    ("brme 0.2", "brme 0.8"),
)


def with_error(mean: float, error: float) -> str:
    return f"{mean:.2f} ({error:.2f})"


def gold_table(curves: RuleCurves) -> list[str]:
    """Gold by rule and n, standard error in brackets."""
    columns = [curves.sizes.index(n) for n in TABLE_SIZES]
    lines = ["| rule | " + " | ".join(f"n = {n:,}" for n in TABLE_SIZES) + " |", "|---" * (len(columns) + 1) + "|"]
    for rule in curves.rules:
        mean, error = curves.mean_and_error(rule)
        lines.append(f"| {rule} | " + " | ".join(with_error(mean[k], error[k]) for k in columns) + " |")
    return lines


def difference_table(curves: RuleCurves) -> list[str]:
    """Differences in gold between rules, paired by seed, standard error in brackets."""
    columns = [curves.sizes.index(n) for n in TABLE_SIZES[1:]]
    lines = [
        "| difference | " + " | ".join(f"n = {n:,}" for n in TABLE_SIZES[1:]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for rule, other in DIFFERENCES:
        mean, error = curves.difference(rule, other)
        lines.append(f"| {rule} - {other} | " + " | ".join(with_error(mean[k], error[k]) for k in columns) + " |")
    return lines


def flip_table(setup: GoldSetup, seeds: Sequence[int]) -> list[str]:
    """Accuracy of each rule and AUROC of disagreement by flip rate, means over seeds."""
    rules = {name: rule for name, rule in bench_rules((0.2,)).items() if not name.startswith("uwo")}
    lines = [
        f"| labels flipped | {' | '.join(rules)} | AUROC of disagreement, inputs scaled by 2 |",
        "|---" * (len(rules) + 2) + "|",
    ]
    for flip_rate in FLIP_RATES:
        bench = build_bench(dataclasses.replace(setup, flip_rate=flip_rate, pool_size=1), seeds)
        accuracies = [*rule_accuracy(bench, rules).values(), disagreement_auroc(bench)]
        cells = [f"{values.mean():.3f} ({values.std(ddof=1) / len(values) ** 0.5:.3f})" for values in accuracies]
        lines.append(f"| {flip_rate:.0%} | " + " | ".join(cells) + " |")
    return lines


def over_seeds(values: np.ndarray) -> list[Interval]:
    """Means over seeds with their 95 % intervals, from (S, K)."""
    half = student_t(len(values) - 1) * values.std(axis=0, ddof=1) / len(values) ** 0.5
    return [
        Interval(mean=float(m), low=float(m - h), high=float(m + h), num_items=len(values))
        for m, h in zip(values.mean(axis=0), half, strict=True)
    ]


def draw(curves: RuleCurves, folder: Path) -> None:
    """Both figures as PNG."""
    num_seeds, unit = curves.gold.shape[1], "reward, standard deviations"
    drawn = [
        OptimisationCurve(
            name=rule,
            kl=[kl_bound(n) for n in curves.sizes],
            proxy=over_seeds(curves.proxy[curves.rules.index(rule)]),
            gold=over_seeds(curves.gold[curves.rules.index(rule)]),
        )
        for rule in DRAWN_RULES
    ]
    title = f"Best-of-n in a world of known gold, 25 % of labels flipped, {num_seeds} seeds"
    by_weight = [over_seeds(curves.gold[curves.rules.index(f"brme {w:g}")]) for w in W_NOMINALS]
    mean, _ = curves.mean_and_error("mean")
    sweeps = [
        WeightSweep(
            name=f"n = {n:,}",
            w_nominal=W_NOMINALS,
            gold=[gold[curves.sizes.index(n)] for gold in by_weight],
            reference=float(mean[curves.sizes.index(n)]),
        )
        for n in DRAWN_SIZES
    ]
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "overoptimisation": overoptimisation(
            drawn, title=title, kl_name="bound of best-of-n", unit=unit, sizes=curves.sizes
        ),
        "w_nominal": gold_by_w_nominal(sweeps, title=title, unit=f"gold {unit}"),
    }
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(to_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=12)
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    options = parser.parse_args()
    setup, seeds, rules = GoldSetup(), range(options.num_seeds), bench_rules(W_NOMINALS)
    started = time.perf_counter()
    bench = build_bench(setup, seeds)
    trained_s = time.perf_counter() - started
    curves = rule_curves(bench, rules, CURVE_SIZES)
    if options.figures is not None:
        draw(curves, options.figures)
    print("\n".join([*gold_table(curves), "", *difference_table(curves)]))
    near = rule_curves(build_bench(dataclasses.replace(setup, outlier_share=0.0), seeds), rules, TABLE_SIZES)
    print("\nWithout far candidates:\n\n" + "\n".join(gold_table(near)))
    print("\n" + "\n".join(flip_table(setup, seeds)))
    facts = {
        "setup": dataclasses.asdict(setup),
        "num_seeds": options.num_seeds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_and_score_s": round(trained_s, 1),
        "total_s": round(time.perf_counter() - started, 1),
        "kl_bound": {n: round(kl_bound(n), 3) for n in TABLE_SIZES},
        "highest_gold": {
            rule: {"n": curves.sizes[int(mean.argmax())], "gold": round(float(mean.max()), 3)}
            for rule, mean in ((rule, curves.mean_and_error(rule)[0]) for rule in curves.rules)
        },
        "gold": {rule: np.round(curves.mean_and_error(rule)[0], 3).tolist() for rule in curves.rules},
    }
    print("\n" + json.dumps(facts))


if __name__ == "__main__":
    main()
