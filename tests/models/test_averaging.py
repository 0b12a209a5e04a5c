"""Averages of policies: their weights, what they are written as, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from tiny_run import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from launch.cli import main
from raylign.errors import ConfigError, ModelError, OutputExistsError, ShapeError
from raylign.models.averaging import average_policies, merge_adapter
from raylign.models.loading import load_policy, load_tokenizer


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and another with other weights."""
    first, second = (save_tiny_model(tmp_path_factory.mktemp(name)) for name in ("helpful", "safe"))
    tiny_model(seed=1).save_pretrained(second)
    return first, second


def save_adapter(base: Path, directory: Path) -> PeftModel:
    """An adapter that moves its base, with the tokenizer beside it."""
    adapted = load_policy(base, adapter="lora", lora_rank=2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_every_weight_lies_between_those_of_both(stages, tmp_path, share: float) -> None:
    output = average_policies(*stages, tmp_path / "average", trained_share=share)
    start, trained, found = (load_policy(path).state_dict() for path in (*stages, output))
    assert found.keys() == start.keys()
    for name, weight in found.items():
        expected = (1 - share) * start[name].double() + share * trained[name].double()
        torch.testing.assert_close(weight.double(), expected, atol=1e-7, rtol=0)
    if share == 1.0:
        assert all(torch.equal(weight, trained[name]) for name, weight in found.items())
    assert load_tokenizer(output).chat_template


def test_an_adapter_counts_with_its_base(stages, tmp_path) -> None:
    """The average of a model with an adapter on it is the average of their functions' weights."""
    base, _ = stages
    adapted = save_adapter(base, tmp_path / "adapter")
    output = average_policies(base, tmp_path / "adapter", tmp_path / "average", trained_share=0.5)
    start, merged, found = (load_policy(base), adapted.merge_and_unload(), load_policy(output))
    moved = 0
    for name, weight in found.state_dict().items():
        expected = (start.state_dict()[name] + merged.state_dict()[name]) / 2
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
        moved += not torch.equal(weight, start.state_dict()[name])
    assert moved > 5


def test_a_merged_adapter_is_a_plain_model_that_answers_as_the_adapter_does(stages, tmp_path) -> None:
    base, _ = stages
    adapted = save_adapter(base, tmp_path / "adapter")
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(model(ids).logits, load_policy(base)(ids).logits, atol=1e-2)
    assert load_tokenizer(tmp_path / "merged").chat_template
    with pytest.raises(OutputExistsError, match="name a new directory"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ModelError, match=r"holds no adapter: adapter_config\.json is missing"):
        merge_adapter(base, tmp_path / "other")


def test_what_is_refused(stages, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"trained_share=1\.5 must be in \[0, 1\]"):
        average_policies(*stages, tmp_path / "average", trained_share=1.5)
    with pytest.raises(OutputExistsError, match="name a new directory"):
        average_policies(*stages, tmp_path, trained_share=0.5)
    from transformers import LlamaForCausalLM

    config = tiny_model().config
    config.intermediate_size = 40
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ShapeError, match="in member 1 and"):
        average_policies(stages[0], tmp_path / "other", tmp_path / "average", trained_share=0.5)
