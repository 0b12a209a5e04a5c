r"""Rewards of tokens by approximate variational inverse reinforcement learning (AVA): its terms and their weights.

A token's reward has the posterior \(N(\mu_t, \sigma_t^2)\), read from the state after the token, with prior N(0, 1);
its value \(q_t\) is read from the state before it. The temporal-difference error \(q_t - \mathrm{discount}\,q_{t+1}\)
is what the reward explains. The posterior is one Gaussian per token, no joint law over tokens.

Responses are ragged: tokens lie flat, `sequence_N` names the response of each, tokens of one response are consecutive
and in order. Of pairs, responses 0 to B - 1 are chosen and B to 2B - 1 rejected, as in a packed batch. The prompt is
context only and has no tokens here.

`raylign.losses.ava` puts the terms together.

Shape letters: N response tokens, M responses, B pairs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch.nn import functional as F

from raylign.errors import ConfigError, ShapeError
from raylign.losses.advantages import check_alike, is_last
from raylign.losses.gaussian_reward import gaussian_nll
from raylign.losses.logprobs import segment_sum

Terminal = Literal["zero", "drop"]
Negative = Literal["unlikelihood", "raw", "none"]
Contrast = Literal["log_sigmoid", "sigmoid"]
Score = Literal["last", "sum", "mean"]

TD_STD_FLOOR = 1e-2  # values that start out equal (a fresh q head) have errors of no spread, which must not be blown up


def gaussian_log_density(value: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""\(\log N(x; \mu, \sigma^2)\).

    Args:
        value: x. Shape (N,).
        mu: shape (N,).
        sigma: above 0. Shape (N,).

    Returns:
        Shape (N,), nats; gradients in all three.

    Raises:
        ShapeError: the three differ in shape.
    """
    check_alike(value=value, mu=mu, sigma=sigma)
    return -gaussian_nll(mu, sigma, value) - math.log(2 * math.pi) / 2


