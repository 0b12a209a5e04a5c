"""Held-out pairs with the reward of every token: a made-up reward, and the tokenizer of the embedded model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.models.loading import load_tokenizer, resolve_model
from raylign.rewards.posterior import ensemble_posterior
from raylign.runtime.phases import write_json
from raylign.runtime.token_examples import (
    EXAMPLES_FILE,
    PHASE,
    read_token_examples,
    token_examples,
    token_texts,
    total_sigma,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("embedded"))


class IdsAsRewards:
    """Two members, one a unit above and one below the token's id; each states a sigma, or none."""

    def __init__(self, stated: float | None, spread: float = 1.0) -> None:
        self.stated, self.spread = stated, spread

    def token_rewards(self, prompt_ids: Any, response_ids: Any, *, rule: Any = lambda belief: belief.mean) -> Any:
        found = []
        for ids in response_ids:
            mu = torch.tensor(np.asarray(ids), dtype=torch.float32)[:, None] + torch.tensor([-1.0, 1.0]) * self.spread
            scales = None if self.stated is None else torch.full_like(mu, self.stated)
            found.append(rule(ensemble_posterior(mu, scales)).numpy())
        return found


def pair(tokenizer: Any, chosen: str, rejected: str) -> dict[str, Any]:
    ids = {name: tokenizer(text)["input_ids"] for name, text in (("chosen_ids", chosen), ("rejected_ids", rejected))}
    return {"prompt_ids": [1, 2, 3], **ids}


def test_both_responses_of_a_pair_come_with_means_and_sigmas(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [pair(tokenizer, "Yes, of course.", "No"), pair(tokenizer, "A", "Something else")]
    found = token_examples(IdsAsRewards(stated=2.0), tokenizer, ["first", "second"], pairs)
    assert [(one.prompt, one.label) for one in found] == [
        *(("first", "chosen"), ("first", "rejected"), ("second", "chosen"), ("second", "rejected"))
    ]
    assert found[0].means == tuple(float(token) for token in pairs[0]["chosen_ids"])
    assert "".join(found[0].tokens) == tokenizer.decode(pairs[0]["chosen_ids"])
    assert found[3].sigmas == pytest.approx([5**0.5] * len(found[3].tokens))  # 2^2 stated and 1^2 of disagreement
    (tmp_path / PHASE).mkdir()
    write_json(tmp_path / PHASE / EXAMPLES_FILE, [asdict(one) for one in found])
    assert read_token_examples(tmp_path) == tuple(found)


def test_without_any_doubt_there_is_no_sigma(tokenizer: Any, tmp_path: Path) -> None:
    [chosen, _] = token_examples(IdsAsRewards(None, spread=0.0), tokenizer, ["p"], [pair(tokenizer, "Yes", "No")])
    assert chosen.sigmas is None
    assert read_token_examples(tmp_path) == ()


def test_sigma_is_that_of_the_mixture_of_members() -> None:
    mu, scales = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1.0, 2.0], [0.5, 0.5]])
    torch.testing.assert_close(total_sigma(ensemble_posterior(mu, scales)), torch.tensor([1.0 + 2.5, 0.25]).sqrt())
    torch.testing.assert_close(total_sigma(ensemble_posterior(mu)), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("text", ["Two  words.\nNext line", "\U0001f600 \u4f60\u597d", "<eos>", " a"])
def test_texts_of_tokens_add_up_and_no_character_is_torn(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "\ufffd" not in "".join(texts)
