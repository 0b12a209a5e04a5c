"""Model directories: what loads, what is refused and why, and what changes a fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from raylign.data.packing import pack_pairs
from raylign.errors import ModelError
from raylign.models.forward import PolicyForward, verify_logprobs
from raylign.models.loading import (
    artefact_fingerprint,
    check_context,
    load_config,
    load_policy,
    load_tokenizer,
    model_fingerprint,
    resolve_dtype,
    resolve_layout,
    resolve_model,
    tokenizer_fingerprint,
)
from raylign.types import TokenizedPair

TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(directory)
    words = {"<unk>": 0, "<eos>": 1} | {letter: 2 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ,.-A")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loads_frozen_in_evaluation_mode_and_passes_the_probe(model_dir: Path) -> None:
    before = torch.random.get_rng_state()
    model, tokenizer = load_policy(model_dir, dtype="float32"), load_tokenizer(model_dir)

    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    verify_logprobs(model, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_with_capped_scores_load_with_attention_that_caps(model_dir: Path, tmp_path: Path) -> None:
    config = Gemma2Config(**CONFIG, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    model = load_policy(tmp_path / "gemma2", dtype="float32")

    assert model.config._attn_implementation == "eager"
    verify_logprobs(model, load_tokenizer(model_dir), layout=resolve_layout("auto", model.config))


def test_auto_is_float32_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_dtype("auto") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16


def test_auto_follows_the_device_of_the_forward_not_a_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray leaves GPUs visible to actors that asked for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda") == torch.bfloat16


def test_lora_trains_only_the_adapter_and_starts_at_the_base(model_dir: Path) -> None:
    prompt, rejected = np.array([3, 4, 5], np.int32), np.array([6, 7], np.int32)
    pair = TokenizedPair(prompt_ids=prompt, chosen_ids=prompt, rejected_ids=rejected)
    batch = pack_pairs([pair], layout="shared", pad_token_id=0)
    base = PolicyForward(load_policy(model_dir, dtype="float32"))
    lora = PolicyForward(load_policy(model_dir, dtype="float32", adapter="lora", lora_rank=2, seed=1))
    scores = lora(batch, layers=(1, 2))
    scores.chosen_logps.sum().backward()

    torch.testing.assert_close(scores.chosen_logps, base(batch).chosen_logps, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.chosen_states, base(batch, layers=(1, 2)).chosen_states, rtol=0, atol=1e-6)
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert any(p.grad is not None and p.grad.any() for p in lora.parameters())


def test_lora_start_depends_on_its_seed_only(model_dir: Path) -> None:
    def first_factor(seed: int) -> torch.Tensor:
        torch.rand(3)
        model = load_policy(model_dir, dtype="float32", adapter="lora", seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_factor(1), first_factor(1))
    assert not torch.equal(first_factor(1), first_factor(2))


def test_a_saved_adapter_loads_on_its_base(model_dir: Path, tmp_path: Path) -> None:
    model = load_policy(model_dir, dtype="float32", adapter="lora", lora_rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(tmp_path / "adapter", dtype="float32")
    ids = torch.tensor([[3, 4, 5]])

    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    assert model_fingerprint(tmp_path / "adapter") != model_fingerprint(model_dir)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="does not exist"):
        load_policy(tmp_path / "adapter")


def test_an_adapter_is_no_policy_to_start_from_until_it_is_merged(model_dir: Path, tmp_path: Path) -> None:
    load_policy(model_dir, adapter="lora").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds an adapter; merge it first: raylign merge"):
        load_config(tmp_path)


def test_gradient_checkpointing_is_on_in_training_mode(model_dir: Path) -> None:
    for adapter in ("full", "lora"):
        model = load_policy(model_dir, adapter=adapter, gradient_checkpointing=True).train()
        layers = PolicyForward(model).decoder_layers()
        assert all(layer.gradient_checkpointing for layer in layers)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_policy(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        model_fingerprint(tmp_path)


def test_pickled_weights_are_not_read(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="convert the model, other formats are not read"):
        load_policy(model_dir)


def test_weights_that_lack_tensors_are_refused(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"the weights lack model\.layers\.2.* and 4 more"):
        load_policy(model_dir)


def test_weights_of_another_shape_are_refused(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", intermediate_size=40)
    with pytest.raises(ModelError, match="cannot load"):
        load_policy(model_dir)


def test_a_classifier_is_no_policy(model_dir: Path, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(LlamaConfig(**CONFIG))
    classifier.save_pretrained(tmp_path / "judge")
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, expected a causal language model"):
        load_policy(tmp_path / "judge")


def test_a_tokenizer_must_have_a_chat_template_and_an_end(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        load_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").write_text(TEMPLATE)
    edit_json(model_dir / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="names no eos_token"):
        load_tokenizer(model_dir)


def test_fingerprints_follow_content_not_place(model_dir: Path, made_once: Path) -> None:
    assert model_fingerprint(model_dir) == model_fingerprint(made_once)
    assert tokenizer_fingerprint(model_dir) == tokenizer_fingerprint(made_once)

    (model_dir / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert model_fingerprint(model_dir) == model_fingerprint(made_once)
    assert tokenizer_fingerprint(model_dir) != tokenizer_fingerprint(made_once)

    weights = model_dir / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(model_dir) != model_fingerprint(made_once)


def test_sequences_must_fit_into_the_positions(model_dir: Path) -> None:
    config = load_config(model_dir)
    check_context(config, 64)
    with pytest.raises(ModelError, match=r"65 tokens \(config key data\.max_length\).* 64 positions.*policy\.model"):
        check_context(config, 65)
    check_context(MambaConfig(), 10**6)  # positions that are not numbered have no end


def test_a_fitted_reward_is_its_facts_and_the_weights_of_all_its_members(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "full" / "member0").mkdir(parents=True)
    (tmp_path / "reward.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, tmp_path / "full" / "member0" / "adapter_model.safetensors")
    before = artefact_fingerprint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"seconds": 3}')
    assert artefact_fingerprint(tmp_path) == before
    save_file({"w": torch.ones(2)}, tmp_path / "full" / "member0" / "adapter_model.safetensors")
    changed = artefact_fingerprint(tmp_path)
    assert changed != before
    (tmp_path / "reward.json").write_text('{"temperature": 2}')
    assert artefact_fingerprint(tmp_path) not in (before, changed)
