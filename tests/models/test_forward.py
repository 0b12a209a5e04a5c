"""One forward, four ways: shared, packed, padded, and transformers' own logits one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raylign.data.packing import pack_pairs
from raylign.errors import ModelError
from raylign.losses import logprobs
from raylign.models.forward import PolicyForward, resolve_layers, verify_logprobs
from raylign.models.loading import resolve_layout, supports_shared_prompt
from raylign.types import Layout, PairScores, TokenizedPair

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> options beyond SIZES
SHAREABLE: dict[str, dict[str, object]] = {
    "gemma": {},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}


def make_model(
    model_type: str = "llama", *, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: object
) -> PreTrainedModel:
    sizes = {} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **SHAREABLE.get(model_type, {}), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():
            # larger than the default start, so that attention is far from uniform and a leak through the mask shows
            torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.3)
    return model.to(dtype).eval()


def make_pairs(num_pairs: int = 6, seed: int = 0) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(1, VOCAB, rng.integers(1, 14)).astype(np.int32)

    return [TokenizedPair(prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for _ in range(num_pairs)]


def score(
    model: torch.nn.Module, pairs: list[TokenizedPair], layout: Layout = "shared", **options: object
) -> PairScores:
    return PolicyForward(model)(pack_pairs(pairs, layout=layout, pad_token_id=0), **options)


def plain_logps(model: PreTrainedModel, prompt_ids: np.ndarray, response_ids: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None]).sum()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [g.clone() for g in torch.autograd.grad(loss, trainable)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SHAREABLE)
def test_every_layout_equals_the_models_own_logits(model_type: str, layout: Layout) -> None:
    model, pairs = make_model(model_type), make_pairs()
    scores = score(model, pairs, layout)
    chosen = torch.stack([plain_logps(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    rejected = torch.stack([plain_logps(model, pair.prompt_ids, pair.rejected_ids) for pair in pairs])

    assert supports_shared_prompt(model.config)
    # transformers' RMS norms and rotary angles are float32 whatever the model's type; GPT-2 has neither
    tolerance = 1e-10 if model_type == "gpt2" else 1e-5
    torch.testing.assert_close(scores.chosen_logps, chosen, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.rejected_logps, rejected, rtol=tolerance, atol=tolerance)
    assert scores.chosen_lengths.tolist() == [len(pair.chosen_ids) for pair in pairs]
    assert scores.rejected_lengths.tolist() == [len(pair.rejected_ids) for pair in pairs]

    margins = torch.nn.functional.logsigmoid(scores.chosen_logps - scores.rejected_logps).sum()
    expected = torch.nn.functional.logsigmoid(chosen - rejected).sum()
    torch.testing.assert_close(
        gradients(model, margins), gradients(model, expected), rtol=10 * tolerance, atol=tolerance
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_attention_honours_the_same_masks(layout: Layout) -> None:
    pairs = make_pairs()
    torch.testing.assert_close(
        score(make_model(attention="eager"), pairs, layout).chosen_logps,
        score(make_model(), pairs, layout).chosen_logps,
        rtol=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_states_are_those_of_output_hidden_states_at_the_end_token(model_type: str, layout: Layout) -> None:
    model, pairs = make_model(model_type), make_pairs()
    scores = score(model, pairs, layout, layers=(2, 1))
    assert scores.chosen_states is not None and scores.rejected_states is not None

    for b, pair in enumerate(pairs):
        for answer, states in ((pair.chosen_ids, scores.chosen_states), (pair.rejected_ids, scores.rejected_states)):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer]).astype(np.int64))[None]
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            expected = torch.stack([hidden[2][0, -1], hidden[1][0, -1]]).float()
            torch.testing.assert_close(states[b], expected, rtol=1e-5, atol=1e-5)
    assert scores.chosen_states.dtype == torch.float32
    assert not scores.chosen_states.requires_grad


def test_asking_for_states_leaves_scores_and_hooks_alone() -> None:
    model, pairs = make_model(), make_pairs()
    with_states, without = score(model, pairs, layers=(1,)), score(model, pairs)

    torch.testing.assert_close(with_states.chosen_logps, without.chosen_logps, rtol=0, atol=0)
    assert without.chosen_states is None
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match=r"\[3\] do not exist: the model has layers 1 to 2"):
        score(model, pairs, layers=(3,))
    assert not any(module._forward_hooks for module in model.modules())


def test_order_and_company_of_a_pair_do_not_matter() -> None:
    model, pairs = make_model(), make_pairs(9)
    everything = score(model, pairs)
    order = [4, 0, 8]
    some = score(model, [pairs[b] for b in order])

    torch.testing.assert_close(some.chosen_logps, everything.chosen_logps[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(some.rejected_logps, everything.rejected_logps[order], rtol=1e-9, atol=1e-9)


def test_swapping_the_answers_swaps_the_scores() -> None:
    model, pairs = make_model(), make_pairs()
    swapped = [
        TokenizedPair(prompt_ids=p.prompt_ids, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs
    ]
    torch.testing.assert_close(
        score(model, swapped).chosen_logps, score(model, pairs).rejected_logps, rtol=1e-9, atol=1e-9
    )


def test_float32_layouts_agree_to_float32() -> None:
    model, pairs = make_model(dtype=torch.float32), make_pairs()
    reference = score(model, pairs, "padded")
    for layout in ("shared", "packed"):
        torch.testing.assert_close(
            score(model, pairs, layout).chosen_logps, reference.chosen_logps, rtol=1e-5, atol=1e-4
        )


def test_recomputed_logits_and_kept_logits_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = make_model(), make_pairs()
    results = []
    for limit in (2**62, 0):
        monkeypatch.setattr(logprobs, "_DIRECT_ELEMENTS", limit)
        scores = PolicyForward(model, chunk_tokens=7)(pack_pairs(pairs, layout="shared", pad_token_id=0))
        results.append(gradients(model, (scores.chosen_logps - scores.rejected_logps).sum()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_neither_gradients_nor_states() -> None:
    model, pairs = make_model().train(), make_pairs()
    plain = score(model, pairs, layers=(1, 2))
    expected = gradients(model, plain.chosen_logps.sum())
    model._activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = score(model, pairs, layers=(1, 2))

    torch.testing.assert_close(gradients(model, checkpointed.chosen_logps.sum()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(checkpointed.chosen_states, plain.chosen_states, rtol=0, atol=0)


def test_bfloat16_and_mixed_precision_stay_near_float32() -> None:
    pairs = make_pairs()
    exact = score(make_model(dtype=torch.float32), pairs).chosen_logps
    low = score(make_model(dtype=torch.bfloat16), pairs)
    batch = pack_pairs(pairs, layout="shared", pad_token_id=0)
    mixed_model = make_model(dtype=torch.float32)
    mixed = PolicyForward(mixed_model, autocast_dtype=torch.bfloat16)(batch, layers=(1, 2))
    mixed.chosen_logps.sum().backward()

    lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs])
    for scores in (low, mixed):
        assert scores.chosen_logps.dtype == torch.float32
        assert ((scores.chosen_logps - exact) / lengths).abs().max() < 0.25
        assert not torch.equal(scores.chosen_logps, exact), "the lower precision was not used"
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixed_model.parameters())


def test_sliding_windows_are_padded_and_correct() -> None:
    pairs = make_pairs()
    for model in (make_model("mistral", sliding_window=4), make_model("gemma3_text", sliding_window=4)):
        assert not supports_shared_prompt(model.config)
        assert resolve_layout("auto", model.config) == "padded"
        with pytest.raises(ModelError, match=r"train\.layout=shared needs full attention"):
            resolve_layout("shared", model.config)
        scores = score(model, pairs, "padded")
        chosen = torch.stack([plain_logps(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs])
        torch.testing.assert_close(scores.chosen_logps, chosen, rtol=1e-6, atol=1e-6)


def test_auto_shares_where_it_can() -> None:
    config = make_model().config
    assert [resolve_layout(layout, config) for layout in ("auto", *LAYOUTS)] == ["shared", *LAYOUTS]


def test_layers_are_named_from_one() -> None:
    assert resolve_layers("all", 3) == (1, 2, 3)
    assert resolve_layers([3, 1], 3) == (3, 1)
    for bad in ([], [0], [4], [1, 1]):
        with pytest.raises(ModelError, match="distinct layers of 1 to 3"):
            resolve_layers(bad, 3)


class CharacterTokenizer:
    """Stands in for a tokenizer: one token per letter."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCAB for letter in text[:100]]}


@pytest.mark.parametrize(
    "options", [{}, {"model_type": "gemma2", "final_logit_softcapping": 3.0, "sliding_window": 512}]
)
def test_the_probe_accepts_heads_that_are_implemented(options: dict[str, object]) -> None:
    model = make_model(dtype=torch.float32, attention="eager", **options)  # type: ignore[arg-type]
    verify_logprobs(model, CharacterTokenizer(), layout="padded")  # type: ignore[arg-type]


def test_the_probe_refuses_scaled_logits() -> None:
    model = make_model("cohere", dtype=torch.float32, logit_scale=0.25)
    with pytest.raises(ModelError, match=r"CohereForCausalLM with layout 'padded': log-probability"):
        verify_logprobs(model, CharacterTokenizer(), layout="padded")  # type: ignore[arg-type]


def test_the_probe_refuses_attention_that_ignores_the_mask() -> None:
    model = make_model("mistral", dtype=torch.float32, sliding_window=4)
    with pytest.raises(ModelError, match="layout 'shared'"):
        verify_logprobs(model, CharacterTokenizer(), layout="shared")  # type: ignore[arg-type]


def test_a_module_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel is no causal language model"):
        PolicyForward(make_model().base_model)
