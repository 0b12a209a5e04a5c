r"""A synthetic world where the true reward is known: what do rules over members select as best-of-n gets harder?

Inputs are standard normal vectors. The gold reward is smooth and falls far from the origin, where no preference pair
has been. Small reward models learn it from noisy pairs; candidates include a few far inputs, which members overrate and
disagree about. All members of all seeds train in one batched pass. A seed is a world of its own, with its gold, pairs,
models and candidates, and depends on no other seed.

Rewards of a member are standardised on its training inputs, without which their minimum means nothing.
Shape letters: S seeds, N inputs, B pairs, D dimensions, M members, R rules, K sizes n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from raylign.evaluation.best_of_n import selection_weights
from raylign.evaluation.metrics import auroc
from raylign.rewards import aggregate

Floats: TypeAlias = NDArray[np.float64]
Rule: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Rewards of members (n, M) to the reward (n,) that is maximised."""

_CHUNK = 4096  # inputs of a seed whose hidden layer is held in memory at a time
_WIDTH, _GAIN = 32, 0.7  # of the tanh network inside the gold reward


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldSetup:
    """One synthetic world.

    Attributes:
        num_dims: D.
        num_pairs: B, preference pairs that all members of a seed learn from.
        quality: inverse temperature of the labels, per standard deviation of gold.
        flip_rate: share of labels that is then inverted.
        num_members: M, which differ by their start.
        hidden: widths of a member's ReLU layers; none is a linear reward.
        num_steps: full-batch updates.
        learning_rate: AdamW step.
        weight_decay: AdamW weight decay.
        decline: fall of gold per squared distance from the origin, in its standard deviations.
        pool_size: N, candidates that best-of-n chooses from.
        outlier_share: of candidates that are far.
        outlier_scale: distance of those, in that of the others.
    """

    num_dims: int = 12
    num_pairs: int = 300
    quality: float = 5.0
    flip_rate: float = 0.25
    num_members: int = 5
    hidden: tuple[int, ...] = (64,)
    num_steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    decline: float = 0.06
    pool_size: int = 32_768
    outlier_share: float = 0.02
    outlier_scale: float = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldReward:
    r"""True rewards of S seeds, mean 0 and variance 1 on standard normal inputs, up to sampling error.

    Definition: \(g(x) = a \cdot \tanh(W^\top x + b)\), standardised and scaled so that \(g(x) - c (|x|^2 - D)\) has
    variance 1, c the decline.
    """

    weight_SDH: torch.Tensor
    bias_SH: torch.Tensor
    output_SH: torch.Tensor
    shift_S: torch.Tensor
    scale_S: torch.Tensor
    decline: float

    def __call__(self, inputs_SND: torch.Tensor) -> torch.Tensor:
        """Gold reward of each input. Shape (S, N)."""
        hidden_SNH = torch.tanh(inputs_SND @ self.weight_SDH + self.bias_SH[:, None])
        smooth_SN = (hidden_SNH @ self.output_SH[..., None]).squeeze(-1)
        distance_SN = inputs_SND.square().sum(-1) - inputs_SND.shape[-1]
        return (smooth_SN - self.shift_S[:, None]) / self.scale_S[:, None] - self.decline * distance_SN


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """M reward models of each of S seeds.

    Attributes:
        weights: one (S, M, in, out) per layer.
        biases: one (S, M, 1, out) per layer.
        shift_SM: mean reward on the training inputs.
        scale_SM: standard deviation there.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    shift_SM: torch.Tensor
    scale_SM: torch.Tensor

    @torch.no_grad()
    def __call__(self, inputs_SND: torch.Tensor) -> torch.Tensor:
        """Standardised reward of each input by each member of its seed. Shape (S, N, M)."""
        parts = [_raw_rewards(part, self.weights, self.biases) for part in torch.split(inputs_SND, _CHUNK, dim=1)]
        rewards_SMN = (torch.cat(parts, dim=2) - self.shift_SM[..., None]) / self.scale_SM[..., None]
        return rewards_SMN.transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldBench:
    """Trained members of S seeds with their gold reward, and candidates to choose from.

    Attributes:
        setup: that made them.
        seeds: S numbers.
        gold: true reward.
        members: reward models.
        pool_rewards: (S, N, M) of the candidates.
        pool_gold: (S, N) of the candidates.
    """

    setup: GoldSetup
    seeds: tuple[int, ...]
    gold: GoldReward
    members: Members
    pool_rewards: torch.Tensor
    pool_gold: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCurves:
    """What each rule selects as n grows.

    Attributes:
        rules: R names.
        sizes: K values of n.
        gold: (R, S, K) mean gold reward of the selected candidate, standard deviations of gold.
        proxy: (R, S, K) its mean reward by the rule, standard deviations of a member's reward on its training inputs.
    """

    rules: tuple[str, ...]
    sizes: tuple[int, ...]
    gold: Floats
    proxy: Floats

    def mean_and_error(self, rule: str) -> tuple[Floats, Floats]:
        """Mean gold over seeds and its standard error. Shapes (K,)."""
        return _mean_and_error(self.gold[self.rules.index(rule)])

    def difference(self, rule: str, other: str) -> tuple[Floats, Floats]:
        """Mean of gold(rule) - gold(other) over seeds, each paired with itself, and its standard error. Shapes (K,)."""
        return _mean_and_error(self.gold[self.rules.index(rule)] - self.gold[self.rules.index(other)])


def label_pairs(
    first_gold: torch.Tensor,
    second_gold: torch.Tensor,
    *,
    quality: float,
    flip_rate: float,
    generator: torch.Generator,
) -> torch.Tensor:
    r"""Noisy labels: \(P(\mathrm{first}) = \sigma(q (g_1 - g_2))\), then inverted with the flip rate.

    Args:
        first_gold: any shape.
        second_gold: the same shape.
        quality: q; 0 is a coin.
        flip_rate: in [0, 1].
        generator: source of the labels.

    Returns:
        True where the first is labelled as preferred. The same shape.

    Source: arXiv:2502.04357, Section 4 (annotation quality); the flips as in arXiv:2310.02743.
    """
    is_first = torch.rand(first_gold.shape, generator=generator) < torch.sigmoid(quality * (first_gold - second_gold))
    return is_first ^ (torch.rand(first_gold.shape, generator=generator) < flip_rate)


def make_gold(setup: GoldSetup, generators: Sequence[torch.Generator]) -> GoldReward:
    """One gold reward per generator."""
    draws = [
        (
            torch.randn(setup.num_dims, _WIDTH, generator=generator) * _GAIN / math.sqrt(setup.num_dims),
            torch.randn(_WIDTH, generator=generator) / 2,
            torch.randn(_WIDTH, generator=generator),
            torch.randn(4096, setup.num_dims, generator=generator),
        )
        for generator in generators
    ]
    weight, bias, output, inputs = (torch.stack(parts) for parts in zip(*draws, strict=True))
    ones = torch.ones(len(draws))
    smooth = GoldReward(weight_SDH=weight, bias_SH=bias, output_SH=output, shift_S=0 * ones, scale_S=ones, decline=0.0)(
        inputs
    )
    # the decline alone has variance 2 D c^2 on normal inputs
    left = math.sqrt(1 - 2 * setup.num_dims * setup.decline**2)
    return GoldReward(
        weight_SDH=weight,
        bias_SH=bias,
        output_SH=output,
        shift_S=smooth.mean(-1),
        scale_S=smooth.std(-1) / left,
        decline=setup.decline,
    )


def train_members(
    first_SBD: torch.Tensor,
    second_SBD: torch.Tensor,
    is_first_SB: torch.Tensor,
    setup: GoldSetup,
    generators: Sequence[torch.Generator],
) -> Members:
    """Bradley-Terry members of all seeds in one batched pass, full batches, without early stopping.

    Seeds and members share neither weights nor the optimiser's state, so that each is trained as if alone.

    Args:
        first_SBD: inputs of the pairs. Shape (S, B, D).
        second_SBD: what they are compared with. Shape (S, B, D).
        is_first_SB: True where the first is labelled as preferred. Shape (S, B).
        setup: of members and training.
        generators: one per seed, for the starts of its members.
    """
    sizes = (first_SBD.shape[-1], *setup.hidden, 1)
    weights, biases = [], []
    for layer, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
        gain = 1.0 if layer == len(setup.hidden) else 2.0  # He (2015) before a ReLU
        start = [torch.randn(setup.num_members, num_in, num_out, generator=generator) for generator in generators]
        weights.append((torch.stack(start) * math.sqrt(gain / num_in)).requires_grad_())
        biases.append(torch.zeros(len(generators), setup.num_members, 1, num_out, requires_grad=True))
    inputs, sign_SB = torch.cat([first_SBD, second_SBD], dim=1), torch.where(is_first_SB, 1.0, -1.0)
    optimizer = torch.optim.AdamW([*weights, *biases], lr=setup.learning_rate, weight_decay=setup.weight_decay)
    for _ in range(setup.num_steps):
        first_SMB, second_SMB = _raw_rewards(inputs, weights, biases).chunk(2, dim=2)
        loss_SMB = F.softplus(-sign_SB[:, None] * (first_SMB - second_SMB))
        optimizer.zero_grad()
        torch.autograd.backward(loss_SMB.mean(-1).sum())
        optimizer.step()
    fitted = [tuple(part.detach() for part in parts) for parts in (weights, biases)]
    rewards_SMN = _raw_rewards(inputs, *fitted)
    return Members(
        weights=fitted[0], biases=fitted[1], shift_SM=rewards_SMN.mean(-1), scale_SM=rewards_SMN.std(-1, correction=0)
    )


def build_bench(setup: GoldSetup, seeds: Sequence[int]) -> GoldBench:
    """Gold, pairs, trained members and candidates of every seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    gold = make_gold(setup, generators)
    first, second = (_normal_inputs(setup.num_pairs, setup.num_dims, generators) for _ in range(2))
    labels = [
        label_pairs(one, other, quality=setup.quality, flip_rate=setup.flip_rate, generator=generator)
        for one, other, generator in zip(gold(first), gold(second), generators, strict=True)
    ]
    members = train_members(first, second, torch.stack(labels), setup, generators)
    pool = _normal_inputs(setup.pool_size, setup.num_dims, generators)
    is_far = torch.stack([torch.rand(setup.pool_size, generator=g) < setup.outlier_share for g in generators])
    pool = torch.where(is_far[..., None], setup.outlier_scale * pool, pool)
    return GoldBench(
        setup=setup,
        seeds=tuple(seeds),
        gold=gold,
        members=members,
        pool_rewards=members(pool),
        pool_gold=gold(pool),
    )


