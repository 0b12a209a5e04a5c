"""The variational objective in the off-policy update: its formula, what it is without its terms, and how it resumes.

Real here: a two-layer model in float64, the packing, autograd, the checkpoint. Several processes are in
test_distributed_training.py, Ray in tests/runtime/test_trainer.py.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import save_tiny_model, tiny_model, tiny_table
from torch.distributions import Normal, kl_divergence

from raylign.config import AvaSection, TrainSection
from raylign.errors import CheckpointError, TrainingError
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.models.token_forward import HEADS_FILE, TokenForm, TokenHeads
from raylign.models.variational_policy import VariationalPolicy
from raylign.training.loop import train_offline
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.offline import UpdateSummary, offline_update
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.order import DataOrder
from raylign.training.state import (
    POLICY,
    TOKEN_HEADS,
    TrainerState,
    check_checkpoint,
    load_training,
    restore_adapter,
    save_checkpoint,
)
from raylign.training.table import PairBatch, PairTable
from raylign.training.variational import TERMS, Variational

OBJECTIVES = ["ava_p", "ava_d"]
ONE_FORWARD, MANY_FORWARDS = 4096, 1


def make_policy(**form: Any) -> VariationalPolicy:
    policy = VariationalPolicy(tiny_model().double(), form=TokenForm(**{"q_from": "logits"} | form), seed=0)
    policy.token_heads.double()
    with torch.no_grad():  # fresh heads would say nearly the same of every token
        policy.token_heads.reward.weight.normal_(0, 0.4, generator=torch.Generator().manual_seed(0))
    return policy


def make_batch(num_pairs: int = 8, **columns: Any) -> PairBatch:
    table = tiny_table(num_pairs)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    return PairTable(table).batch(torch.arange(num_pairs).numpy())


def update(
    policy: PolicyForward,
    batch: PairBatch,
    *,
    objective: str,
    ava: dict[str, Any] | None = None,
    variational: Variational | None = None,
    batch_tokens: int = ONE_FORWARD,
    layout: Any = "shared",
    is_logged: bool = False,
) -> tuple[UpdateSummary, dict[str, torch.Tensor]]:
    """One update with SGD of step 1 and no clipping, so that the weights moved by minus the gradient."""
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    if variational is None and objective != "sft":
        variational = Variational(objective, AvaSection(**ava or {}))
    summary = offline_update(
        policy,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        batch,
        update=0,
        settings=TrainSection(objective=objective, max_grad_norm=1e9),
        packing=Packing(layout=layout, pad_token_id=0, batch_tokens=batch_tokens),
        seed=0,
        variational=variational,
        is_logged=is_logged,
    )
    return summary, {name: before[name] - value.detach() for name, value in policy.named_parameters()}


@pytest.mark.parametrize(
    ("objective", "ava"),
    [("ava_d", {"irl_weight": 0.0}), ("ava_p", {"irl_weight": 0.0, "cer_weight": 0.0, "negative": "none"})],
)
def test_the_likelihood_alone_is_supervised_fine_tuning(objective: str, ava: dict[str, Any]) -> None:
    plain, rewarding = PolicyForward(tiny_model().double()), make_policy()
    expected, supervised = update(plain, make_batch(), objective="sft")
    found, gradient = update(rewarding, make_batch(), objective=objective, ava=ava)

    torch.testing.assert_close({name: gradient[name] for name in supervised}, supervised, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.columns["loss"], expected.columns["loss"])
    heads = [value for name, value in gradient.items() if name not in supervised]
    assert len(heads) == 2
    assert not any(value.any() for value in heads)


def plain_objective(policy: VariationalPolicy, batch: PairBatch, ava: AvaSection, *, objective: str) -> torch.Tensor:
    """The objective response by response, from the model's own outputs and torch.distributions."""
    q, rewards = ([], []), ([], [])
    for pair in batch.tokens:
        for half, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([*pair.prompt_ids.tolist(), *answer.tolist()])[None]
            output = policy.model(ids, output_hidden_states=True)
            start = len(pair.prompt_ids)
            values = ava.logit_scale * (output.logits if ava.q_from == "logits" else output.logits.softmax(-1))
            scored = values.log_softmax(-1)[0, start - 1 : -1]
            q[half].append(scored.gather(1, ids[0, start:, None])[:, 0])
            said = policy.token_heads.reward(output.hidden_states[-1][0, start:])
            rewards[half].append(Normal(said[:, 0], torch.log1p(said[:, 1].exp()) + policy.form.sigma_floor))
    halves = (0, 1) if objective == "ava_p" else (0,)
    errors = [
        [values - ava.discount * torch.cat([values[1:], values.new_zeros(1)]) for values in q[half]] for half in halves
    ]
    if ava.terminal == "drop":
        errors = [[e[:-1] for e in half] for half in errors]
    std = torch.cat([e for half in errors for e in half]).std(correction=0).detach() if ava.standardize_td else 1.0
    total = ava.likelihood_weight * torch.cat(q[0]).mean()
    for half in halves:
        divergence = [kl_divergence(normal, Normal(0.0, 1.0)) for normal in rewards[half]]
        density = [
            Normal(normal.loc[: len(e)], normal.scale[: len(e)]).log_prob(e / std)
            for normal, e in zip(rewards[half], errors[half], strict=True)
        ]
        total = total - ava.irl_weight * (torch.cat(divergence).mean() - ava.td_weight * torch.cat(density).mean())
    if objective == "ava_p":
        rejected = torch.cat(q[1])
        total = total + (torch.log(1 - rejected.exp()) if ava.negative == "unlikelihood" else -rejected).mean()
        margin = torch.stack([c.loc[-1] - r.loc[-1] for c, r in zip(*rewards, strict=True)])
        total = total + ava.cer_weight * torch.log(1 / (1 + torch.exp(-margin))).mean()
    return total


