"""A world whose true rewards of tokens are known, and small policies with rewards of tokens trained in it.

Eight tokens, responses of eight, no prompt. The gold reward of a token depends on it and the one before; a response has
their sum. Pairs are drawn uniformly and labelled by Bradley-Terry on gold. A GRU gives the policy from the state before
a token and the reward's mean and deviation from the state after it. All seeds train at once, as one stack of models;
each has its own world and its own draws, whatever the others are.

Shape letters: S seeds, B responses, T tokens of a response, V vocabulary, W width, P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from raylign.losses.ava import AvaCounts, ava_shares, ava_sums
from raylign.losses.reward import bradley_terry
from raylign.losses.token_credit import attention_credit, score_differences
from raylign.losses.token_q import policy_q
from raylign.losses.variational import sequence_score

VOCABULARY, LENGTH, WIDTH = 8, 8, 32
GOLD_STD, SIGMA_FLOOR = 0.6, 1e-2
NUM_PAIRS, NUM_TEST_PAIRS, NUM_SAMPLES = 1500, 2000, 2000
GATES = ("reset", "update", "candidate")
BATCH_PAIRS, LEARNING_RATE, WEIGHT_DECAY = 192, 3e-3, 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a stack of models is trained on; defaults are AVA-p as printed, but for unlikelihood.

    Attributes:
        kind: AVA, or Bradley-Terry on the last or on summed rewards; "bt_attention" scores by a layer of attention from
            the last state.
    """

    kind: Literal["ava_p", "ava_d", "bt_last", "bt_sum", "bt_attention"] = "ava_p"
    discount: float = 0.9
    td_weight: float = 0.5
    irl_weight: float = 1.0
    cer_weight: float = 1.0
    cer: Literal["sigmoid", "log_sigmoid"] = "sigmoid"
    negative: Literal["unlikelihood", "raw", "none"] = "unlikelihood"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worlds:
    """S worlds with their draws, all but `table` shared by every objective.

    Attributes:
        table: gold reward by the token before (V: none) and the token, (S, V + 1, V).
        chosen, rejected: training pairs, (S, P, T).
        test: pairs, (S, P', 2, T), unordered.
        parameters: models at the start.
        order: pairs of each step's batch, (S, steps, B).
        gumbel: noise that samples are drawn with, (S, B', T, V).
    """

    table: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    test: torch.Tensor
    parameters: dict[str, torch.Tensor]
    order: torch.Tensor
    gumbel: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Per seed, each (S,): accuracy on the gold order of test pairs by three scores, credit, spread, and the policy.

    Attributes:
        last, summed, log_prob: accuracy by last reward, summed rewards, and log-probability.
        correlation: of the mean reward of tokens with their gold reward, over all tokens of the test pairs.
        differences: the same for the changes of the score from token to token.
        attention: the same for the score's share by attention; None without a layer of attention.
        sigma: mean deviation.
        gain: gold of the policy's samples above that of the untrained policy's, with the same noise.
    """

    last: torch.Tensor
    summed: torch.Tensor
    log_prob: torch.Tensor
    correlation: torch.Tensor
    differences: torch.Tensor
    attention: torch.Tensor | None
    sigma: torch.Tensor
    gain: torch.Tensor


def make_worlds(seeds: Sequence[int], num_steps: int = 500) -> Worlds:
    """Draw everything, seed by seed."""
    drawn = [_draw(torch.Generator().manual_seed(seed), num_steps) for seed in seeds]

    def stack(name: str) -> torch.Tensor:
        return torch.stack([parts[name] for parts in drawn])

    names = [name for name in drawn[0] if "." in name]
    return Worlds(
        parameters={name: stack(name) for name in names},
        **{field.name: stack(field.name) for field in dataclasses.fields(Worlds) if field.name != "parameters"},
    )


def gold_rewards(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gold reward of each token, (S, B, T), of tokens (S, B, T) in tables (S, V + 1, V)."""
    before = F.pad(tokens[..., :-1], (1, 0), value=VOCABULARY)
    flat = (before * VOCABULARY + tokens).flatten(1)
    return table.flatten(1).gather(1, flat).view(tokens.shape)