def bench_rules(w_nominals: Sequence[float]) -> dict[str, Rule]:
    """The rules that are compared: one member, penalties, and BRME mixtures with the first member as the nominal one.

    Args:
        w_nominals: weights of the nominal member against the minimum.
    """

    def mixture(w_nominal: float) -> Rule:
        # these members state no sigma: a fixed one makes the first the most confident
        return lambda mu: aggregate.brme(mu, (torch.arange(mu.shape[1]) > 0).to(mu).expand_as(mu), w_nominal=w_nominal)

    return {
        "single": lambda mu: mu[:, 0],
        "mean": aggregate.mean,
        "min": aggregate.minimum,
        "uwo .5": lambda mu: aggregate.uwo(mu, uncertainty_weight=0.5),
        "uwo 2": lambda mu: aggregate.uwo(mu, uncertainty_weight=2.0),
        **{f"brme {w_nominal:g}": mixture(w_nominal) for w_nominal in w_nominals},
    }


def rule_curves(bench: GoldBench, rules: Mapping[str, Rule], sizes: Sequence[int]) -> RuleCurves:
    """Gold and proxy of the best of n by each rule, and by gold itself as the rule `oracle`.

    Args:
        bench: its candidates are chosen from.
        rules: by name.
        sizes: values of n, each at most the size of the pool.

    Raises:
        DataError: a size outside 1..N.
    """
    gold_SN = bench.pool_gold.double().numpy()
    scores = {name: _by_seed(rule, bench.pool_rewards) for name, rule in rules.items()} | {"oracle": bench.pool_gold}
    gold, proxy = [], []
    for score in (score.double().numpy() for score in scores.values()):
        weights_KSN = [selection_weights(score, n) for n in sizes]
        gold.append(np.stack([(weights * gold_SN).sum(-1) for weights in weights_KSN], axis=-1))
        proxy.append(np.stack([(weights * score).sum(-1) for weights in weights_KSN], axis=-1))
    return RuleCurves(rules=tuple(scores), sizes=tuple(sizes), gold=np.stack(gold), proxy=np.stack(proxy))


