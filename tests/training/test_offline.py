"""One off-policy update: how a batch is cut must not matter, and each objective must be its formula.

Real here: a two-layer model in float64, the packing, autograd. One process; tests of several are in
test_distributed_training.py.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_run import tiny_model, tiny_table

from raylign.config import TrainSection
from raylign.errors import TrainingError
from raylign.models.forward import PolicyForward
from raylign.training.loop import train_offline
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.offline import UpdateSummary, offline_update, pair_losses
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.order import DataOrder
from raylign.training.state import TrainerState
from raylign.training.table import PairBatch, PairTable

OBJECTIVES = ["dpo", "cdpo", "rdpo", "ipo", "label_confidence", "sft"]
ONE_FORWARD, MANY_FORWARDS = 4096, 1


def make_policy() -> PolicyForward:
    return PolicyForward(tiny_model().double())


def make_batch(num_pairs: int = 8, **columns: Any) -> PairBatch:
    return PairTable(tiny_table(num_pairs, **columns)).batch(torch.arange(num_pairs).numpy())


def update(
    policy: PolicyForward, batch: PairBatch, *, batch_tokens: int = ONE_FORWARD, layout: Any = "shared", **settings: Any
) -> tuple[UpdateSummary, list[torch.Tensor]]:
    """One update with SGD of step 1 and no clipping, so that the weights moved by minus the gradient."""
    config = TrainSection(**{"objective": "dpo", "max_grad_norm": 1e9} | settings)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    summary = offline_update(
        policy,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        batch,
        update=0,
        settings=config,
        packing=Packing(layout=layout, pad_token_id=0, batch_tokens=batch_tokens),
        seed=0,
    )
    return summary, [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_forwards_of_one_pair_equal_one_of_eight(objective: str) -> None:
    policy, batch = make_policy(), make_batch()
    whole, gradient = update(copy.deepcopy(policy), batch, objective=objective)
    cut, gradient_of_parts = update(copy.deepcopy(policy), batch, objective=objective, batch_tokens=MANY_FORWARDS)

    torch.testing.assert_close(gradient_of_parts, gradient, rtol=1e-6, atol=1e-7)
    for name, values in whole.columns.items():
        torch.testing.assert_close(cut.columns[name], values, rtol=1e-5, atol=1e-5)
    assert cut.num_tokens == whole.num_tokens


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_layouts_give_the_same_gradient(objective: str) -> None:
    policy, batch = make_policy(), make_batch()
    gradients = [
        update(copy.deepcopy(policy), batch, layout=layout, objective=objective)[1]
        for layout in ("shared", "packed", "padded")
    ]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-6, atol=1e-7)


def test_weight_zero_is_a_deleted_pair_up_to_the_number_of_pairs() -> None:
    table = tiny_table(8)
    weight = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    kept = [i for i, w in enumerate(weight) if w]
    policy = make_policy()
    masked = PairTable(table.set_column(table.column_names.index("weight"), "weight", [weight]))
    _, gradient = update(copy.deepcopy(policy), masked.batch(torch.arange(8).numpy()))
    _, without = update(copy.deepcopy(policy), PairTable(table.take(kept)).batch(torch.arange(6).numpy()))

    torch.testing.assert_close(gradient, [g * 6 / 8 for g in without], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_the_objectives_formula(objective: str) -> None:
    """The formulas are written out with log and exp on log-probabilities from a plain forward."""
    policy, batch = make_policy(), make_batch()
    beta, epsilon, tau = 0.15, 0.1, 0.1
    reference = copy.deepcopy(policy)
    packed = Packing(layout="padded", pad_token_id=0, batch_tokens=1)
    from raylign.data.packing import pack_pairs

    scores = reference(pack_pairs(batch.tokens, layout=packed.layout, pad_token_id=0))
    delta = (scores.chosen_logps - batch.ref_chosen_logps) - (scores.rejected_logps - batch.ref_rejected_logps)
    right = -torch.log(1 / (1 + torch.exp(-beta * delta)))
    wrong = -torch.log(1 / (1 + torch.exp(beta * delta)))
    gamma = batch.label_confidence
    num_tokens = sum(len(pair.chosen_ids) for pair in batch.tokens)
    expected = {
        "dpo": right,
        "cdpo": (1 - epsilon) * right + epsilon * wrong,
        "rdpo": ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon),
        "ipo": (delta - 1 / (2 * tau)) ** 2,
        "label_confidence": gamma * right + (1 - gamma) * wrong,
        "sft": -8 * scores.chosen_logps / num_tokens,  # the mean over pairs is one over tokens
    }[objective]
    (expected.sum() / 8).backward()

    summary, gradient = update(policy, batch, objective=objective)
    torch.testing.assert_close(summary.columns["loss"], expected.detach().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, [p.grad for p in reference.parameters()], rtol=1e-5, atol=1e-6)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    assert summary.grad_norm == pytest.approx(norm, rel=1e-5)


def test_gradients_left_by_others_are_not_used() -> None:
    policy, stale = make_policy(), make_policy()
    for parameter in stale.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert torch.equal(update(stale, make_batch())[1][0], update(policy, make_batch())[1][0])


def test_gradient_is_clipped_to_the_configured_norm() -> None:
    _, gradient = update(make_policy(), make_batch(), max_grad_norm=0.01)
    assert math.sqrt(sum(float(g.square().sum()) for g in gradient)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("objective", "beta"), [("dpo", 0.15), ("sft", 1.0)])
def test_rewards_are_beta_times_log_ratios(objective: str, beta: float) -> None:
    batch = make_batch()
    columns = update(make_policy(), batch, objective=objective)[0].columns
    ratio = columns["chosen_logps"] - batch.ref_chosen_logps.double()
    torch.testing.assert_close(columns["chosen_rewards"], beta * ratio, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [ONE_FORWARD, MANY_FORWARDS])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(batch_tokens: int) -> None:
    policy, batch = make_policy(), make_batch()
    batch.ref_chosen_logps[3] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(TrainingError, match=r"update 1: the loss of 1 of 8 pairs .* train\.learning_rate"):
        update(policy, batch, batch_tokens=batch_tokens)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_an_update_leaves_the_callers_random_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    update(make_policy(), make_batch())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_label_confidence_without_a_gamma_is_refused() -> None:
    table = tiny_table(8).drop_columns(["label_confidence"])
    batch = PairTable(table).batch(torch.arange(8).numpy())
    with pytest.raises(TrainingError, match="needs gamma"):
        update(make_policy(), batch, objective="label_confidence")


def test_an_objective_without_a_reference_is_no_loss_over_margins() -> None:
    with pytest.raises(TrainingError, match=r"train\.objective=sft reads no margin"):
        pair_losses(torch.zeros(2), None, settings=TrainSection(objective="sft"))


def test_training_lowers_the_loss_and_records_trl_names() -> None:
    table = PairTable(tiny_table(20))
    settings = TrainSection(objective="dpo", learning_rate=3e-3, epochs=8, batch_size=8, log_every=3)
    order = DataOrder(num_pairs=20, batch_size=8, seed=0, epochs=8)
    policy = PolicyForward(tiny_model())
    optimizer = build_optimizer(policy, learning_rate=3e-3, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, schedule="cosine", num_updates=order.num_updates, warmup_fraction=0.03)
    state = TrainerState(
        policy=policy, optimizer=optimizer, scheduler=scheduler, window=MetricWindow(has_confidence=False)
    )
    records: list[dict[str, float]] = []
    saved: list[int] = []
    train_offline(
        state,
        table,
        order,
        settings=settings,
        packing=Packing(layout="shared", pad_token_id=0, batch_tokens=64),
        seed=0,
        on_record=records.append,
        on_checkpoint=lambda state, _: saved.append(state.update),
    )

    assert [r["step"] for r in records] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert saved == [24]
    assert records[-1]["epoch"] == 8
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert set(records[0]) == {
        *("step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected"),
        *("perf/padding_frac", "perf/tokens_per_second", "perf/pairs_per_second"),
    }


def test_a_checkpoint_between_records_tells_of_its_own_update_and_moves_no_record() -> None:
    def train(checkpoint_every: int) -> tuple[list[dict[str, float]], list[tuple[int, dict[str, float]]]]:
        settings = TrainSection(objective="dpo", max_steps=6, log_every=4, checkpoint_every=checkpoint_every)
        order = DataOrder(num_pairs=20, batch_size=8, seed=0, epochs=8, max_steps=6)
        policy = PolicyForward(tiny_model())
        optimizer = build_optimizer(policy, learning_rate=3e-3, weight_decay=0.0)
        scheduler = build_scheduler(optimizer, schedule="constant", num_updates=6, warmup_fraction=0.0)
        records: list[dict[str, float]] = []
        saved: list[tuple[int, dict[str, float]]] = []
        train_offline(
            TrainerState(
                policy=policy, optimizer=optimizer, scheduler=scheduler, window=MetricWindow(has_confidence=False)
            ),
            PairTable(tiny_table(20)),
            order,
            settings=settings,
            packing=Packing(layout="shared", pad_token_id=0, batch_tokens=64),
            seed=0,
            on_record=records.append,
            on_checkpoint=lambda state, record: saved.append((state.update, record)),
        )
        return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records], saved

    rare, _ = train(6)
    records, saved = train(3)
    assert records == rare
    assert [(update, record["step"]) for update, record in saved] == [(3, 3), (6, 6)]
    assert saved[1][1].items() >= records[-1].items()
    assert saved[0][1]["num_tokens"] < records[0]["num_tokens"]
