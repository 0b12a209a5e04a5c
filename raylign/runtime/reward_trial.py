"""One fit of one reward model to partly reversed pairs, and everything that a calibration asks of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.config import RunConfig
from raylign.evaluation.calibration import FitOutcome
from raylign.rewards.confidence import fit_temperature
from raylign.rewards.fit import predict
from raylign.rewards.gaussian import GaussianHeads, share_at_floor
from raylign.rewards.member_facts import anchor_spread
from raylign.rewards.posterior import RewardPosterior
from raylign.runtime.candidates_job import Candidates
from raylign.runtime.pair_states import PairStates, reversed_splits
from raylign.runtime.reward_job import Held, head_fitter
from raylign.runtime.robust import robust_rewards

_FACTS = "facts"


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What all fits read; arrays, which processes of one node share in Ray's object store without a copy.

    Attributes:
        train: chosen and rejected states of the pairs fitted to, each (N, L, D).
        groups: prompt of each.
        valid: of the pairs that choose epochs and temperatures.
        test: of the pairs judged on.
        candidates: answers that rewards choose among.
    """

    train: tuple[np.ndarray, np.ndarray]
    groups: Sequence[str]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    candidates: Candidates

    @staticmethod
    def of(states: PairStates, candidates: Candidates) -> FitData:
        """The splits of cached states."""
        (*train, groups), (*valid, _), (*test, _) = (states.part(split) for split in ("train", "valid", "test"))
        return FitData(
            train=(train[0].numpy(), train[1].numpy()),
            groups=groups,
            valid=(valid[0].numpy(), valid[1].numpy()),
            test=(test[0].numpy(), test[1].numpy()),
            candidates=candidates,
        )

    def fit_bytes(self, kind: str) -> int:
        """Memory of one fit of a reward kind at its peak, about.

        The reversed pairs and the rows that the fit takes of them; of laplace also four matrices of all its weights,
        and the deviations of the test answers and candidates.
        """
        states = 2 * sum(side.nbytes for side in self.train)
        if kind != "laplace":
            return states
        num_weights = math.prod(self.train[0].shape[1:])
        num_answers = 2 * len(self.test[0]) + len(self.candidates.states)
        return states + 8 * 4 * num_weights**2 + 4 * num_answers * num_weights


def measure_fit(data: FitData, configs: Mapping[str, RunConfig], flip: float) -> FitOutcome:
    """Fit one reward model to partly reversed pairs, and apply it to the test pairs and the candidates.

    Args:
        data: states of pairs and of candidates.
        configs: name -> configuration of rewards that differ in their rule over the members alone; the seed is that of
            the flips too.
        flip: share of training and validation pairs that are reversed; the same pairs for every reward model.
    """
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # arrays of the object store are read-only, which nobody here minds
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        outcome = _measure(data, configs, flip)
    return dataclasses.replace(outcome, warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)))


def _measure(data: FitData, configs: Mapping[str, RunConfig], flip: float) -> FitOutcome:
    config = next(iter(configs.values()))
    seed, candidates = config.run.seed, data.candidates
    train, valid = reversed_splits(
        (torch.from_numpy(data.train[0]), torch.from_numpy(data.train[1])),
        (torch.from_numpy(data.valid[0]), torch.from_numpy(data.valid[1])),
        share=flip,
        seed=seed,
    )
    start = time.monotonic()
    head = head_fitter(train, data.groups, valid, config)(torch.arange(len(data.groups)))
    seconds = time.monotonic() - start
    test = Held.of(head, *map(torch.from_numpy, data.test))
    of_candidates = predict(head, torch.from_numpy(candidates.states))
    answers = torch.cat([test.chosen.head_rewards, test.rejected.head_rewards])
    scales = [side.head_scales for side in (test.chosen, test.rejected) if side.head_scales is not None]
    margin, num_prompts = test.margin, len(candidates.gold)
    return FitOutcome(
        num_heads=head.num_heads,
        margin_mean=margin.mean.double().numpy(),
        margin_variance=margin.variance.double().numpy(),
        temperature=fit_temperature(Held.of(head, *valid).margin),
        proxies={
            name: robust_rewards(of_candidates, config.robust).double().numpy().reshape(candidates.gold.shape)
            for name, config in configs.items()
        },
        familiar=_signals(predict(head, torch.from_numpy(candidates.familiar)), num_prompts),
        shuffled=_signals(predict(head, torch.from_numpy(candidates.shuffled)), num_prompts),
        floor_share=float(share_at_floor(torch.cat(scales), head.sigma_floor).mean())
        if scales and isinstance(head, GaussianHeads)
        else None,
        anchor_spread=anchor_spread(answers) if head.num_heads > 1 else None,
        seconds=seconds,
    )


def _signals(belief: RewardPosterior, num_prompts: int) -> dict[str, np.ndarray]:
    """What may tell unfamiliar input, higher the stranger, each (P, n)."""
    found = {}
    if belief.num_heads > 1:
        found["disagreement"] = belief.disagreement
    if belief.head_scales is not None:
        found["least sigma"] = belief.head_scales.amin(-1)
    return {name: values.double().numpy().reshape(num_prompts, -1) for name, values in found.items()}


def save_outcome(outcome: FitOutcome, path: Path) -> None:
    """Write an outcome so that a reader sees the whole file or none."""
    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for field in dataclasses.fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        elif isinstance(value, Mapping):
            facts[field.name] = list(value)
            arrays |= {f"{field.name}.{index}": array for index, array in enumerate(value.values())}
        else:
            facts[field.name] = value
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, allow_pickle=False, **{**arrays, _FACTS: np.array(json.dumps(facts))})
    temporary.replace(path)


def load_outcome(path: Path) -> FitOutcome:
    """Read what `save_outcome` wrote."""
    with np.load(path) as arrays:
        content: dict[str, Any] = json.loads(str(arrays[_FACTS]))
        for name in ("proxies", "familiar", "shuffled"):
            content[name] = {key: arrays[f"{name}.{index}"] for index, key in enumerate(content[name])}
        for name in ("margin_mean", "margin_variance"):
            content[name] = arrays[name]
    return FitOutcome(**{**content, "warnings": tuple(content["warnings"])})