def rule_accuracy(bench: GoldBench, rules: Mapping[str, Rule], *, num_pairs: int = 2000) -> dict[str, Floats]:
    """Share of fresh normal pairs that a rule orders as gold does, one number per seed. Shape (S,)."""
    first, second = _fresh_inputs(bench, 2 * num_pairs).chunk(2, dim=1)
    is_first_SB = bench.gold(first) > bench.gold(second)
    rewards = bench.members(first), bench.members(second)
    accuracy = {}
    for name, rule in rules.items():
        first_SB, second_SB = (_by_seed(rule, part) for part in rewards)
        accuracy[name] = ((first_SB > second_SB) == is_first_SB).double().mean(-1).numpy()
    return accuracy


def disagreement_auroc(bench: GoldBench, *, scale: float = 2.0, num_inputs: int = 2000) -> Floats:
    """How well the members' standard deviation (1/M) tells inputs of another scale from normal ones. Shape (S,)."""
    inputs = _fresh_inputs(bench, num_inputs)
    familiar_SN, far_SN = (bench.members(part).std(-1, correction=0).numpy() for part in (inputs, scale * inputs))
    return np.array([auroc(far, familiar) for far, familiar in zip(far_SN, familiar_SN, strict=True)])


def _raw_rewards(
    inputs_SND: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Reward by each member before it is standardised. Shape (S, M, N)."""
    hidden = inputs_SND[:, None]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        hidden = torch.relu(hidden @ weight + bias)
    return (hidden @ weights[-1] + biases[-1]).squeeze(-1)


def _normal_inputs(num_inputs: int, num_dims: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.stack([torch.randn(num_inputs, num_dims, generator=generator) for generator in generators])


def _fresh_inputs(bench: GoldBench, num_inputs: int) -> torch.Tensor:
    """Normal inputs from a stream apart from the one that made the seed's pairs, the same whatever was trained."""
    streams = [int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) for seed in bench.seeds]
    generators = [torch.Generator().manual_seed(stream) for stream in streams]
    return _normal_inputs(num_inputs, bench.setup.num_dims, generators)


def _by_seed(rule: Rule, rewards_SNM: torch.Tensor) -> torch.Tensor:
    num_seeds, num_inputs, num_members = rewards_SNM.shape
    return rule(rewards_SNM.reshape(-1, num_members)).reshape(num_seeds, num_inputs)


def _mean_and_error(values_SK: Floats) -> tuple[Floats, Floats]:
    return values_SK.mean(axis=0), values_SK.std(axis=0, ddof=1) / math.sqrt(len(values_SK))
