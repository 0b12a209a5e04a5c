"""Rewards of tokens against a world whose true ones are known: AVA, Bradley-Terry, and credit from a sequence's score.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ava_toy

Eight seeds, each a world of its own (`tests/token_world.py`), 500 steps, about a minute a row on one core. Prints, as
markdown, means over seeds with standard errors in brackets: accuracy by three scores, correlation of the rewards of
tokens with gold, their stated deviation, and gold of the policy's samples, by objective; the same over td_weight;
correlation of every kind of credit of tokens with gold; differences paired by seed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from tests.token_world import Objective, Outcome, make_worlds, run

OBJECTIVES = {
    "BT on the last reward": Objective(kind="bt_last"),
    "BT on summed rewards": Objective(kind="bt_sum"),
    "BT with attention": Objective(kind="bt_attention"),
    "AVA-p, printed CER": Objective(),
    "AVA-p, log CER": Objective(cer="log_sigmoid"),
    "discount 1": Objective(discount=1.0),
    "discount 0": Objective(discount=0.0),
    "td_weight .1": Objective(td_weight=0.1),
    "td_weight .9": Objective(td_weight=0.9),
    "td_weight 1": Objective(td_weight=1.0),
    "td_weight 2": Objective(td_weight=2.0),
    "without negative": Objective(negative="none"),
    "raw negative": Objective(negative="raw"),
    "irl_weight 0": Objective(irl_weight=0.0),
    "without CER": Objective(cer_weight=0.0),
    "AVA-d": Objective(kind="ava_d"),
}
TD_WEIGHTS = {
    ".1": "td_weight .1",
    ".5": "AVA-p, printed CER",
    ".9": "td_weight .9",
    "1": "td_weight 1",
    "2": "td_weight 2",
}
CREDITS = {
    "summed BT, own": ("BT on summed rewards", "correlation"),
    "BT on the last, own": ("BT on the last reward", "correlation"),
    "RED: differences of the last reward's BT": ("BT on the last reward", "differences"),
    "ABC: attention of BT": ("BT with attention", "attention"),
    "AVA-p (log CER), own": ("AVA-p, log CER", "correlation"),
    "RED: differences of AVA-p (log CER)": ("AVA-p, log CER", "differences"),
}
DIFFERENCES = (
    ("AVA-p, log CER", "BT on the last reward", "last"),
    ("AVA-p, printed CER", "BT on the last reward", "last"),
    ("AVA-p, log CER", "BT on summed rewards", "summed"),
    ("AVA-p, printed CER", "td_weight 2", "last"),
    ("BT on summed rewards", "AVA-p, log CER", "correlation"),
)


def with_error(values: torch.Tensor, digits: int = 3) -> str:
    error = values.std().item() / len(values) ** 0.5
    return f"{values.mean().item():.{digits}f} ({error:.{digits}f})"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def print_tables(outcomes: dict[str, Outcome]) -> None:
    fields = ("last", "summed", "log_prob", "correlation", "sigma", "gain")
    head = ("objective", "last", "sum", "log pi", "corr(mu, gold)", "mean sigma", "gain")
    rows = [(name, *(with_error(getattr(out, field)) for field in fields)) for name, out in outcomes.items()]
    print(table(head, rows), "\n")
    fields = ("last", "summed", "sigma")
    rows = [(c, *(with_error(getattr(outcomes[name], field)) for field in fields)) for c, name in TD_WEIGHTS.items()]
    print(table(("td_weight", "last", "sum", "mean sigma"), rows), "\n")
    rows = [(name, with_error(getattr(outcomes[run_], field))) for name, (run_, field) in CREDITS.items()]
    print(table(("credit of a token", "correlation with gold"), rows), "\n")
    rows = [
        (f"{field}: {a} - {b}", with_error(getattr(outcomes[a], field) - getattr(outcomes[b], field)))
        for a, b, field in DIFFERENCES
    ]
    print(table(("difference, paired by seed", "mean"), rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=500)
    options = parser.parse_args()
    worlds = make_worlds(range(options.num_seeds), options.num_steps)
    started, outcomes = time.perf_counter(), {}
    for name, objective in OBJECTIVES.items():
        outcomes[name] = run(worlds, objective)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print_tables(outcomes)
    facts = {
        "num_seeds": options.num_seeds,
        "num_steps": options.num_steps,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "total_s": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
