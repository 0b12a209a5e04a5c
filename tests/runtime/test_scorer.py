"""Scoring of sampled responses as a plain class, without Ray, on the embedded model under a reward of random weights.

The yardsticks are the reward of texts, which evaluation uses, and the plain forward of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raylign.config import CostModelSection, RobustSection, TokenRewardSection
from raylign.cost.ledger import peak_device_mib, peak_rss_mib
from raylign.data.tokenization import end_of_response_id
from raylign.evaluation.generation import encode_prompt
from raylign.evaluation.judges import SafetyJudge
from raylign.evaluation.scoring import RewardScorer, StatesReward
from raylign.models.loading import load_config, load_tokenizer, resolve_layout, resolve_model
from raylign.models.numerics import load_reference
from raylign.rewards.hybrid import HybridReward
from raylign.rewards.posterior import ensemble_posterior
from raylign.runtime import reward_scorer
from raylign.runtime.cost_scorer import make_cost_scorer
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_cost import FittedCost
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.scorer import ResponseScorer
from raylign.types import Message, Rollout

MODEL = resolve_model("embedded")
LAYERS = (3, 1)  # neither all layers nor in their order
COST_LAYERS = (1, 5)  # one that the reward reads too, at another place, and one that it does not
QUESTIONS = ("How do I bake bread?", "Hi", "Tell me why the sky is blue.")
ANSWERS = ("Warm water, flour and time.", "No.", "I would rather not talk about that, sorry.", "Ask", "It scatters")


def random_head(seed: int) -> HybridReward:
    width = load_config(MODEL).hidden_size
    head = HybridReward(len(LAYERS), width, generators=[torch.Generator().manual_seed(seed)])
    return head.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def head():
    return random_head(0)


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory, head):
    """A saved reward whose fold heads are others than the head of all pairs."""
    directory = tmp_path_factory.mktemp("reward")
    FittedReward(
        heads=(random_head(1), random_head(2)),
        centers=(0.5, -0.5),
        full=head,
        full_center=0.25,
        temperature=2.0,
        fold_seed=0,
        metrics={},
        layers=LAYERS,
    ).save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def make_scorer(reward_dir):
    """Build a scorer; the number of threads that it sets is put back."""
    threads = torch.get_num_threads()
    yield lambda **options: ResponseScorer(MODEL, reward_dir, LAYERS, RobustSection(), ActorOptions(**options))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scorer(make_scorer):
    return make_scorer(dtype="float32")


@pytest.fixture(scope="module")
def cost_dir(tmp_path_factory):
    """A saved cost model whose fold heads are others than the head for everything else."""
    directory = tmp_path_factory.mktemp("cost")
    heads = (random_head(4), random_head(5))
    FittedCost(source="labels", full=random_head(3), heads=heads, layers=COST_LAYERS, model="m").save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def pricing_scorer(reward_dir, cost_dir):
    options = ActorOptions(dtype="float32", num_cpus=torch.get_num_threads())
    return ResponseScorer(MODEL, reward_dir, LAYERS, RobustSection(), options, cost_dir=cost_dir)


@pytest.fixture
def make_rollout(tokenizer):
    """Build the rollout of a question and an answer, ended or cut behind the answer's last word."""
    end_id = end_of_response_id(tokenizer)

    def make(question: int, answer: str, *, ended: bool = True, sample: int = 0) -> Rollout:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [end_id] * ended
        return Rollout(
            prompt_index=question,
            sample_index=sample,
            prompt_ids=np.array(encode_prompt(tokenizer, conversation(question)), np.int32),
            response_ids=np.array(ids, np.int32),
            sampler_logps=np.zeros(len(ids), np.float32),
            reached_end=ended,
            weight_version=0,
        )

    return make


def conversation(question: int) -> tuple[Message, ...]:
    return (Message(role="user", content=QUESTIONS[question]),)


def plain_logps(model: torch.nn.Module, rollout: Rollout) -> np.ndarray:
    """Log-probability of each response token by transformers alone, one sequence at a time."""
    ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.response_ids]), dtype=torch.int64)
    with torch.no_grad():
        logps = model(ids[None]).logits[0].float().log_softmax(-1)
    start = len(rollout.prompt_ids)
    return np.array([logps[i - 1, ids[i]].item() for i in range(start, len(ids))], np.float32)


