"""What a checkpoint belongs to, where a constraint decides the weights."""

from __future__ import annotations

from pathlib import Path

from raylign.config import load_config
from raylign.runtime.identity import method_identity, run_identity

CONSTRAINED = ["train.method=policy_gradient", "constraint.kind=rectified"]


def test_a_constraint_counts_but_for_its_metrics():
    plain = method_identity(load_config(None, CONSTRAINED[:1]))
    assert not [key for key in plain if key.startswith("constraint.")]
    first = method_identity(load_config(None, CONSTRAINED))
    assert (first["constraint.kind"], first["constraint.multiplier_window"]) == ("rectified", 128)
    assert "constraint.threshold" not in first  # idle
    for override, counts in (("multiplier=2", True), ("tolerance=0.1", True), ("cvar_level=0.5", False)):
        other = method_identity(load_config(None, [*CONSTRAINED, f"constraint.{override}"]))
        assert (other != first) == counts, override


def test_the_cost_model_counts_where_a_constraint_reads_it(tmp_path: Path):
    def directory(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(content)
        return tmp_path / name

    paths = {"model": directory("model", "m"), "reward": directory("reward", "r")}
    costs = directory("cost", "c"), directory("other", "d")
    for overrides, counts in ((CONSTRAINED, True), (CONSTRAINED[:1], False)):
        config = load_config(None, overrides)
        found = [run_identity(config, **paths, cost=cost) for cost in (*costs, None)]
        assert (found[0] != found[1]) == (found[0] != found[2]) == counts


def test_the_credit_of_tokens_counts_where_it_is_read():
    plain = method_identity(load_config(None, CONSTRAINED[:1]))
    assert not [key for key in plain if key.startswith("token_reward.") or key == "policy_gradient.credit"]
    by_token = [CONSTRAINED[0], "reward.kind=ava_p", "policy_gradient.credit=token"]
    first = method_identity(load_config(None, by_token))
    assert (first["policy_gradient.credit"], first["token_reward.credit"]) == ("token", "own")
    assert "token_reward.dense_weight" not in first  # idle
    assert method_identity(load_config(None, [*by_token, "token_reward.credit=differences"])) != first
