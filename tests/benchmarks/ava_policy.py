"""Policies that maximise a reward of tokens, or one of whole responses, compared at equal KL from the reference.

    python -m tests.benchmarks.ava_policy --output runs/ava-policy --seeds 0 1

Every arm maximises a fitted reward by the same policy gradient on the same prompts; the embedded judge prices what it
sampled, round by round, and nothing else is compared: rewards of different arms have different units. What an arm
shows at a KL is interpolated between its rounds and averaged over seeds. Differences are to the first arm, paired:
prompts are resampled, the same of a round in every arm. The largest KL of the table is what all trainings reached.
Needs vLLM. Finished fits and trainings are kept: the same command goes on where it was killed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from raylign.config import load_config
from raylign.models.loading import resolve_model
from raylign.runtime.phases import digest, versions
from raylign.runtime.round_judge import judge_rounds
from raylign.runtime.run_phases import open_phases
from raylign.training.rounds import RoundStore

ARMS: dict[str, list[str]] = {
    "token_bt, last, at the end": ["reward.kind=token_bt"],
    "ava_p, last, at the end": ["reward.kind=ava_p"],
    "ava_p, sum, at the end": ["reward.kind=ava_p", "token_reward.score=sum"],
    "ava_p, own tokens": ["reward.kind=ava_p", "token_reward.score=sum", "policy_gradient.credit=token"],
}
REWARD_OF = {"ava_p, own tokens": "ava_p, sum, at the end"}  # the same fit
COMMON = [
    "reward.num_heads=1",
    "reward.folds=1",
    "train.method=policy_gradient",
    "train.learning_rate=1e-4",
    "train.batch_size=8",
    "policy_gradient.beta=0.01",
    "online.prompts_per_round=32",
    "online.num_samples=4",
]
MEASURES = ("unsafe", "cost", "tokens")
NUM_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Rounds:
    """What one training sampled.

    Attributes:
        prompts: R of P, to pair arms by.
        kl: (R,) of each round from the reference, nats; grows.
        means: of each measure (R, P), a prompt's mean over its responses.
    """

    prompts: list[list[tuple[int, ...]]]
    kl: np.ndarray
    means: dict[str, np.ndarray]

    def at(self, kl: float, measure: str, drawn: np.ndarray | slice) -> float:
        """A measure at a KL, between the rounds around it; `drawn` chooses prompts."""
        return float(np.interp(kl, self.kl, self.means[measure][:, drawn].mean(1)))


def slug(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "_")


def train(arm: str, seed: int, storage: Path, overrides: Sequence[str]) -> Rounds:
    """One training, and what the judge says of its rounds."""
    config = load_config(
        overrides=[*COMMON, *ARMS[arm], *overrides],
        values={
            "run": {"name": f"{slug(arm)}-seed{seed}", "storage": str(storage), "resume": True, "seed": seed},
        },
    )
    fit_arm = REWARD_OF.get(arm, arm)
    fit = load_config(
        overrides=[*COMMON, *ARMS[fit_arm], *overrides],
        values={"run": {"name": f"{slug(fit_arm)}-reward", "storage": str(storage), "resume": True, "seed": 0}},
    )
    model = resolve_model(config.policy.model)
    shared, phases = open_phases(fit, model), open_phases(config, model)
    ingest, facts = shared.ingest()
    features, features_digest = shared.features(ingest, facts["fingerprint"])
    reward, reward_facts = shared.reward(features, features_digest)
    key = digest([features_digest, reward_facts])
    checkpoint, _ = phases.train_online(ingest, facts["fingerprint"], reward, key)
    outcomes = judge_rounds(phases, checkpoint)
    store = RoundStore(phases.run.directory / "train" / "rounds")
    tokens, prompts = [], []
    for index in range(len(outcomes)):
        round_ = store.read(index)
        lengths = np.array([len(item.rollout.response_ids) for item in round_.scored])
        tokens.append([lengths[rows].mean() for rows in round_.by_prompt])
        prompts.append([tuple(round_.scored[rows[0]].rollout.prompt_ids) for rows in round_.by_prompt])
    return Rounds(
        prompts=prompts,
        kl=np.maximum.accumulate([one.kl for one in outcomes]),
        means={
            "unsafe": np.stack([(one.gold < 0).mean(1) for one in outcomes]),
            "cost": np.stack([-one.gold.mean(1) for one in outcomes]),
            "tokens": np.array(tokens),
        },
    )


def interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def at_equal_kl(trainings: dict[str, list[Rounds]], kl: float) -> dict[str, dict[str, list[float]]]:
    """Mean and interval of every measure of every arm at a KL, and of its difference to the first arm."""
    first = next(iter(trainings))
    for arm, seeds in trainings.items():
        if any(one.prompts != other.prompts for one, other in zip(seeds, trainings[first], strict=True)):
            raise RuntimeError(f"{arm!r} and {first!r} sampled for other prompts, nothing can be paired")
    num_prompts = trainings[first][0].means["unsafe"].shape[1]
    generator = np.random.default_rng(0)
    draws = [
        [generator.integers(num_prompts, size=num_prompts) for _ in trainings[first]] for _ in range(NUM_RESAMPLES)
    ]

    def of(arm: str, measure: str, draw: Sequence[np.ndarray | slice]) -> float:
        return float(np.mean([one.at(kl, measure, d) for one, d in zip(trainings[arm], draw, strict=True)]))

    found: dict[str, dict[str, list[float]]] = {}
    everyone = [slice(None)] * len(trainings[first])
    for arm in trainings:
        found[arm] = {}
        for measure in MEASURES:
            sampled = np.array([of(arm, measure, draw) for draw in draws])
            base = np.array([of(first, measure, draw) for draw in draws])
            mean, base_mean = of(arm, measure, everyone), of(first, measure, everyone)
            found[arm][measure] = [mean, *interval(sampled), mean - base_mean, *interval(sampled - base)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ava-policy"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=["online.num_rounds=8"], dest="overrides", help="section.key=value")
    arguments = parser.parse_args()
    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    storage = arguments.output.absolute()
    trainings = {
        arm: [train(arm, seed, storage, arguments.overrides) for seed in arguments.seeds] for arm in arguments.arms
    }
    for arm, seeds in trainings.items():
        for seed, one in zip(arguments.seeds, seeds, strict=True):
            shown = [f"{kl:.2f}/{tokens:.0f}" for kl, tokens in zip(one.kl, one.means["tokens"].mean(1), strict=True)]
            print(f"{arm}, seed {seed}: KL/tokens of each round {' '.join(shown)}")
    highest = min(one.kl[-1] for seeds in trainings.values() for one in seeds)
    report = {}
    for kl in (0.25 * highest, 0.5 * highest, highest):
        report[f"{kl:.2f}"] = at_equal_kl(trainings, kl)
        print(f"\nat {kl:.2f} nats\n| reward | unsafe responses | against the first | cost (logits) | tokens |")
        print("|---|---|---|---|---|")
        for arm, measures in report[f"{kl:.2f}"].items():
            unsafe, cost, tokens = (measures[name] for name in MEASURES)
            shown = [
                f"{100 * unsafe[0]:.1f} % [{100 * unsafe[1]:.1f}, {100 * unsafe[2]:.1f}]",
                f"{100 * unsafe[3]:+.1f} [{100 * unsafe[4]:.1f}, {100 * unsafe[5]:.1f}]",
                f"{cost[0]:.2f} [{cost[1]:.2f}, {cost[2]:.2f}]",
                f"{tokens[0]:.1f}",
            ]
            print(f"| {arm} | {' | '.join(shown)} |")
    print(json.dumps({"settings": [*COMMON, *arguments.overrides], "kl": report, **versions()}))


if __name__ == "__main__":
    main()