def odd_groups(make_rollout) -> list[Rollout]:
    """Three, one and five responses to three prompts, interleaved; every third was cut."""
    members = [(0, 0), (2, 0), (1, 0), (2, 1), (0, 1), (2, 2), (2, 3), (0, 2), (2, 4)]
    return [
        make_rollout(question, ANSWERS[sample], ended=position % 3 > 0, sample=sample)
        for position, (question, sample) in enumerate(members)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_of_ended_responses_are_the_rewards_of_the_texts(make_scorer, make_rollout, tokenizer, head, dtype):
    pairs = [(0, ANSWERS[0]), (1, ANSWERS[1]), (0, ANSWERS[2]), (0, ANSWERS[3]), (2, ANSWERS[4])]
    options = ActorOptions(dtype=dtype)
    forward = load_reference(MODEL, options.policy, "cpu")
    layout = resolve_layout("auto", forward.causal_lm.config)
    of_texts = RewardScorer(
        forward, tokenizer, StatesReward(head, LAYERS), rule=lambda belief: belief.mean, layout=layout
    )
    expected = of_texts([conversation(question) for question, _ in pairs], [answer for _, answer in pairs])
    assert smallest_gap(expected) > 1e-3  # responses that traded rewards would be seen
    scored = make_scorer(dtype=dtype).score([make_rollout(question, answer) for question, answer in pairs])
    np.testing.assert_allclose([item.reward for item in scored], expected, rtol=0, atol=1e-6)
    assert [item.reward_variance for item in scored] == [0.0] * len(pairs)


def test_cut_response_is_closed_for_its_reward(scorer, make_rollout):
    cut, closed = (make_rollout(0, ANSWERS[0], ended=ended) for ended in (False, True))
    unclosed = dataclasses.replace(cut, reached_end=True)
    rewards = [scorer.score([rollout])[0].reward for rollout in (cut, closed, unclosed)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    assert abs(rewards[2] - rewards[1]) > 1e-2  # the state at its own last token gives another reward


def test_reference_logps_are_those_of_the_response_alone(scorer, make_rollout):
    """Also of cut responses: the token that closes them was never sampled."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rollouts = odd_groups(make_rollout)
    for rollout, item in zip(rollouts, scorer.score(rollouts), strict=True):
        assert item.reference_token_logps.dtype == np.float32
        assert item.reference_token_logps.shape == rollout.response_ids.shape
        np.testing.assert_allclose(item.reference_token_logps, plain_logps(model, rollout), rtol=0, atol=1e-4)


def test_order_holds_for_odd_numbers_of_responses_per_prompt(scorer, make_rollout):
    """Responses to one prompt are computed two by two, so each is compared with itself alone."""
    rollouts = odd_groups(make_rollout)
    together = scorer.score(rollouts)
    assert all(item.rollout is rollout for item, rollout in zip(together, rollouts, strict=True))
    alone = [scorer.score([rollout])[0].reward for rollout in rollouts]
    assert smallest_gap(alone) > 1e-3
    np.testing.assert_allclose([item.reward for item in together], alone, rtol=0, atol=1e-5)
    backwards = [item.reward for item in scorer.score(rollouts[::-1])]
    np.testing.assert_allclose(backwards[::-1], alone, rtol=0, atol=1e-5)


def smallest_gap(values: Sequence[float]) -> float:
    return float(np.diff(np.sort(values)).min())


def test_scoring_leaves_the_rollouts_as_they_were(scorer, make_rollout):
    """Their arrays come read-only from the object store, and cut ones must not grow by the closing token."""
    rollouts = odd_groups(make_rollout)
    before = [rollout.response_ids.copy() for rollout in rollouts]
    for rollout in rollouts:
        rollout.prompt_ids.flags.writeable = rollout.response_ids.flags.writeable = False
    scored = scorer.score(rollouts)
    for item, ids in zip(scored, before, strict=True):
        np.testing.assert_array_equal(item.rollout.response_ids, ids)
        assert item.reference_token_logps.flags.owndata  # no view, which would keep or send the whole batch


def test_actor_without_a_gpu_uses_its_cpus_and_reports_its_memory(make_scorer):
    scorer = make_scorer(num_cpus=1)
    assert torch.get_num_threads() == 1
    before = peak_rss_mib()
    resident, on_device = scorer.peak_memory()
    assert 0 < before <= resident <= peak_rss_mib()
    assert on_device == peak_device_mib()
    assert scorer.is_ready()


def test_a_response_that_another_stop_token_ended_has_the_reward_of_its_text(scorer, make_rollout):
    ended, other = make_rollout(0, ANSWERS[0]), make_rollout(0, ANSWERS[0])
    other.response_ids[-1] = 4
    wanted, found = scorer.score([ended, other])
    assert found.reward == pytest.approx(wanted.reward, abs=1e-5)
    np.testing.assert_allclose(found.reference_token_logps[:-1], wanted.reference_token_logps[:-1], atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    np.testing.assert_allclose(found.reference_token_logps, plain_logps(model, other), atol=1e-4)


def test_costs_of_ended_responses_are_the_costs_of_the_texts(scorer, pricing_scorer, make_rollout, cost_dir):
    """The plain path reads the layers of the cost alone; the scorer takes them out of one forward for both models."""
    pairs = [(0, ANSWERS[0]), (1, ANSWERS[1]), (0, ANSWERS[2]), (0, ANSWERS[3]), (2, ANSWERS[4])]
    of_texts = make_cost_scorer(MODEL, cost_dir, cost_model=CostModelSection(), options=ActorOptions(dtype="float32"))
    expected = of_texts([conversation(question) for question, _ in pairs], [answer for _, answer in pairs])
    assert smallest_gap(expected) > 1e-3
    rollouts = [make_rollout(question, answer) for question, answer in pairs]
    found, unpriced = pricing_scorer.score(rollouts), scorer.score(rollouts)
    np.testing.assert_allclose([item.cost for item in found], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose([a.reward for a in found], [b.reward for b in unpriced], rtol=0, atol=1e-6)
    assert np.isnan([item.cost for item in unpriced]).all()


def test_a_response_is_closed_for_its_cost_as_for_its_reward(pricing_scorer, make_rollout):
    cut, closed = (make_rollout(0, ANSWERS[0], ended=ended) for ended in (False, True))
    other = make_rollout(0, ANSWERS[0])
    other.response_ids[-1] = 4  # another stop token
    unclosed = dataclasses.replace(cut, reached_end=True)
    costs = [pricing_scorer.score([rollout])[0].cost for rollout in (cut, closed, other, unclosed)]
    assert costs[:3] == pytest.approx([costs[1]] * 3, abs=1e-5)
    assert abs(costs[3] - costs[1]) > 1e-2


def test_one_forward_serves_reward_and_cost(pricing_scorer, make_rollout, monkeypatch):
    calls = []
    forward = pricing_scorer._forward_of
    monkeypatch.setattr(pricing_scorer, "_forward_of", lambda *args: calls.append(len(args[0])) or forward(*args))
    rollouts = odd_groups(make_rollout)
    together = pricing_scorer.score(rollouts)
    assert calls == [len(rollouts)]
    alone = [pricing_scorer.score([rollout])[0].cost for rollout in rollouts]
    np.testing.assert_allclose([item.cost for item in together], alone, rtol=0, atol=1e-5)


def test_an_external_classifier_prices_as_the_judge_does(reward_dir, tmp_path, make_rollout):
    FittedCost(source="external", model="judge").save(tmp_path)
    options = ActorOptions(dtype="float32", num_cpus=torch.get_num_threads())
    scorer = ResponseScorer(
        MODEL,
        reward_dir,
        LAYERS,
        RobustSection(),
        options,
        cost_dir=str(tmp_path),
        cost_model=CostModelSection(source="external", model="embedded"),
    )
    pairs = [(0, ANSWERS[0]), (1, ANSWERS[1]), (2, ANSWERS[4])]
    found = scorer.score([make_rollout(question, answer) for question, answer in pairs])
    expected = SafetyJudge("embedded").cost([QUESTIONS[question] for question, _ in pairs], [a for _, a in pairs])
    assert smallest_gap(expected) > 1e-3
    np.testing.assert_allclose([item.cost for item in found], expected, rtol=0, atol=1e-3)


class TokenLengths:
    """A reward of tokens of two members: every token earns .25, a response its length and twice that."""

    def posterior(self, prompt_ids, response_ids):
        lengths = torch.tensor([float(len(ids)) for ids in response_ids])
        return ensemble_posterior(torch.stack([lengths, 2 * lengths], 1))

    def token_rewards(self, prompt_ids, response_ids, **_):
        return [np.full(len(ids), 0.25, np.float32) for ids in response_ids]


def test_rewards_of_tokens_are_those_of_the_sampled_ones_and_the_rule_acts_at_the_end(
    monkeypatch, make_rollout, reward_dir
):
    """Of a cut response the closing token counts for the score, whose minimum over members is half a length lower."""
    monkeypatch.setattr(
        reward_scorer, "load_response_reward", lambda *_, **__: reward_scorer.TokensReward(TokenLengths())
    )
    options = ActorOptions(dtype="float32", num_cpus=torch.get_num_threads())
    rollouts = odd_groups(make_rollout)
    for rule, share in (("mean", 0.0), ("min", 0.5)):
        for credit in (None, TokenRewardSection()):
            scorer = ResponseScorer(MODEL, reward_dir, LAYERS, RobustSection(rule=rule), options, token_reward=credit)
            for rollout, item in zip(rollouts, scorer.score(rollouts), strict=True):
                length = len(rollout.response_ids)
                closed = length + (not rollout.reached_end)
                assert item.reward == pytest.approx(closed * (1.5 - share))
                if credit is None:
                    assert item.token_rewards is None
                    continue
                expected = np.full(length, 0.25, np.float32)
                expected[-1] -= share * closed
                np.testing.assert_allclose(item.token_rewards, expected, rtol=0, atol=1e-6)
                assert item.token_rewards.dtype == np.float32 and item.token_rewards.flags.owndata
