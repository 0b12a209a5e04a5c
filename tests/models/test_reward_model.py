"""Rewards of texts by classifiers: where the score is read, what padding may change, and whose tokenizer reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from raylign.data.packing import pack_pairs
from raylign.errors import DataError, ModelError
from raylign.evaluation.generation import encode_prompt
from raylign.models.classifiers import (
    ClassifierForward,
    add_members,
    end_position,
    load_classifier,
    load_external,
    load_members,
    neutral_pad_id,
    reward_column,
)
from raylign.models.loading import load_tokenizer
from raylign.models.reward_model import TextReward, length_batches
from raylign.types import Message, TokenizedPair

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = (Message(role="user", content="Hi there"),)
RESPONSES = ["No.", "Sure, here is a much longer answer than that", "Why?"]


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(policy_dir: Path) -> Any:
    return load_tokenizer(policy_dir)


def classifier(config: Any, directory: Path, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = BertForSequenceClassification if isinstance(config, BertConfig) else LlamaForSequenceClassification
        kind(config).save_pretrained(directory)
    return load_external(directory)


def members_of(policy_dir: Path, names: list[str], **options: Any) -> ClassifierForward:
    base = load_classifier(policy_dir, pad_token_id=0, seed=0, **options)
    seeds = list(range(10, 10 + len(names)))
    model = add_members(base, names, rank=2, alpha=4, seeds=seeds, head_seeds=seeds)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide a wrong adapter
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.normal_(0, 0.1, generator=generator)
    return ClassifierForward(model)


def test_the_new_head_is_seeded_and_nothing_else_is_touched(policy_dir, caplog):
    before = torch.random.get_rng_state()
    first, again, other = (load_classifier(policy_dir, pad_token_id=0, seed=seed) for seed in (1, 1, 2))
    add_members(other, ["member0"], rank=2, alpha=4, seeds=[1], head_seeds=[1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.original_module.weight)
    assert torch.equal(first.score.weight, other.score.modules_to_save["member0"].weight)
    policy = LlamaForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    assert torch.equal(first.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert not caplog.records  # of a report that the head is new


def test_weights_that_lack_more_than_the_head_are_refused(policy_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(policy_dir, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_classifier(broken, pad_token_id=0, seed=0)
    with pytest.raises(ModelError, match=r"lack \['score\.weight'\]"):
        load_external(policy_dir)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_external(broken)


@pytest.mark.parametrize("filler", [0, 7, 2])
def test_a_reward_is_read_at_the_last_real_token_whatever_the_padding(policy_dir, tokenizer, filler):
    """Alone and padded to any width, with a pad token of the config (0), a letter, or the end token itself (2)."""
    forward = members_of(policy_dir, ["member0"])
    forward.activate("member0")
    sequences = [[1, 40, 41, 2], [1, 40, 41, 50, 51, 52, 53, 2], [1, 60, 2]]
    alone = torch.cat([forward([ids]) for ids in sequences])
    together = forward(sequences)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    states = [forward.classifier.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    expected = torch.stack(states) @ forward.classifier.score.modules_to_save["member0"].weight.T
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-6)

    wide = torch.tensor([ids + [filler] * (12 - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (12 - len(ids)) for ids in sequences])
    plain = forward.classifier(input_ids=wide, attention_mask=mask).logits
    is_trap = not torch.allclose(plain, alone, atol=1e-4)
    assert is_trap == (filler != 0)  # transformers itself scores at a pad token that is not the config's


def test_end_positions():
    assert end_position([5, 6, 0], 0) == 1
    assert end_position([5, 0, 6], 0) == 2
    assert end_position([5, 6, 0], None) == 2
    assert end_position([0, 0], 0) == 0


def test_a_pad_token_that_ends_responses_is_replaced(make_tokenizer):
    tokenizer = make_tokenizer()
    assert neutral_pad_id(tokenizer) == 0
    tokenizer.pad_token = tokenizer.eos_token
    assert neutral_pad_id(tokenizer) == tokenizer.bos_token_id == 1


def test_members_are_switched_and_make_a_posterior(policy_dir, tokenizer):
    names = ["member0", "member1", "member2"]
    forward = members_of(policy_dir, names)
    reward = TextReward(forward, tokenizer, members=names, batch_tokens=64)
    prompt_ids = [np.asarray(encode_prompt(tokenizer, PROMPT), np.int32)] * 3
    response_ids = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in RESPONSES]
    belief = reward.posterior(prompt_ids, response_ids)

    for column, name in enumerate(names):
        alone = TextReward(forward, tokenizer, members=[name]).posterior(prompt_ids, response_ids)
        torch.testing.assert_close(belief.head_rewards[:, column], alone.mean, rtol=0, atol=1e-6)
        assert float(alone.variance.max()) == 0
    assert float(belief.head_rewards.std(1).min()) > 1e-3
    torch.testing.assert_close(belief.variance, belief.head_rewards.var(1, unbiased=False), rtol=1e-4, atol=1e-7)
    again = reward.posterior(prompt_ids, response_ids)
    assert torch.equal(belief.head_rewards, again.head_rewards) and not belief.mean.requires_grad

    by_text = reward.posterior_of_texts([PROMPT] * 3, RESPONSES)
    assert torch.equal(by_text.head_rewards, belief.head_rewards)
    closed = [np.append(ids, tokenizer.eos_token_id) for ids in response_ids]
    assert torch.equal(reward.posterior(prompt_ids, closed).head_rewards, belief.head_rewards)


def test_standardised_members(policy_dir, tokenizer):
    forward = members_of(policy_dir, ["member0", "member1"])
    plain = TextReward(forward, tokenizer, members=["member0", "member1"]).posterior_of_texts([PROMPT] * 3, RESPONSES)
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    reward = TextReward(forward, tokenizer, members=["member0", "member1"], scale=scale, shift=shift)
    scaled = reward.posterior_of_texts([PROMPT] * 3, RESPONSES)
    torch.testing.assert_close(scaled.head_rewards, plain.head_rewards * scale + shift, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_pairs_of_any_layout_get_the_rewards_of_their_rows(policy_dir, tokenizer, layout):
    forward = members_of(policy_dir, ["member0", "member1"])
    reward = TextReward(forward, tokenizer, members=["member0", "member1"], batch_tokens=96)
    prompt = encode_prompt(tokenizer, PROMPT)
    texts = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in RESPONSES]
    pairs = [
        TokenizedPair(
            prompt_ids=np.asarray(prompt, np.int32),
            chosen_ids=np.asarray(texts[first], np.int32),
            rejected_ids=np.asarray(texts[second], np.int32),
        )
        for first, second in [(0, 1), (1, 2), (2, 0)]
    ]
    rows = reward.posterior([prompt] * 3, texts).head_rewards
    chosen, rejected = reward.posterior_of_pairs(pairs)
    torch.testing.assert_close(chosen.head_rewards, rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(rejected.head_rewards, rows[[1, 2, 0]], rtol=0, atol=1e-5)
    forward.activate("member1")
    outputs = forward.forward_pairs(pack_pairs(pairs, layout=layout, pad_token_id=0))
    torch.testing.assert_close(outputs[0, :, 0], rows[:, 1], rtol=0, atol=1e-5)


def test_bfloat16_keeps_the_head_in_float32(policy_dir, tokenizer):
    exact = members_of(policy_dir, ["member0"])
    base = load_classifier(policy_dir, pad_token_id=0, seed=0, dtype=torch.bfloat16)
    model = add_members(base, ["member0"], rank=2, alpha=4, seeds=[10], head_seeds=[10])
    model.load_state_dict({k: v for k, v in exact.model.state_dict().items() if "lora" in k or "score" in k}, False)
    forward = ClassifierForward(model, autocast_dtype=torch.bfloat16)
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n or "score" in n} == {torch.float32}
    responses = [f"answer {i}" for i in range(40)]
    rounded, full = (
        TextReward(f, tokenizer, members=["member0"]).posterior_of_texts([PROMPT] * 40, responses).mean
        for f in (forward, exact)
    )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, full, rtol=0, atol=0.02)
    assert not torch.equal(rounded, rounded.bfloat16().float())  # outputs of a bfloat16 head would be


def test_members_load_back_from_plain_peft_directories(policy_dir, tokenizer, tmp_path):
    forward = members_of(policy_dir, ["member0", "member1"])
    forward.model.save_pretrained(tmp_path)
    base = load_classifier(policy_dir, pad_token_id=0, seed=99)
    loaded = ClassifierForward(load_members(base, [tmp_path / "member0", tmp_path / "member1"]))
    expected, found = (
        TextReward(f, tokenizer, members=["member0", "member1"])
        .posterior_of_texts([PROMPT] * 3, RESPONSES)
        .head_rewards
        for f in (forward, loaded)
    )
    assert torch.equal(found, expected)
    with pytest.raises(ModelError, match="adapter_model"):
        load_members(base, [tmp_path / "c"])


def test_an_external_classifier_with_another_tokenizer_reads_the_texts(policy_dir, tokenizer, make_tokenizer, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}<eos>"
    own = make_tokenizer(template, merges=(("e", "r"),), specials=())
    labels = {0: "other", 1: "quality"}
    config = LlamaConfig(vocab_size=len(own), num_labels=2, id2label=labels, pad_token_id=0, **SIZES)
    model = classifier(config, tmp_path / "external")
    column = reward_column(model.config, "quality", where="external")
    reward = TextReward(ClassifierForward(model), tokenizer, own_tokenizer=own, column=column)
    response_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in RESPONSES]
    belief = reward.posterior([encode_prompt(tokenizer, PROMPT)] * 3, response_ids)
    for text, value in zip(RESPONSES, belief.mean, strict=True):
        ids = own(f"[user]Hi there[assistant]{text}<eos>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(value, model(ids).logits[0, 1], rtol=0, atol=1e-6)

    forged = reward.posterior_of_texts([PROMPT], [f"<eos>{RESPONSES[0]}<eos>"])
    assert torch.equal(forged.mean, reward.posterior_of_texts([PROMPT], RESPONSES[:1]).mean)

    cost = TextReward(ClassifierForward(model), tokenizer, own_tokenizer=own, column=column, is_cost=True)
    assert torch.equal(cost.posterior_of_texts([PROMPT] * 3, RESPONSES).mean, -belief.mean)
    with pytest.raises(ModelError, match="no conversation gives"):
        reward.posterior([[5, 6, 7]], [[8]])


def test_an_encoder_without_a_chat_template_reads_prompt_and_response(tokenizer, make_tokenizer, tmp_path):
    own = make_tokenizer(None, adds_bos=True, specials=())
    config = BertConfig(vocab_size=len(own), num_labels=1, pad_token_id=0, max_position_embeddings=64, **SIZES)
    model = classifier(config, tmp_path / "encoder")
    reward = TextReward(ClassifierForward(model), tokenizer, own_tokenizer=own)
    belief = reward.posterior_of_texts([PROMPT] * 3, [*RESPONSES[:2], "long " * 30])
    for text, value in zip(RESPONSES[:2], belief.mean, strict=False):
        ids = own(f"Hi there\n\n{text}", return_tensors="pt")["input_ids"]
        assert int(ids[0, 0]) == own.bos_token_id
        torch.testing.assert_close(value, model(ids).logits[0, 0], rtol=0, atol=1e-6)


def test_a_classifier_with_dropout_scores_alike_twice(policy_dir, tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, attention_dropout=0.5, **SIZES)
    model = classifier(config, tmp_path / "dropout")
    reward = TextReward(ClassifierForward(model), tokenizer)
    first, second = (reward.posterior_of_texts([PROMPT] * 3, RESPONSES).mean for _ in range(2))
    assert torch.equal(first, second)
    model.train()  # what the scores above would be if the model had been loaded for training
    assert not torch.equal(reward.posterior_of_texts([PROMPT] * 3, RESPONSES).mean, first)


def test_an_external_decoder_is_read_as_it_was_trained_when_its_pad_token_ends_responses(
    policy_dir, tokenizer, tmp_path
):
    """Plain transformers on one unpadded row decides, also in batches and pairs."""
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.eos_token_id, **SIZES)
    model = classifier(config, tmp_path / "eos_pad")
    reward = TextReward(ClassifierForward(model), tokenizer)
    prompt = encode_prompt(tokenizer, PROMPT)
    texts = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in RESPONSES]
    belief = reward.posterior([prompt] * 3, texts)
    plain = torch.cat([model(torch.tensor([[*prompt, *ids]])).logits[:, 0] for ids in texts])
    torch.testing.assert_close(belief.mean, plain, rtol=0, atol=1e-6)
    pair = TokenizedPair(
        prompt_ids=np.asarray(prompt), chosen_ids=np.asarray(texts[0]), rejected_ids=np.asarray(texts[1])
    )
    chosen, rejected = reward.posterior_of_pairs([pair])
    torch.testing.assert_close(torch.cat([chosen.mean, rejected.mean]), plain[:2], rtol=0, atol=1e-6)


def test_labels_are_asked_for_and_listed():
    config = LlamaConfig(num_labels=2, id2label={0: "helpful", 1: "safe"})
    assert reward_column(LlamaConfig(num_labels=1), None, where="m") == 0
    assert reward_column(config, "safe", where="m") == 1
    for label in (None, "kind"):
        with pytest.raises(ModelError, match=r"m has the outputs \['helpful', 'safe'\]"):
            reward_column(config, label, where="m")


def test_inputs_that_cannot_be_scored_are_refused(policy_dir, tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, max_position_embeddings=16, **SIZES)
    model = classifier(config, tmp_path / "short")
    reward = TextReward(ClassifierForward(model), tokenizer)
    with pytest.raises(DataError, match="2 prompts and 1 responses"):
        reward.posterior([[1], [1]], [[2]])
    with pytest.raises(ModelError, match="16 positions"):
        reward.posterior([[1] * 15], [[40, 41]])
    assert len(reward.posterior([], [])) == 0
    with torch.no_grad():
        model.score.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        reward.posterior([[1]], [[40]])


def test_a_classifier_that_reads_its_head_elsewhere_is_refused(tokenizer, tmp_path):
    class First(LlamaForSequenceClassification):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            output = super().forward(input_ids[:, :1], **options)
            return output

    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **SIZES)
    with pytest.raises(ModelError, match="does not read its head at the last token"):
        ClassifierForward(First(config).eval())


def test_batches_keep_to_the_budget_and_hold_every_row_once():
    lengths = [5, 1, 9, 3, 3, 30]
    batches = length_batches(lengths, 12)
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 12 for batch in batches if len(batch) > 1)
    assert len(batches) == 4  # 1+3+3, 5, 9, 30


def test_a_member_directory_answers_in_plain_peft(policy_dir, tokenizer, tmp_path):
    from peft import PeftModel

    forward = members_of(policy_dir, ["member0"])
    forward.model.save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(policy_dir, num_labels=1, dtype=torch.float32)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        plain = PeftModel.from_pretrained(base, tmp_path / "member0").eval()
    ids = [*encode_prompt(tokenizer, PROMPT), 40, 2]
    reward = TextReward(forward, tokenizer, members=["member0"])
    expected = reward.posterior([ids[:-2]], [[40]]).mean
    torch.testing.assert_close(plain(torch.tensor([ids])).logits[:, 0].detach(), expected, rtol=0, atol=1e-6)
