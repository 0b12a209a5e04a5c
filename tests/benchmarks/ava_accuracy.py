"""Accuracy of rewards of tokens on held-out pairs: AVA, its ablations, and Bradley-Terry, by every score.

    python -m tests.benchmarks.ava_accuracy --output runs/ava-accuracy
    python -m tests.benchmarks.ava_accuracy --data embedded pairs_helpful.jsonl.gz --seeds 0 1 2 --max-train 2000

One member of each objective and seed, fine-tuned from the embedded model without Ray on one thread, judged on the test
pairs: by the reward of the last token, by the sum, and by log pi of its own policy. Differences to Bradley-Terry on the
last token are paired by test pair and pool the seeds, resampling prompts. Finished fits are kept: the same command goes
on where it was killed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylign.config import EMBEDDED, RunConfig, load_config
from raylign.data.canonical import apply_verdicts, canonicalize, row_hashes, to_table
from raylign.data.sources import list_files, read_lines
from raylign.data.splits import decide
from raylign.evaluation.metrics import bootstrap_mean
from raylign.models.loading import load_tokenizer, resolve_layout, resolve_model
from raylign.models.token_reward import read_pairs, response_scores
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.text_reward_job import FitTask, fit_group
from raylign.runtime.text_rewards import make_text_reward
from raylign.runtime.token_members import kind_facts

VARIANTS: dict[str, list[str]] = {
    "bt_last": ["reward.kind=token_bt"],
    "bt_sum": ["reward.kind=token_bt", "token_reward.score=sum"],
    "ava_p": ["reward.kind=ava_p"],
    "ava_p_no_negative": ["reward.kind=ava_p", "ava.negative=none"],
    "ava_p_no_irl": ["reward.kind=ava_p", "ava.irl_weight=0"],
    "ava_p_no_cer": ["reward.kind=ava_p", "ava.cer_weight=0"],
    "ava_p_irl_1": ["reward.kind=ava_p", "ava.irl_weight=1"],
    "ava_d": ["reward.kind=ava_d"],
}
BASELINE = ("bt_last", "last")
SCORES = ("last", "sum", "log_prob")


def read_table(path: str, config: RunConfig, model_path: str) -> pa.Table:
    """The pairs as ingest makes them, in one process."""
    tokenizer, data = load_tokenizer(model_path), config.data.model_copy(update={"path": path})
    tables = []
    for file in list_files(path):
        rows, _ = canonicalize(list(read_lines(file)), tokenizer, data, path=file)
        table = to_table(rows)
        verdicts = decide(
            row_hashes(table),
            valid_fraction=data.valid_fraction,
            test_fraction=data.test_fraction,
            max_pairs=None,
            seed=0,  # one split for all seeds
        )
        tables.append(apply_verdicts(table, verdicts.codes, path=file)[0])
    return pa.concat_tables(tables).sort_by([("prompt_key", "ascending"), ("row_id", "ascending")])


def split_of(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def fitted_scores(
    table: pa.Table, config: RunConfig, *, model_path: str, seed: int, directory: Path, max_train: int
) -> dict[str, Any]:
    """Margins of the test pairs by every score, and what the fit says of itself; read back if it is there."""
    file = directory / "scores.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    directory.mkdir(parents=True, exist_ok=True)
    task = FitTask(
        reward=config.reward,
        reward_model=config.reward_model,
        policy=config.policy,
        token_reward=config.token_reward,
        ava=config.ava,
        model_path=model_path,
        output_dir=directory,
        seed=seed,
        num_cpus=1,
        num_gpus=0,
    )
    started_s = time.monotonic()
    (record,) = fit_group((split_of(table, "train").slice(0, max_train), split_of(table, "valid")), task, [0])
    facts = {"kind": config.reward.kind, "names": task.names, "scale": None, "shift": None, **kind_facts(task)}
    (directory / "text_reward.json").write_text(json.dumps(facts), encoding="utf-8")
    reward: Any = make_text_reward(model_path, config.reward_model, directory=directory)
    outputs = read_pairs(
        reward.forward,
        pairs_from_table(split_of(table, "test")),
        layout=resolve_layout("auto", reward.forward.causal_lm.config),
        pad_token_id=0,
        batch_tokens=config.reward_model.batch_tokens,
    )
    scores = [score for score in SCORES if score != "log_prob" or outputs.log_likelihood is not None]
    found = {
        "margins": {score: _margins(response_scores(outputs, score)[0]) for score in scores},
        "record": {name: value for name, value in record.items() if name != "valid_rewards"},
        "seconds": time.monotonic() - started_s,
    }
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def _margins(scores_n: torch.Tensor) -> list[float]:
    chosen, rejected = scores_n.chunk(2)
    return (chosen - rejected).tolist()


def pooled(fits: Sequence[dict[str, Any]], score: str) -> np.ndarray:
    """Whether each test pair is ordered rightly, of one seed after the other."""
    return np.concatenate([np.array(fit["margins"][score]) > 0 for fit in fits]).astype(np.float64)


def interval(values: np.ndarray, prompts: Sequence[str]) -> list[float]:
    found = bootstrap_mean(values, num_samples=4000, generator=np.random.default_rng(0), groups=prompts)
    return [found.mean, found.low, found.high]


def summary(fits: dict[str, list[dict[str, Any]]], prompts: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each variant by each score, its differences to the baseline, and its sigma."""
    rows: dict[str, Any] = {}
    repeated = [*prompts] * len(fits[BASELINE[0]])
    baseline = pooled(fits[BASELINE[0]], BASELINE[1])
    for variant, of_seeds in fits.items():
        for score in of_seeds[0]["margins"]:
            correct = pooled(of_seeds, score)
            rows[f"{variant}/{score}"] = {
                "accuracy": interval(correct, repeated),
                "by_seed": [float(part.mean()) for part in np.split(correct, len(of_seeds))],
                "difference": interval(correct - baseline, repeated),
            }
        sigmas = [fit["record"]["sigma"] for fit in of_seeds if "sigma" in fit["record"]]
        if sigmas:
            rows[f"{variant}/sigma"] = {name: float(np.mean([s[name] for s in sigmas])) for name in sigmas[0]}
        rows[f"{variant}/seconds"] = [fit["seconds"] for fit in of_seeds]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=[EMBEDDED], help="files of pairs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--max-train", type=int, default=2000, help="training pairs used, the first by prompt hash")
    parser.add_argument("--output", type=Path, default=Path("runs/ava-accuracy"))
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = {name: load_config(None, [*VARIANTS[name], *arguments.overrides]) for name in arguments.variants}
    model_path = resolve_model(EMBEDDED)
    tables = {path: read_table(path, next(iter(configs.values())), model_path) for path in arguments.data}
    fits: dict[str, dict[str, list[dict[str, Any]]]] = {path: {name: [] for name in configs} for path in tables}
    for seed in arguments.seeds:
        for path, table in tables.items():
            for name, config in configs.items():
                directory = arguments.output / Path(path).name / f"{name}-seed{seed}"
                fit = fitted_scores(
                    table, config, model_path=model_path, seed=seed, directory=directory, max_train=arguments.max_train
                )
                fits[path][name].append(fit)
                shown = {score: round(float((np.array(m) > 0).mean()), 4) for score, m in fit["margins"].items()}
                print(f"{Path(path).name} {name} seed {seed}: {shown} in {fit['seconds']:.0f} s", flush=True)
    results = {}
    for path, table in tables.items():
        test = split_of(table, "test")
        results[Path(path).name] = summary(fits[path], test["prompt_key"].to_pylist())
        for name, row in results[Path(path).name].items():
            if "difference" in row:
                accuracy, difference = row["accuracy"], row["difference"]
                print(
                    f"{Path(path).name} {name:28s} {accuracy[0]:.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}], "
                    f"{difference[0]:+.3f} [{difference[1]:+.3f}, {difference[2]:+.3f}] to {'/'.join(BASELINE)}"
                )
    print(json.dumps({"figure": "ava_accuracy", "seeds": arguments.seeds, "table": results}))


if __name__ == "__main__":
    main()