def train(worlds: Worlds, objective: Objective) -> dict[str, torch.Tensor]:
    """The parameters after all steps."""
    parameters = {name: value.clone().requires_grad_() for name, value in worlds.parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(worlds.order.shape[1]):
        index = worlds.order[:, step, :, None].expand(-1, -1, LENGTH)
        tokens = torch.stack([worlds.chosen.gather(1, index), worlds.rejected.gather(1, index)])  # (2, S, B, T)
        optimizer.zero_grad()
        _loss(parameters, tokens, objective).backward()
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


@torch.no_grad()
def evaluate(worlds: Worlds, parameters: dict[str, torch.Tensor], objective: Objective) -> Outcome:
    """What the trained models say of test pairs, and what their policies sample."""
    tokens = worlds.test.flatten(1, 2)
    gold = gold_rewards(worlds.table, tokens)
    states = _states(parameters, tokens)
    mu, sigma = _rewards(parameters, states[:, 1:])
    attention, score = None, mu[..., -1]
    if objective.kind == "bt_attention":
        score, weights = _attended(parameters, states)
        attention = _correlation(_credit(attention_credit, weights, score), gold)
    empty = _rewards(parameters, states[:, :1])[0][..., 0]
    differences = _credit(score_differences, mu, empty)
    log_prob = _q(parameters, states, tokens).sum(-1)
    start = _sampled_gold(worlds, worlds.parameters)
    return Outcome(
        last=_accuracy(score, gold),
        summed=_accuracy(mu.sum(-1), gold),
        log_prob=_accuracy(log_prob, gold),
        correlation=_correlation(mu, gold),
        differences=_correlation(differences, gold),
        attention=attention,
        sigma=sigma.mean((1, 2)),
        gain=_sampled_gold(worlds, parameters) - start,
    )


def run(worlds: Worlds, objective: Objective) -> Outcome:
    """Train and evaluate."""
    return evaluate(worlds, train(worlds, objective), objective)


def _draw(generator: torch.Generator, num_steps: int) -> dict[str, torch.Tensor]:
    def uniform(*shape: int) -> torch.Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / WIDTH**0.5

    table = GOLD_STD * torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
    pairs = torch.randint(VOCABULARY, (NUM_PAIRS, 2, LENGTH), generator=generator)
    gold = gold_rewards(table[None], pairs.flatten(0, 1)[None]).sum(-1).view(NUM_PAIRS, 2)
    is_first = torch.rand(NUM_PAIRS, generator=generator) < torch.sigmoid(gold[:, 0] - gold[:, 1])
    epochs = -(-num_steps * BATCH_PAIRS // NUM_PAIRS)
    order = torch.cat([torch.randperm(NUM_PAIRS, generator=generator) for _ in range(epochs)])
    noise = torch.rand(NUM_SAMPLES, LENGTH, VOCABULARY, generator=generator)
    return {
        "table": table,
        "chosen": torch.where(is_first[:, None], pairs[:, 0], pairs[:, 1]),
        "rejected": torch.where(is_first[:, None], pairs[:, 1], pairs[:, 0]),
        "test": torch.randint(VOCABULARY, (NUM_TEST_PAIRS, 2, LENGTH), generator=generator),
        "order": order[: num_steps * BATCH_PAIRS].view(num_steps, BATCH_PAIRS),
        "gumbel": -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7))),
        "embedding.weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
        "start.state": uniform(1, WIDTH),
        **{f"{gate}_{part}.weight": uniform(WIDTH, WIDTH) for gate in GATES for part in ("input", "state")},
        **{f"{gate}_{part}.bias": uniform(1, WIDTH) for gate in GATES for part in ("input", "state")},
        "policy.weight": uniform(WIDTH, VOCABULARY),
        "policy.bias": uniform(1, VOCABULARY),
        "reward.weight": uniform(WIDTH, 2),
        "reward.bias": uniform(1, 2),
        "query.weight": uniform(WIDTH, WIDTH),
        "key.weight": uniform(WIDTH, WIDTH),
        "value.weight": uniform(WIDTH, WIDTH),
    }