def td_errors(
    q_N: torch.Tensor, sequence_N: torch.Tensor, *, discount: float, terminal: Terminal
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""How much of each token's value the next one does not take over.

    Definition: \(\delta_t = q_t - \mathrm{discount}\,q_{t+1}\), both with gradient. The value after the last token is 0
    ("zero"), or the last token has no error ("drop"; its reward then has no TD term).

    With discount 1 and "zero" the errors of a response add up to its first value, so that rewards that fit them closely
    say nothing in sum; a discount below 1 leaves (1 - discount) times the later values.

    Args:
        q_N: value of each token. Shape (N,).
        sequence_N: response of each token. Shape (N,), int64.
        discount: in [0, 1].
        terminal: what follows the last token.

    Returns:
        Errors, 0 where there is none, and which tokens have one. Shapes (N,), the second bool.

    Raises:
        ShapeError: the two differ in shape, or the tokens of a response are not consecutive.
        ConfigError: another terminal.

    Source: Chan and van der Schaar (2021), arXiv:2102.06483, Eq. 5 without discount, "drop" in its released code;
    arXiv:2411.09341.
    """
    check_alike(q=q_N, sequence=sequence_N)
    _check_choice("terminal", terminal, ("zero", "drop"))
    is_last_N = is_last(sequence_N)
    delta_N = q_N - discount * torch.where(is_last_N, 0, q_N.roll(-1))
    if terminal == "zero":
        return delta_N, torch.ones_like(is_last_N)
    return torch.where(is_last_N, 0, delta_N), ~is_last_N


@dataclasses.dataclass(frozen=True, slots=True)
class TdScale:
    """Running deviation of TD errors; its fields are all there is to save.

    The prior of a reward is N(0, 1), so errors are divided by it. A step uses the scale of the steps before it, which
    every worker knows without waiting and which does not depend on how a batch is cut into micro-batches.

    Attributes:
        count: errors seen, older ones discounted.
        total: their sum.
        squares: sum of their squares.
    """

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def updated(self, *, count: float, total: float, squares: float, decay: float = 0.99) -> TdScale:
        """The scale after another batch.

        Args:
            count: errors of the batch over all workers and micro-batches: `td_moments`, added up.
            total: their sum.
            squares: sum of their squares.
            decay: what the weight of earlier batches shrinks by.

        Returns:
            The new state; weights of all batches add up to 1 at any time, so the first ones are not biased.
        """
        return TdScale(
            count=decay * self.count + count,
            total=decay * self.total + total,
            squares=decay * self.squares + squares,
        )

    @property
    def std(self) -> float:
        """What errors are divided by: their deviation, at least `TD_STD_FLOOR`; 1 before the first batch."""
        if self.count <= 0:
            return 1.0
        mean = self.total / self.count
        return max(math.sqrt(max(self.squares / self.count - mean * mean, 0.0)), TD_STD_FLOOR)


def td_moments(delta_N: torch.Tensor, has_td_N: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of TD errors, to be added up over workers for `TdScale.updated`.

    Args:
        delta_N: of `td_errors`, before scaling. Shape (N,).
        has_td_N: of `td_errors`. Shape (N,), bool.

    Returns:
        Shape (3,), float64, without gradient.
    """
    delta_N = torch.where(has_td_N, delta_N.detach().double(), 0)
    return torch.stack([has_td_N.sum().double(), delta_N.sum(), delta_N.square().sum()])


def unlikelihood(q_N: torch.Tensor) -> torch.Tensor:
    r"""Log-probability of not choosing a token: \(\log(1 - e^q)\).

    At most 0, so that a policy gains nothing more once a token is unlikely, where -q would grow without bound. From
    both sides of \(-\log 2\) computed without cancellation; q is held below 0 by one unit of rounding, where the
    gradient vanishes.

    Args:
        q_N: log-probabilities, at most 0. Shape (N,).

    Returns:
        Shape (N,), nats, at most 0.

    Source: Welleck et al. (2020), arXiv:1908.04319, Eq. 4; for AVA-p a choice of this project.
    """
    q_N = q_N.clamp(max=-torch.finfo(q_N.dtype).eps)
    is_likely = q_N > -math.log(2)
    # Each branch sees only its own arguments: the other one's infinite slope would turn the gradient into nan.
    likely = torch.log(-torch.expm1(torch.where(is_likely, q_N, -1.0)))
    return torch.where(is_likely, likely, torch.log1p(-torch.exp(torch.where(is_likely, -1.0, q_N))))


def negative_term(q_N: torch.Tensor, *, form: Negative, likelihood_weight: float) -> torch.Tensor:
    r"""What a rejected token adds to the objective.

    Definition: `unlikelihood` of q, or "raw" \(-\mathrm{likelihood\_weight}\,q_t\) as printed, which is unbounded
    above, or 0.

    Args:
        q_N: of rejected tokens. Shape (N,).
        form: which.
        likelihood_weight: of the raw form.

    Returns:
        Shape (N,), nats.

    Raises:
        ConfigError: another form.

    Source: arXiv:2411.09341, its contrastive bound; per token form reconstructed.
    """
    _check_choice("negative", form, ("unlikelihood", "raw", "none"))
    if form == "unlikelihood":
        return unlikelihood(q_N)
    return -likelihood_weight * q_N if form == "raw" else torch.zeros_like(q_N)


def sequence_score(mu_N: torch.Tensor, sequence_N: torch.Tensor, num_responses: int, *, rule: Score) -> torch.Tensor:
    r"""Reward of each response from those of its tokens: of its last token, their sum, or their mean.

    Args:
        mu_N: reward of each token. Shape (N,).
        sequence_N: response of each token, in [0, num_responses). Shape (N,), int64.
        num_responses: M.
        rule: "last", "sum" or "mean".

    Returns:
        Reward units, with gradient. Shape (M,).

    Raises:
        ShapeError: shapes differ, tokens of a response are not consecutive, or a response has none.
        ConfigError: another rule.
    """
    total_M, length_M = _pooled(mu_N, sequence_N, num_responses, rule)
    return total_M / length_M if rule == "mean" else total_M


def sequence_sigma(sigma_N: torch.Tensor, sequence_N: torch.Tensor, num_responses: int, *, rule: Score) -> torch.Tensor:
    r"""Standard deviation of `sequence_score` were the rewards of tokens independent, which nothing ensures.

    Definition: \(\sigma_{last}\), \(\sqrt{\sum_t\sigma_t^2}\), or that over the length.

    Args:
        sigma_N: standard deviation of each token's reward. Shape (N,).
        sequence_N: as for `sequence_score`.
        num_responses: M.
        rule: "last", "sum" or "mean".

    Returns:
        Reward units, with gradient. Shape (M,).

    Raises:
        ShapeError: as for `sequence_score`.
        ConfigError: another rule.
    """
    variance_M, length_M = _pooled(sigma_N.square(), sequence_N, num_responses, rule)
    return variance_M.sqrt() / length_M if rule == "mean" else variance_M.sqrt()


def _pooled(
    values_N: torch.Tensor, sequence_N: torch.Tensor, num_responses: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the tokens that the rule reads, and their number, both (M,)."""
    check_alike(values=values_N, sequence=sequence_N)
    _check_choice("score", rule, ("last", "sum", "mean"))
    is_last_N = is_last(sequence_N)
    if int(is_last_N.sum()) != num_responses:
        raise ShapeError(f"{int(is_last_N.sum())} of {num_responses} responses have tokens; every response needs one")
    if rule == "last":
        values_N, sequence_N = values_N[is_last_N], sequence_N[is_last_N]
    ones_N = torch.ones_like(values_N)
    return segment_sum(values_N, sequence_N, num_responses), segment_sum(ones_N, sequence_N, num_responses)


def contrastive_return(chosen_score: torch.Tensor, rejected_score: torch.Tensor, *, form: Contrast) -> torch.Tensor:
    r"""Contrastive expected return of each pair (to be maximised).

    Definition: \(\log\sigma(m)\), the negative of `bradley_terry`, or \(\sigma(m)\) as printed, m = chosen - rejected.
    Slopes at m = -6, 0, 6 are .9975, .5, .0025 and .0025, .25, .0025: the printed form ignores badly ranked pairs.

    Args:
        chosen_score: `sequence_score` of the chosen responses. Shape (B,).
        rejected_score: likewise. Shape (B,).
        form: which.

    Returns:
        Shape (B,).

    Raises:
        ShapeError: the two differ in shape.
        ConfigError: another form.

    Source: arXiv:2411.09341, its contrastive expected return.
    """
    check_alike(chosen_score=chosen_score, rejected_score=rejected_score)
    _check_choice("cer", form, ("log_sigmoid", "sigmoid"))
    margin = chosen_score - rejected_score
    return F.logsigmoid(margin) if form == "log_sigmoid" else torch.sigmoid(margin)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} must be one of {', '.join(choices)} (config section ava or token_reward)")
