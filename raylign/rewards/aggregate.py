r"""From the rewards that M members give a response to the one reward that is maximised.

Every rule over members is called `rule(mu, sigma, *, knobs)`, takes sigma or None, and gives one reward per response,
without gradient: a policy must not be able to move its reward model. What `heads_global` needs instead, one head for
the whole round, is `head_sums`, `worst_head_of_sums` and `global_rewards`.

Shape letters: n responses, M members (heads).
"""

from __future__ import annotations

from typing import Literal

import torch

from raylign.errors import ConfigError, ShapeError


def mean(mu: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over members.

    Args:
        mu: reward by each member. Shape (n, M).
        sigma: not read. Shape (n, M).

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.
    """
    mu, _ = check_members(mu, sigma)
    return mu.mean(-1)


def minimum(mu: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
    """Worst case over members (WCO), per response.

    Members need a common zero, which `raylign.rewards.member_facts.anchor_spread` looks for.

    Args:
        mu: shape (n, M).
        sigma: not read. Shape (n, M).

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.

    Source: Coste et al. (2023), arXiv:2310.02743.
    """
    mu, _ = check_members(mu, sigma)
    return mu.amin(-1)


def uwo(mu: torch.Tensor, sigma: torch.Tensor | None = None, *, uncertainty_weight: float) -> torch.Tensor:
    r"""Mean less a multiple of the members' variance.

    Definition: \(\bar r - w \frac1M \sum_i (r_i - \bar r)^2\): a variance with 1/M. The form with a standard deviation
    is `lcb`.

    Args:
        mu: shape (n, M).
        sigma: not read. Shape (n, M).
        uncertainty_weight: w, per reward unit.

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.

    Source: Coste et al. (2023), arXiv:2310.02743.
    """
    mu, _ = check_members(mu, sigma)
    return mu.mean(-1) - uncertainty_weight * _variance(mu)


def lcb(mu: torch.Tensor, sigma: torch.Tensor | None = None, *, k: float) -> torch.Tensor:
    """Mean less k standard deviations over members (1/M).

    Args:
        mu: shape (n, M).
        sigma: not read. Shape (n, M).
        k: number of standard deviations.

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.

    Source: Zhai et al. (2024), arXiv:2401.00243.
    """
    mu, _ = check_members(mu, sigma)
    return mu.mean(-1) - k * _variance(mu).sqrt()


def cvar(mu: torch.Tensor, sigma: torch.Tensor | None = None, *, level: float) -> torch.Tensor:
    """Mean of the lowest share of the members: 1 is the mean, 1/M and below the minimum.

    Definition: expected shortfall of the members' empirical distribution; when level x M is not whole, the member on
    the boundary counts with the fraction.

    Args:
        mu: shape (n, M).
        sigma: not read. Shape (n, M).
        level: share in (0, 1].

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.
        ConfigError: level outside (0, 1].

    Source: Rockafellar and Uryasev (2002), "Conditional value-at-risk for general loss distributions".
    """
    mu, _ = check_members(mu, sigma)
    if not 0 < level <= 1:
        raise ConfigError(f"level={level} must be in (0, 1] (config key robust.cvar_level)")
    num_counted = level * mu.shape[1]
    rank_M = torch.arange(mu.shape[1], dtype=torch.float64)
    weight_M = (num_counted - rank_M).clamp(0, 1) / min(num_counted, 1.0)
    weight_M = (weight_M / weight_M.sum()).to(mu)
    return (mu.sort(-1).values * weight_M).sum(-1)


def entropic(
    mu: torch.Tensor,
    sigma: torch.Tensor | None = None,
    *,
    b: float,
    form: Literal["empirical", "gaussian"] = "empirical",
) -> torch.Tensor:
    r"""One risk parameter from the minimum (b to 0) to the mean (b to infinity).

    Definition: \(-b \log \frac1M \sum_i e^{-r_i/b}\); `gaussian` is what it is for normal members with the variance
    (1/M) of these, \(\bar r - v/(2b)\), that is `uwo` of weight 1/(2b). The empirical form of few members is biased
    upward.

    Args:
        mu: shape (n, M).
        sigma: not read. Shape (n, M).
        b: risk temperature, reward units, above 0.
        form: empirical or gaussian.

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape.
        ConfigError: b not above 0, or another form.

    Source: arXiv:2606.09073.
    """
    mu, _ = check_members(mu, sigma)
    if b <= 0:
        raise ConfigError(f"b={b} must be > 0 (config key robust.entropic_b)")
    if form == "gaussian":
        return uwo(mu, uncertainty_weight=1 / (2 * b))
    if form != "empirical":
        raise ConfigError(f"form={form!r} must be 'empirical' or 'gaussian'")
    lowest_n = mu.amin(-1)
    # Relative to the lowest member nothing overflows, and expm1/log1p keep the digits that b log(1 + x/b) loses.
    return lowest_n - b * torch.log1p(torch.expm1((lowest_n[:, None] - mu) / b).mean(-1))


def brme(mu: torch.Tensor, sigma: torch.Tensor | None, *, w_nominal: float) -> torch.Tensor:
    r"""Mixture of the most confident head's mean and the minimum over heads, per response.

    Definition: \(w\,\mu_{i^*} + (1 - w)\min_i \mu_i\), \(i^* = \mathrm{argmin}_i\,\sigma_i\). w = 1 is the nominal
    reward and w = 0 `minimum`, both bitwise.

    Args:
        mu: means of the heads, on a common zero. Shape (n, M).
        sigma: standard deviations that the heads state. None only for w_nominal 0. Shape (n, M).
        w_nominal: w, weight of the nominal reward (not of the minimum), in [0, 1].

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), or sigma has another shape or is missing.
        ConfigError: w_nominal outside [0, 1].

    Source: arXiv:2409.15360; the equation is public only through summaries.
    """
    mu, sigma = check_members(mu, sigma)
    return _mix(mu, sigma, mu.amin(-1), w_nominal)


def nominal_head(sigma: torch.Tensor) -> torch.Tensor:
    """Most confident head of each response: least sigma, ties to the lowest index.

    Args:
        sigma: shape (n, M).

    Returns:
        Shape (n,), int64.

    Source: arXiv:2409.15360.
    """
    return sigma.argmin(-1)


def nominal_rewards(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean (not a sample) of each response's `nominal_head`.

    Args:
        mu: shape (n, M).
        sigma: shape (n, M).

    Returns:
        Shape (n,), reward units.
    """
    return mu.gather(-1, nominal_head(sigma)[:, None])[:, 0]


