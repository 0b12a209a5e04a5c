"""The projection table, at the settings for which the spec works out the orders of magnitude."""

from __future__ import annotations

import pytest

from raylign.cost.flops import ModelShape
from raylign.cost.projection import SIZES, ProjectionSettings, project
from raylign.errors import ConfigError

AUTHORS = ProjectionSettings(
    num_prompts=4000, num_samples=8, prompt_tokens=30, response_tokens=256, num_pairs=1600, is_adapter=False
)


def rows(model: str, settings: ProjectionSettings = AUTHORS):
    return {(row.side, row.phase): row.counts for row in project([model], settings)}


def test_orders_of_magnitude_at_the_authors_settings():
    found = rows("7B")
    generate, head = found["online", "generate"], found["rerank", "reward_head"]
    assert generate.generated_tokens == 8_192_000
    assert generate.flops / head.flops == pytest.approx(1.5e8, rel=0.1)
    shape = ModelShape.from_config(SIZES["7B"])
    assert generate.flops / (2 * AUTHORS.num_pairs * shape.forward(286)) == pytest.approx(10, rel=0.02)
    assert found["rerank", "feature_forward"].decode_steps == 0
    assert found["rerank", "feature_forward"].generated_tokens == 0
    assert generate.decode_steps == 256


@pytest.mark.parametrize(("model", "num_weights"), [("7B", 6.74e9), ("13B", 13.0e9), ("70B", 69.0e9)])
def test_sizes_have_the_weights_they_are_named_for(model, num_weights):
    assert rows(model)["online", "weight_sync"].synced_bytes / 2 == pytest.approx(num_weights, rel=0.002)


def test_both_sides_train_on_the_same_pairs():
    found = rows("70B")
    assert found["online", "policy_update"] == found["rerank", "policy_update"]
    assert found["online", "policy_update"].flops == 3 * found["rerank", "feature_forward"].flops


def test_every_row_says_what_it_is():
    table = project(["7B", "70B"], AUTHORS)
    assert len(table) == 14
    assert {row.label for row in table} == {"projection"}
    assert {row.status for row in table} == {"computed"}


def test_an_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="8B are not known; projections exist for 7B, 13B, 70B"):
        project(["8B"], AUTHORS)