@pytest.mark.parametrize(
    ("objective", "ava"),
    [
        ("ava_p", {}),
        ("ava_d", {}),
        ("ava_p", {"terminal": "drop", "standardize_td": False, "discount": 0.5, "cer_weight": 2.0}),
        ("ava_p", {"q_from": "probs", "logit_scale": 20.0}),
        ("ava_d", {"logit_scale": 2.0, "likelihood_weight": 0.5, "irl_weight": 0.3}),
    ],
)
def test_loss_and_gradient_are_the_formula_of_plain_sequences(objective: str, ava: dict[str, Any]) -> None:
    settings, batch = AvaSection(**ava), make_batch()
    form = {"q_from": settings.q_from, "logit_scale": settings.logit_scale, "sigma_floor": settings.sigma_floor}
    policy, plain = make_policy(**form), make_policy(**form)
    expected = plain_objective(plain, batch, settings, objective=objective)
    (-expected).backward()
    expected = expected.detach()

    summary, gradient = update(policy, batch, objective=objective, ava=ava)
    assert float(summary.columns["loss"].mean()) == pytest.approx(-float(expected), rel=1e-5)
    terms = sum(float(summary.columns[f"ava/{term}"].mean()) for term in TERMS)
    assert terms == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(
        gradient, {name: value.grad for name, value in plain.named_parameters()}, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_forwards_of_one_pair_equal_one_of_eight(objective: str) -> None:
    policy, batch = make_policy(), make_batch()
    whole, gradient = update(copy.deepcopy(policy), batch, objective=objective, is_logged=True)
    cut, of_parts = update(
        copy.deepcopy(policy), batch, objective=objective, is_logged=True, batch_tokens=MANY_FORWARDS
    )
    torch.testing.assert_close(of_parts, gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cut.columns, whole.columns, rtol=1e-5, atol=1e-6)
    assert cut.facts == pytest.approx(whole.facts, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layouts_give_the_same_loss_and_gradient(objective: str) -> None:
    """Padding and what lies beside a response in its row must not count."""
    policy, batch = make_policy(), make_batch()
    (shared, gradient), *others = [
        update(copy.deepcopy(policy), batch, layout=layout, objective=objective)
        for layout in ("shared", "packed", "padded")
    ]
    for summary, other in others:
        torch.testing.assert_close(other, gradient, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(summary.columns, shared.columns, rtol=1e-5, atol=1e-6)


def test_weights_of_pairs_are_factors_of_their_gradients() -> None:
    first = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 2.0, 1.0]
    _, whole = update(make_policy(), make_batch(), objective="ava_p")
    _, part = update(make_policy(), make_batch(weight=first), objective="ava_p")
    _, rest = update(make_policy(), make_batch(weight=[1 - w for w in first]), objective="ava_p")
    torch.testing.assert_close({name: part[name] + rest[name] for name in whole}, whole, rtol=1e-6, atol=1e-9)


def test_measuring_the_trunk_moves_no_weight_and_says_what_autograd_says() -> None:
    batch = make_batch()
    plain, gradient = update(make_policy(), batch, objective="ava_p")
    logged, of_logged = update(make_policy(), batch, objective="ava_p", is_logged=True)
    assert all(torch.equal(gradient[name], of_logged[name]) for name in gradient)
    assert set(logged.facts) - set(plain.facts) == {f"ava/trunk_grad_norm/{term}" for term in TERMS}

    policy = make_policy()
    packed = Packing(layout="shared", pad_token_id=0, batch_tokens=ONE_FORWARD)
    from raylign.data.packing import pack_pairs

    scores = policy(pack_pairs(batch.tokens, layout=packed.layout, pad_token_id=0))
    margin = scores.token_mu[torch.tensor(_ends(scores.token_sequence))].view(2, -1)
    cer = torch.nn.functional.logsigmoid(margin[0] - margin[1]).mean()
    (slope,) = torch.autograd.grad(cer, scores.trunk_states)
    assert logged.facts["ava/trunk_grad_norm/cer"] == pytest.approx(float(slope.norm()), rel=1e-5)


def _ends(sequence_N: torch.Tensor) -> list[int]:
    return (torch.bincount(sequence_N).cumsum(0) - 1).tolist()


def test_a_detached_q_leaves_the_trunk_to_the_head() -> None:
    ava = {"likelihood_weight": 0.0, "detach_q": True}
    _, detached = update(make_policy(), make_batch(), objective="ava_d", ava=ava)
    _, joint = update(make_policy(), make_batch(), objective="ava_d", ava=ava | {"detach_q": False})
    name = "token_heads.reward.weight"
    torch.testing.assert_close(detached[name], joint[name])
    assert any(not torch.allclose(detached[other], joint[other]) for other in detached if other != name)


def test_td_errors_are_divided_by_the_deviation_of_the_updates_before() -> None:
    """The first update measures its own batch; the second one divides by what the first found."""
    variational, policy, settings = Variational("ava_p", AvaSection()), make_policy(), AvaSection()
    found = []
    for seed in (0, 1):
        batch = PairTable(tiny_table(8, seed=seed)).batch(torch.arange(8).numpy())
        frozen = copy.deepcopy(policy)
        found.append((update(policy, batch, objective="ava_p", variational=variational)[0], _deviations(frozen, batch)))
        policy = frozen
    (first, before), (second, after) = found
    assert first.facts["ava/td_std"] == pytest.approx(before.std(correction=0).item(), rel=1e-6)
    assert second.facts["ava/td_std"] == first.facts["ava/td_std"]
    pooled = torch.cat([before, after])
    weight = torch.cat([torch.full_like(before, 0.99), torch.ones_like(after)])
    mean = (weight * pooled).sum() / weight.sum()
    expected = math.sqrt(float((weight * (pooled - mean).square()).sum() / weight.sum()))
    assert variational.scale.std == pytest.approx(expected, rel=1e-6)
    assert settings.standardize_td


@torch.no_grad()
def _deviations(policy: VariationalPolicy, batch: PairBatch) -> torch.Tensor:
    from raylign.data.packing import pack_pairs

    scores = policy(pack_pairs(batch.tokens, layout="padded", pad_token_id=0))
    parts = [scores.token_q[scores.token_sequence == s].double() for s in range(16)]
    return torch.cat([q - 0.95 * torch.cat([q[1:], q.new_zeros(1)]) for q in parts])


def test_sigmas_and_accuracies_are_those_of_the_tokens_that_count() -> None:
    batch, policy = make_batch(), make_policy(sigma_floor=0.3)
    from raylign.data.packing import pack_pairs

    with torch.no_grad():
        scores = copy.deepcopy(policy)(pack_pairs(batch.tokens, layout="padded", pad_token_id=0))
    for objective in OBJECTIVES:
        summary, _ = update(copy.deepcopy(policy), batch, objective=objective, ava={"sigma_floor": 0.3})
        sigma = scores.token_sigma[scores.token_sequence < (16 if objective == "ava_p" else 8)].double()
        assert float(summary.columns["ava/sigma/mean"].mean()) == pytest.approx(float(sigma.mean()), rel=1e-5)
        assert float(summary.columns["ava/sigma/at_floor"].mean()) == pytest.approx(
            float((sigma <= 0.6).double().mean())
        )
        assert 0 < float((sigma <= 0.6).double().mean()) < 1
        assert summary.facts["ava/sigma/min"] == pytest.approx(float(sigma.min()), rel=1e-6)
        sums = torch.stack([scores.token_mu[scores.token_sequence == s].sum() for s in range(16)]).view(2, 8)
        assert torch.equal(summary.columns["ava/accuracies/sum"].bool(), sums[0] > sums[1])
        assert torch.equal(
            summary.columns["ava/accuracies/log_prob"].bool(), scores.chosen_logps > scores.rejected_logps
        )


def test_the_objective_needs_its_policy_and_its_state() -> None:
    with pytest.raises(TrainingError, match="VariationalPolicy"):
        update(PolicyForward(tiny_model().double()), make_batch(), objective="ava_p")


NUM_UPDATES = 6
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(
    model_dir: Path, *, objective: str, adapter: Any, save_to: dict[int, Path] | None = None, start: Path | None = None
) -> tuple[TrainerState, dict[int, dict[str, float]]]:
    is_lora = adapter == "lora"
    origin = model_dir if start is None or is_lora else start / POLICY
    model = load_policy(origin, dtype="float32", adapter=adapter, lora_dropout=0.3, seed=3)
    if start is not None and is_lora:
        restore_adapter(start, model)
    policy = VariationalPolicy(model, form=TokenForm(q_from="logits", sigma_floor=0.01), seed=3)
    optimizer = build_optimizer(policy, learning_rate=1e-2, weight_decay=0.1)
    state = TrainerState(
        policy=policy,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, schedule="cosine", num_updates=NUM_UPDATES, warmup_fraction=0.2),
        window=MetricWindow(has_confidence=False),
        variational=Variational(objective, AvaSection()),
    )
    if start is not None:
        check_checkpoint(start, {})
        load_training(start, state)
    records: dict[int, dict[str, float]] = {}
    targets = save_to or {}

    def on_checkpoint(state: TrainerState, _: Any) -> None:
        if state.update in targets:
            save_checkpoint(targets[state.update], state, tokenizer=load_tokenizer(model_dir), identity={})

    train_offline(
        state,
        PairTable(tiny_table(12)),
        DataOrder(num_pairs=12, batch_size=4, seed=3, epochs=2),
        settings=TrainSection(objective=objective, log_every=2, checkpoint_every=1, batch_size=4, epochs=2),
        packing=PACKING,
        seed=3,
        on_record=lambda record: records.update({int(record["step"]): record}),
        on_checkpoint=on_checkpoint,
    )
    return state, records


@pytest.mark.parametrize(("objective", "adapter"), [("ava_p", "full"), ("ava_p", "lora"), ("ava_d", "full")])
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(
    model_dir: Path, tmp_path: Path, objective: str, adapter: str
) -> None:
    points = {step: tmp_path / f"step_{step}" for step in (1, 3, NUM_UPDATES)}
    whole, records = train(model_dir, objective=objective, adapter=adapter, save_to=points)
    for step, directory in points.items():
        resumed, later = train(model_dir, objective=objective, adapter=adapter, start=directory)
        weights, expected = resumed.policy.state_dict(), whole.policy.state_dict()
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
        assert resumed.variational.scale == whole.variational.scale
        for update_, record in later.items():
            for name, value in record.items():
                assert name.startswith("perf/") or value == records[update_][name], (step, update_, name)


def test_the_heads_learn_and_lie_beside_a_plain_policy(model_dir: Path, tmp_path: Path) -> None:
    state, records = train(model_dir, objective="ava_p", adapter="full", save_to={NUM_UPDATES: tmp_path / "last"})
    stored = load_file(tmp_path / "last" / TOKEN_HEADS / HEADS_FILE)
    form = TokenForm(q_from="logits")
    fresh, read = (TokenHeads(32, 64, form, seed=3) for _ in range(2))
    read.load(tmp_path / "last" / TOKEN_HEADS)
    assert torch.equal(read.reward.weight, state.policy.token_heads.reward.weight)
    assert not torch.allclose(read.reward.weight, fresh.reward.weight, atol=1e-3)
    assert not [name for name in load_file(tmp_path / "last" / POLICY / "model.safetensors") if "heads" in name]
    assert set(stored) == {"reward.weight", "reward.bias"}
    assert {name for name in records[2] if name.startswith("ava/")} >= {
        *("ava/likelihood", "ava/negative", "ava/kl", "ava/td", "ava/cer", "ava/td_std"),
        *("ava/accuracies/last", "ava/accuracies/sum", "ava/accuracies/log_prob"),
        *("ava/sigma/mean", "ava/sigma/min", "ava/sigma/at_floor", "ava/trunk_grad_norm/cer"),
    }


def test_checkpoints_of_another_objective_or_without_heads_are_refused(model_dir: Path, tmp_path: Path) -> None:
    state, _ = train(model_dir, objective="ava_d", adapter="full", save_to={1: tmp_path / "one"})
    state.variational = None
    with pytest.raises(CheckpointError, match=r"another train\.objective"):
        load_training(tmp_path / "one", state)
    (tmp_path / "one" / TOKEN_HEADS / HEADS_FILE).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"heads\.safetensors cannot be read"):
        train(model_dir, objective="ava_d", adapter="full", start=_without_sizes(tmp_path / "one"))


def _without_sizes(checkpoint: Path) -> Path:
    import json

    file = checkpoint / "trainer_state" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sizes": {}}))
    return checkpoint