def _loss(parameters: dict[str, torch.Tensor], tokens: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Sum over seeds of the loss of chosen and rejected responses, tokens (2, S, B, T)."""
    _, num_seeds, num_pairs, _ = tokens.shape
    num_chosen = num_seeds * num_pairs
    kinds = tokens[:1] if objective.kind == "ava_d" else tokens
    # models along the first axis, chosen before rejected along the second
    states = _states(parameters, kinds.transpose(0, 1).flatten(1, 2))
    if objective.kind == "bt_attention":
        chosen, rejected = _attended(parameters, states)[0].split(num_pairs, dim=1)
        return bradley_terry(chosen - rejected).mean(1).sum()
    mu, sigma = _rewards(parameters, states[:, 1:])
    response = torch.arange(len(kinds) * num_chosen).view(len(kinds), num_seeds, num_pairs).transpose(0, 1).flatten(1)
    sequence_N = response[..., None].expand(-1, -1, LENGTH).flatten()
    if objective.kind in ("bt_last", "bt_sum"):
        rule = "last" if objective.kind == "bt_last" else "sum"
        chosen, rejected = sequence_score(mu.flatten(), sequence_N, 2 * num_chosen, rule=rule).split(num_chosen)
        return num_seeds * bradley_terry(chosen - rejected).mean()
    sums = ava_sums(
        _q(parameters, states, kinds.transpose(0, 1).flatten(1, 2)).flatten(),
        mu.flatten(),
        sigma.flatten(),
        sequence_N,
        num_chosen,
        has_rejected=objective.kind == "ava_p",
        discount=objective.discount,
        terminal="zero",
        likelihood_weight=1.0,
        negative=objective.negative,
        cer=objective.cer,
    )
    counts = AvaCounts(
        chosen_tokens=num_chosen * LENGTH,
        rejected_tokens=(len(kinds) - 1) * num_chosen * LENGTH,
        num_responses=num_chosen,
    )
    shares = ava_shares(
        sums,
        counts,
        terminal="zero",
        irl_weight=objective.irl_weight,
        td_weight=objective.td_weight,
        cer_weight=objective.cer_weight,
    )
    return num_seeds * shares.loss


def _states(parameters: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """States before the first token and after each, (S, T + 1, B, W) so that no step copies what it reads."""
    state = parameters["start.state"].expand(-1, tokens.shape[1], -1)
    one_hot = F.one_hot(tokens.transpose(1, 2), VOCABULARY).flatten(1, 2).to(state.dtype)
    given = [torch.bmm(one_hot, table).unflatten(1, (LENGTH, -1)).unbind(1) for table in _token_inputs(parameters)]
    states = [state]
    for step in zip(*given, strict=True):
        states.append(_next_state(parameters, step, states[-1]))
    return torch.stack(states, dim=1)


def _token_inputs(parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each token gives to each gate, (S, V, W)."""
    return [_linear(parameters, f"{gate}_input", parameters["embedding.weight"]) for gate in GATES]


def _next_state(
    parameters: dict[str, torch.Tensor], given: Sequence[torch.Tensor], state: torch.Tensor
) -> torch.Tensor:
    """One step of a GRU (Cho et al., 2014, as torch.nn.GRU has it) from what the token gives to each gate."""
    recurrent = [_linear(parameters, f"{gate}_state", state) for gate in GATES]
    reset, update = torch.sigmoid(given[0] + recurrent[0]), torch.sigmoid(given[1] + recurrent[1])
    return torch.lerp(torch.tanh(given[2] + reset * recurrent[2]), state, update)


def _linear(parameters: dict[str, torch.Tensor], name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Each model's own linear map of (S, B, W)."""
    return torch.baddbmm(parameters[f"{name}.bias"], inputs, parameters[f"{name}.weight"])


def _rewards(parameters: dict[str, torch.Tensor], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the reward read from each of the states (S, T, B, W), (S, B, T)."""
    read = _linear(parameters, "reward", states.flatten(1, 2)).unflatten(1, states.shape[1:3]).transpose(1, 2)
    return read[..., 0], F.softplus(read[..., 1]) + SIGMA_FLOOR


def _attended(parameters: dict[str, torch.Tensor], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score of each response from its last state and what that attends to, (S, B), and the attention, (S, B, T)."""
    read, last = states[:, 1:], states[:, -1]
    query = torch.bmm(last, parameters["query.weight"])
    keys, values = (torch.bmm(read.flatten(1, 2), parameters[f"{n}.weight"]).view(read.shape) for n in ("key", "value"))
    weights = ((keys * query[:, None]).sum(-1) / WIDTH**0.5).softmax(1)
    pooled = last + (weights[..., None] * values).sum(1)
    return _rewards(parameters, pooled[:, None])[0][..., 0], weights.transpose(1, 2)


def _q(parameters: dict[str, torch.Tensor], states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token from the state before it, (S, B, T)."""
    logits = _linear(parameters, "policy", states[:, :-1].flatten(1, 2)).flatten(0, 1)
    q = policy_q(logits, tokens.transpose(1, 2).flatten(), q_from="logits", logit_scale=1.0)
    return q.view(tokens.transpose(1, 2).shape).transpose(1, 2)


def _credit(credit, per_token: torch.Tensor, per_response: torch.Tensor) -> torch.Tensor:
    """A credit of tokens (S, B, T) from what there is per token and per response."""
    num_responses = per_response.numel()
    sequence_N = torch.arange(num_responses).repeat_interleave(LENGTH)
    return credit(per_token.flatten(), per_response.flatten(), sequence_N).view(per_token.shape)


def _accuracy(score: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Share of test pairs that a score orders as gold does, from (S, 2 P') and (S, 2 P', T)."""
    pairs = score.unflatten(1, (-1, 2)), gold.sum(-1).unflatten(1, (-1, 2))
    return ((pairs[0][..., 0] > pairs[0][..., 1]) == (pairs[1][..., 0] > pairs[1][..., 1])).float().mean(1)


def _correlation(credit: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Pearson's, over all tokens of a seed."""
    first, second = (part.flatten(1) - part.flatten(1).mean(1, keepdim=True) for part in (credit, gold))
    return F.cosine_similarity(first, second, dim=1)


def _sampled_gold(worlds: Worlds, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean gold reward of responses that each policy samples, (S,)."""
    state = parameters["start.state"].expand(-1, NUM_SAMPLES, -1)
    inputs = _token_inputs(parameters)
    tokens: list[torch.Tensor] = []
    for place in range(LENGTH):
        tokens.append((_linear(parameters, "policy", state) + worlds.gumbel[:, :, place]).argmax(-1))
        index = tokens[-1][..., None].expand(-1, -1, WIDTH)
        state = _next_state(parameters, [table.gather(1, index) for table in inputs], state)
    return gold_rewards(worlds.table, torch.stack(tokens, dim=-1)).sum(-1).mean(1)
