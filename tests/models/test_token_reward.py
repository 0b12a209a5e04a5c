"""Rewards of tokens on a two-layer policy: what each one has seen, what padding may change, and whose credit it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_texts import save_policy

from raylign.data.packing import pack_pairs
from raylign.errors import DataError, ModelError
from raylign.losses.variational import sequence_score, sequence_sigma
from raylign.models.classifiers import add_adapters, load_members
from raylign.models.loading import load_policy, load_tokenizer, without_renaming_warnings
from raylign.models.token_forward import TokenForm, TokenHeads, TokenOutputs, TokenRewardForward
from raylign.models.token_reward import TokenReward, prefix_scores, read_pairs, response_scores
from raylign.types import TokenizedPair

GAUSSIAN = TokenForm(q_from="logits", sigma_floor=0.01)
END = 2
PROMPT = [1, 40, 41, 42]
SCALE, SHIFT = torch.tensor([2.0, 0.5]), torch.tensor([0.1, -0.2])  # of two members
RESPONSES = [[50, 51, 52, END], [60, 61, END], [70, END]]


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


@pytest.fixture(scope="module")
def tokenizer(policy_dir: Path) -> Any:
    return load_tokenizer(policy_dir)


def members(policy_dir: Path, names: list[str], form: TokenForm = GAUSSIAN, **options: Any) -> TokenRewardForward:
    """Adapters that are not zero, which would hide a wrong one."""
    model = load_policy(policy_dir, **options)
    width, vocab = model.get_input_embeddings().weight.shape[1], model.config.vocab_size
    seeds = list(range(10, 10 + len(names)))
    peft_model = add_adapters(model, names, rank=2, alpha=4, seeds=seeds, task_type="CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    heads = {name: TokenHeads(width, vocab, form, seed=seed, std=0.3) for name, seed in zip(names, seeds, strict=True)}
    return TokenRewardForward(peft_model, heads, form=form).eval()


def pair(chosen: list[int], rejected: list[int], prompt: list[int] = PROMPT) -> TokenizedPair:
    ids = (np.array(part, np.int32) for part in (prompt, chosen, rejected))
    return TokenizedPair(**dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))


def read(forward: TokenRewardForward, pairs: list[TokenizedPair], **options: Any) -> TokenOutputs:
    plain: dict[str, Any] = {"layout": "shared", "pad_token_id": 0, "batch_tokens": 512}
    return read_pairs(forward, pairs, **(plain | options))


def states_of(forward: TokenRewardForward, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return forward.causal_lm.base_model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_reward_is_read_after_its_token_and_its_q_before(policy_dir, layout):
    forward = members(policy_dir, ["member0"])
    found = read(forward, [pair(RESPONSES[0], RESPONSES[1])], layout=layout)
    heads = forward.heads["member0"]
    start = 0
    for sequence, ids in enumerate(RESPONSES[:2]):
        rows = slice(start, start + len(ids))
        start += len(ids)
        states = states_of(forward, PROMPT + ids)
        said = heads.reward(states[len(PROMPT) :]).detach()
        torch.testing.assert_close(found.mu[rows], said[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sigma[rows], torch.log1p(said[:, 1].exp()) + 0.01, rtol=0, atol=1e-5)
        logits = forward.causal_lm.lm_head(states[len(PROMPT) - 1 : -1]).detach()
        logps = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(found.q[rows], logps, rtol=0, atol=1e-5)
        before = heads.reward(states[len(PROMPT) - 1]).detach()[0]
        assert float(found.before[sequence]) == pytest.approx(float(before), abs=1e-5)
    assert found.sequence.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_later_tokens_do_not_change_a_reward_and_the_last_one_does(policy_dir):
    forward = members(policy_dir, ["member0"])
    one, other = [50, 51, 52, 53, END], [50, 51, 52, 99, END]
    found = read(forward, [pair(one, other)])
    for values in (found.mu, found.sigma, found.q):
        first, second = values.split(5)
        torch.testing.assert_close(first[:3], second[:3], rtol=0, atol=1e-6)
        assert not torch.isclose(first[3], second[3], atol=1e-4)  # its own token, which it has seen
    swapped = read(forward, [pair([50, 51, END], [50, 51, 99])])
    for score in ("last", "sum", "mean", "log_prob"):
        chosen, rejected = response_scores(swapped, score)[0]
        assert abs(float(chosen - rejected)) > 1e-4  # the last token counts for every score


@pytest.mark.parametrize(
    "options", [{"layout": "padded"}, {"layout": "packed"}, {"pad_token_id": END}, {"batch_tokens": 64}]
)
def test_layouts_pads_and_batches_say_the_same(policy_dir, options):
    forward = members(policy_dir, ["member0"])
    pairs = [pair(RESPONSES[0], RESPONSES[1]), pair(RESPONSES[2], [80] * 20 + [END], [1, 90]), pair([END], [7, END])]
    expected, found = read(forward, pairs), read(forward, pairs, **options)
    for name in ("mu", "sigma", "q", "before", "before_sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert torch.equal(found.sequence, expected.sequence)


def test_forms_of_q(policy_dir):
    pairs = [pair(RESPONSES[0], RESPONSES[1])]
    logits = read(members(policy_dir, ["member0"]), pairs)
    assert torch.equal(logits.q, logits.log_likelihood)
    forward = members(policy_dir, ["member0"], TokenForm(q_from="probs", logit_scale=40.0))
    probs = read(forward, pairs)
    states = states_of(forward, PROMPT + RESPONSES[0])[len(PROMPT) - 1 : -1]
    p = forward.causal_lm.lm_head(states).detach().softmax(-1)
    expected = (40 * p).log_softmax(-1)[torch.arange(4), RESPONSES[0]]
    torch.testing.assert_close(probs.q[:4], expected, rtol=0, atol=1e-5)
    forward = members(policy_dir, ["member0"], TokenForm(q_from="q_head", logit_scale=2.0))
    own = read(forward, pairs)
    values = forward.heads["member0"].q(states_of(forward, PROMPT + RESPONSES[0])[len(PROMPT) - 1 : -1]).detach()
    torch.testing.assert_close(own.q[:4], values[torch.arange(4), RESPONSES[0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        own.log_likelihood[:4], (2 * values).log_softmax(-1)[torch.arange(4), RESPONSES[0]], rtol=0, atol=1e-5
    )
    plain = read(members(policy_dir, ["member0"], TokenForm(q_from=None)), pairs)
    assert plain.sigma is None and plain.q is None
    with pytest.raises(ModelError, match="log_prob"):
        response_scores(plain, "log_prob")


def test_scores_of_prefixes_end_in_the_score_and_are_those_of_cut_responses(policy_dir):
    forward = members(policy_dir, ["member0"])
    whole = read(forward, [pair(RESPONSES[0], RESPONSES[1])])
    cut = read(forward, [pair(RESPONSES[0][:2], RESPONSES[1][:1])])
    for score in ("last", "sum", "mean"):
        values, sigmas = prefix_scores(whole, score)
        expected = sequence_score(whole.mu, whole.sequence, 2, rule=score)
        torch.testing.assert_close(values[[3, 6]], expected, rtol=0, atol=1e-6)
        expected = sequence_sigma(whole.sigma, whole.sequence, 2, rule=score)
        torch.testing.assert_close(sigmas[[3, 6]], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(values[[1, 4]], response_scores(cut, score)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("score", ["last", "sum", "mean", "log_prob"])
def test_pairs_texts_and_single_responses_have_one_belief(policy_dir, tokenizer, score):
    names = ["member0", "member1"]
    reward = TokenReward(
        members(policy_dir, names),
        tokenizer,
        members=names,
        score=score,
        scale=SCALE,
        shift=SHIFT,
    )
    chosen, rejected = reward.posterior_of_pairs([pair(RESPONSES[0], RESPONSES[1]), pair(RESPONSES[2], RESPONSES[0])])
    order = [RESPONSES[1], RESPONSES[0], RESPONSES[2]]
    alone = reward.posterior([PROMPT] * 3, [ids[:-1] for ids in order])  # closed by the reward
    for name in ("mean", "head_rewards", "head_scales", "deviations"):
        expected = [getattr(belief, name) for belief in (chosen, rejected)]
        if name == "head_scales" and score == "log_prob":
            assert alone.head_scales is None and expected == [None, None]
            continue
        rows = torch.stack([expected[1][0], expected[0][0], expected[0][1]])
        torch.testing.assert_close(getattr(alone, name), rows, rtol=0, atol=1e-5)
        torch.testing.assert_close(expected[0][0], expected[1][1], rtol=0, atol=1e-5)
    found = read_member(reward, "member1")
    values, _ = response_scores(found, score)
    torch.testing.assert_close(chosen.head_rewards[0, 1], values[0] * 0.5 - 0.2, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="paired"):
        reward.posterior([PROMPT], [])


def read_member(reward: TokenReward, name: str) -> TokenOutputs:
    reward.forward.activate(name)
    return read(reward.forward, [pair(RESPONSES[0], RESPONSES[1])])


@pytest.mark.parametrize("score", ["last", "sum", "mean"])
@pytest.mark.parametrize("credit", ["own", "differences", "attention"])
def test_credit_of_tokens(policy_dir, tokenizer, score, credit):
    """Own rewards are those of the head; the others add up to the score, less that of an empty response."""
    names = ["member0", "member1"]
    reward = TokenReward(
        members(policy_dir, names, attention="eager"),
        tokenizer,
        members=names,
        score=score,
        credit=credit,
        dense_weight=1.0 if credit == "own" else 0.75,
        scale=SCALE,
        shift=SHIFT,
    )
    prompts, responses = [PROMPT] * 3, RESPONSES
    belief = reward.posterior(prompts, responses)
    found = reward.token_rewards(prompts, responses)
    assert [len(rewards) for rewards in found] == [4, 3, 2] and found[0].dtype == np.float32
    outputs = [read_member(reward, name) for name in names]
    if credit == "own":
        expected = (torch.stack([out.mu[:4] for out in outputs], 1) * SCALE).mean(1)  # a shift would pay for length
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
    else:
        totals = belief.mean.clone()
        if credit == "differences":
            before = torch.stack([out.before for out in outputs], 1)[0] * (score != "sum")
            totals -= 0.75 * (before * SCALE + SHIFT).mean()
        np.testing.assert_allclose([rewards.sum() for rewards in found], totals, atol=1e-5)
    assert not np.allclose(found[0][:-1], 0)
    # what closing adds is the last given token's; of two end tokens the second one is nothing
    cut = reward.token_rewards(prompts[:1], [RESPONSES[0][:-1]])[0]
    np.testing.assert_allclose(cut, [*found[0][:2], found[0][2] + found[0][3]], atol=1e-5)
    ended = reward.token_rewards(prompts[:1], [[*RESPONSES[0], END]])[0]
    np.testing.assert_allclose(ended, [*found[0], 0], atol=1e-5)
    lowest = reward.token_rewards(prompts, responses, rule=lambda belief: belief.head_rewards.amin(-1))
    assert lowest[0].sum() < found[0].sum() or credit == "differences"


def test_attention_is_that_of_the_last_layer_from_the_last_token(policy_dir):
    forward = members(policy_dir, ["member0"], attention="eager")
    for layout in ("shared", "padded"):
        found = read(forward, [pair(RESPONSES[0], RESPONSES[1])], layout=layout, with_attention=True)
        start = 0
        for ids in RESPONSES[:2]:
            with torch.no_grad():
                weights = forward.model(torch.tensor([PROMPT + ids]), output_attentions=True).attentions[-1]
            expected = weights[0].mean(0)[-1, len(PROMPT) :]
            torch.testing.assert_close(found.attention[start : start + len(ids)], expected, rtol=0, atol=1e-5)
            start += len(ids)
    with pytest.raises(ModelError, match="attention"):
        read(members(policy_dir, ["member0"]), [pair([END], [END])], with_attention=True)


def test_a_saved_member_is_a_plain_adapter_with_heads_beside_it(policy_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    forward = members(policy_dir, ["member0", "member1"])
    forward.model.save_pretrained(tmp_path, selected_adapters=["member1"])
    forward.heads["member1"].save(tmp_path / "member1")
    forward.activate("member1")
    ids = torch.tensor([PROMPT + RESPONSES[0]])
    with torch.no_grad():
        expected = forward.model(ids).logits
        base = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
        with without_renaming_warnings():
            plain = PeftModel.from_pretrained(base, tmp_path / "member1").eval()
        logits = plain(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    model = load_members(load_policy(policy_dir), [tmp_path / "member1"])
    heads = TokenHeads(16, model.config.vocab_size, GAUSSIAN).load(tmp_path / "member1")
    again = TokenRewardForward(model, {"member1": heads}, form=GAUSSIAN)
    pairs = [pair(RESPONSES[0], RESPONSES[1])]
    assert torch.equal(read(again, pairs).mu, read(forward, pairs).mu)
    with pytest.raises(ModelError, match="fit the reward model again"):
        TokenHeads(16, model.config.vocab_size, TokenForm(q_from=None)).load(tmp_path / "member1")
    with pytest.raises(ModelError, match="fit the reward model again"):
        TokenHeads(16, 8, GAUSSIAN).load(tmp_path)


def test_a_batch_on_its_way_to_the_model_scores_the_policy_too(policy_dir):
    forward = members(policy_dir, ["member0"])
    batch = pack_pairs([pair(RESPONSES[0], RESPONSES[1])], layout="shared", pad_token_id=0)
    with torch.no_grad():
        torch.testing.assert_close(forward(batch).token_logps, forward.read(batch).q, rtol=0, atol=1e-6)
