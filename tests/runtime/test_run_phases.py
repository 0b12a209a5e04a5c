"""What the phases leave in a run's directory, without Ray."""

from __future__ import annotations

import pytest

from raylign.config import load_config
from raylign.errors import ConfigError
from raylign.runtime.phases import Run
from raylign.runtime.reporting import cut_warnings
from raylign.runtime.run_phases import Phases


def test_the_link_follows_a_training_that_was_done_again(tmp_path):
    phases = Phases(config=load_config(), run=Run(tmp_path), model="")
    for step in ("step_0000100", "step_0000200"):
        policy = tmp_path / "train" / step / "policy"
        policy.mkdir(parents=True)
        assert phases._link({"checkpoint": str(policy)})[0] == policy
        assert (tmp_path / "checkpoint").resolve() == policy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "train"]


def test_a_bucket_is_no_storage():
    with pytest.raises(ConfigError, match=r"run\.storage.*mount the bucket"):
        load_config(overrides=["run.storage=s3://bucket/runs"])


@pytest.mark.parametrize(("cut", "is_told"), [(10, False), (11, True)])
def test_a_report_warns_of_cut_answers(cut, is_told):
    warnings = cut_warnings({"cut": cut, "used": 100})
    assert bool(warnings) == is_told
    assert not is_told or "6% of the answers were cut at data.max_length" in warnings[0]