def head_sums(mu: torch.Tensor) -> torch.Tensor:
    """Sum of each head's rewards over responses, to be added up over workers.

    Args:
        mu: shape (n, M).

    Returns:
        Shape (M,), float64, in which sums of float32 rewards of like size are exact, so that no split into shards
        changes them.

    Raises:
        ShapeError: mu is not (n, M).
    """
    mu, _ = check_members(mu, None)
    return mu.double().sum(0)


def worst_head_of_sums(sums: torch.Tensor, count: int) -> int:
    """Head with the lowest mean reward, from what workers added up; ties to the lowest index.

    Args:
        sums: `head_sums` of all workers. Shape (M,).
        count: responses of all workers.

    Raises:
        ShapeError: sums is not (M,), or there are no responses.
    """
    if sums.dim() != 1 or not len(sums) or count < 1:
        raise ShapeError(f"sums {tuple(sums.shape)} of {count} responses must be (M,) over at least one response")
    return int((sums / count).argmin())


def worst_head(mu: torch.Tensor) -> int:
    r"""Head that is worst on average over the responses, the minimiser of `set_type=heads_global`.

    Definition: \(\mathrm{argmin}_j\,\overline{\mu_j}\), ties to the lowest index. The minimum is outside the
    expectation, so the reward is never below that of `minimum`.

    Args:
        mu: shape (n, M), n at least 1.

    Raises:
        ShapeError: mu is not (n, M) or has no rows.
    """
    return worst_head_of_sums(head_sums(mu), len(mu))


def global_rewards(mu: torch.Tensor, sigma: torch.Tensor | None, *, head: int, w_nominal: float = 0.0) -> torch.Tensor:
    r"""`brme` with one head for the whole round in the place of the minimum: \(w\,\mu_{i^*} + (1 - w)\mu_j\).

    Args:
        mu: shape (n, M).
        sigma: standard deviations that the heads state. None only for w_nominal 0. Shape (n, M).
        head: j, `worst_head` of the round.
        w_nominal: w, weight of the nominal reward, in [0, 1].

    Returns:
        Shape (n,), reward units.

    Raises:
        ShapeError: mu is not (n, M), sigma has another shape or is missing, or there is no such head.
        ConfigError: w_nominal outside [0, 1].
    """
    mu, sigma = check_members(mu, sigma)
    if not 0 <= head < mu.shape[1]:
        raise ShapeError(f"head={head} must be one of the {mu.shape[1]} members")
    return _mix(mu, sigma, mu[:, head], w_nominal)


def check_members(mu: torch.Tensor, sigma: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both without gradient.

    Args:
        mu: reward by each member. Shape (n, M).
        sigma: standard deviation that each member states, or None. Shape (n, M).

    Raises:
        ShapeError: mu is not (n, M) with M at least 1, or sigma has another shape.
    """
    if mu.dim() != 2 or mu.shape[1] < 1:
        raise ShapeError(f"mu {tuple(mu.shape)} must be (n, M) with at least one member")
    if sigma is None:
        return mu.detach(), None
    if sigma.shape != mu.shape:
        raise ShapeError(f"sigma {tuple(sigma.shape)} must be one per reward, {tuple(mu.shape)}")
    return mu.detach(), sigma.detach()


def _mix(mu: torch.Tensor, sigma: torch.Tensor | None, robust_n: torch.Tensor, w_nominal: float) -> torch.Tensor:
    if not 0 <= w_nominal <= 1:
        raise ConfigError(f"w_nominal={w_nominal} must be in [0, 1] (config key robust.w_nominal)")
    nominal_n = robust_n if w_nominal == 0 and sigma is None else nominal_rewards(mu, _stated(sigma))
    # lerp, unlike a sum of products, is exact at both ends and where both rewards are equal.
    return torch.lerp(robust_n, nominal_n, w_nominal)


def _variance(mu: torch.Tensor) -> torch.Tensor:
    """Over members, with 1/M; unlike Tensor.var, without a warning when there are no responses."""
    return (mu - mu.mean(-1, keepdim=True)).square().mean(-1)


def _stated(sigma: torch.Tensor | None) -> torch.Tensor:
    if sigma is None:
        raise ShapeError(
            "sigma=None must be (n, M) standard deviations: this rule needs members that state their own uncertainty "
            "(reward.kind=brme); for other members use min, lcb or cvar (config key robust.rule)"
        )
    return sigma
