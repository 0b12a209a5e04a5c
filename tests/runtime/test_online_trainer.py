"""The online methods on real vLLM: rounds sampled and trained on, a killed driver, and what is refused.

Real here: Ray Train, a vLLM engine on the CPU, the scorer, the embedded model. Each test that samples starts an engine,
which takes some twenty seconds.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
import ray.train
import torch
from tiny_token_reward import save_token_reward
from transformers import AutoModelForCausalLM

from raylign.config import load_config
from raylign.errors import DataError, OutputExistsError, ResourceError
from raylign.models.loading import resolve_model
from raylign.runtime.fitted_reward import FittedReward, RewardFacts
from raylign.runtime.online_trainer import check_reward, run_online
from raylign.runtime.resources import ResourcePlan, check_plan
from raylign.runtime.text_rewards import make_text_reward
from raylign.training.rounds import RoundStore

NUM_ROUNDS = 2
W_NOMINAL = 0.3
SECTIONS = {
    "reward": {"kind": "brme", "num_heads": 3},
    "robust": {"w_nominal": W_NOMINAL},
    "online": {"num_rounds": NUM_ROUNDS, "prompts_per_round": 8, "num_samples": 2},
    "sampler": {"max_new_tokens": 12, "timeout_s": 120},
}
TRAIN = {"batch_size": 4, "checkpoint_every": 1, "log_every": 1, "keep_checkpoints": 9, "learning_rate": 1e-3}


class Scored(NamedTuple):
    """Pairs, a reward fitted on them, and the directory that the pairs lie in."""

    pairs: ray.data.Dataset
    reward: FittedReward
    storage: Path


@pytest.fixture(scope="module")
def scored(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Made from a few rows of the embedded data."""
    import raylign

    storage = tmp_path_factory.mktemp("storage")
    pairs = raylign.ingest("embedded", storage=storage, max_pairs=60)
    features = raylign.extract_features(pairs, storage=storage)
    reward = raylign.fit_reward(features, kind="brme", num_heads=3, folds=2, epochs=1, config={"brme": {"epochs": 1}})
    return Scored(pairs, reward, storage)


def run(scored: Scored, storage: Path, *, name: str, resume: bool = False, **train: Any) -> ray.train.Result:
    import raylign

    return raylign.train_online(
        scored.pairs, scored.reward, name=name, storage=storage, resume=resume, config=SECTIONS, **(TRAIN | train)
    )


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.vllm
def test_rounds_are_sampled_from_the_weights_of_their_start(scored: Scored, tmp_path: Path) -> None:
    result = run(scored, tmp_path, name="a")
    directory = tmp_path / "a"
    lines = records(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    ends = [line for line in lines if "sync/version" in line]
    assert [line["sync/version"] for line in ends] == [1, 2]
    assert all(abs(line["sync/probe_kl"]) < 1e-6 for line in ends)
    store = RoundStore(directory / "rounds")
    for index in range(NUM_ROUNDS):
        round_ = store.read(index)
        assert len(round_.scored) == 16
        assert {item.rollout.weight_version for item in round_.scored} == {index + 1}
        for item in round_.scored:
            assert item.head_rewards is not None and item.head_scales is not None
            nominal = item.head_rewards[item.head_scales.argmin()]
            mixed = W_NOMINAL * nominal + (1 - W_NOMINAL) * item.head_rewards.min()
            assert item.reward == pytest.approx(float(mixed), abs=1e-5)
            assert item.reward_variance > 0
        end = ends[index]
        assert sum(end[f"reward/argmin_share/{head}"] for head in range(3)) == pytest.approx(1)
        assert end["reward/disagreement"] > 0
    # the first round is sampled by the reference itself, so that its log-probabilities are the sampler's
    for item in store.read(0).scored:
        np.testing.assert_allclose(item.rollout.sampler_logps, item.reference_token_logps, atol=2e-4)
    # the second by the policy after the first, whose checkpoint plain transformers reads
    policy = AutoModelForCausalLM.from_pretrained(directory / "step_0000002" / "policy").eval()
    for item in store.read(1).scored[:4]:
        ids = torch.from_numpy(np.concatenate([item.rollout.prompt_ids, item.rollout.response_ids])).long()
        with torch.no_grad():
            logps = policy(input_ids=ids[None]).logits[0, len(item.rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[len(item.rollout.prompt_ids) :, None])[:, 0].numpy()
        np.testing.assert_allclose(item.rollout.sampler_logps, expected, atol=2e-4)
        assert np.abs(item.rollout.sampler_logps - item.reference_token_logps).max() > 1e-3
    assert result.metrics["step"] == 4
    with pytest.raises(OutputExistsError, match=r"run\.resume=true"):
        run(scored, tmp_path, name="a")
    await_free_cpus()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.vllm
def test_sampled_responses_are_trained_on_token_by_token(scored: Scored, tmp_path: Path) -> None:
    """Every stored response has the rewards that its reward model gives its tokens, and the records tell of them."""
    model = Path(resolve_model("embedded"))
    table = pa.concat_tables(ray.get(scored.pairs.to_arrow_refs()))
    reward = save_token_reward(tmp_path / "reward", table, model)
    values = {
        **{name: SECTIONS[name] for name in ("online", "sampler")},
        "reward": {"kind": "ava_p", "num_heads": 2},
        "train": {**TRAIN, "method": "policy_gradient"},
        "policy_gradient": {"credit": "token"},
    }
    config = load_config(values=values)
    run_online(
        scored.pairs, config=config, model_path=model, heads=reward, layers=(), storage_path=tmp_path, name="tokens"
    )
    judge = make_text_reward(model, config.reward_model, directory=reward / "full")
    for index in range(NUM_ROUNDS):
        items = RoundStore(tmp_path / "tokens" / "rounds").read(index).scored
        prompts, responses = zip(*((item.rollout.prompt_ids, item.rollout.response_ids) for item in items), strict=True)
        for item, expected in zip(items, judge.token_rewards(prompts, responses), strict=True):
            np.testing.assert_allclose(item.token_rewards, expected, atol=1e-4)
    told = [line["actor/token_reward/at_end"] for line in records(tmp_path / "tokens") if "sync/version" in line]
    assert len(told) == NUM_ROUNDS and all(0 < share < 1 for share in told)
    await_free_cpus()


def await_free_cpus() -> None:
    """Wait until engine, scorer and worker are gone."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


DRIVER = """
import sys, ray, raylign
from pathlib import Path
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.ingest_job import read_pairs
address, pairs, storage = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
raylign.train_online(
    read_pairs(Path(pairs)), FittedReward.load(Path(storage) / "reward"), name="a", storage=storage,
    config={sections}, **{train},
)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.vllm
def test_a_killed_driver_goes_on_without_repeating_or_losing_a_round(scored: Scored, tmp_path: Path) -> None:
    """SIGKILL right after the second round was sampled; the resumed run ends with the weights of an unbroken one."""
    run(scored, tmp_path, name="whole", method="policy_gradient")
    ends = [line for line in records(tmp_path / "whole") if "sync/version" in line]
    assert [line["importance/difference_max"] < 1e-3 for line in ends] == [True, True]
    storage = tmp_path / "broken"
    (storage / "reward").mkdir(parents=True)
    scored.reward.save(storage / "reward")
    code = DRIVER.replace("{sections}", repr(SECTIONS)).replace("{train}", repr(TRAIN | {"method": "policy_gradient"}))
    [pairs] = scored.storage.glob("pairs-*")
    address = ray.get_runtime_context().gcs_address
    rounds = storage / "a" / "rounds"
    driver = subprocess.Popen([sys.executable, "-c", code, address, str(pairs), str(storage)])
    wait_for(lambda: (rounds / "round_00002.parquet").exists(), driver)
    driver.kill()
    driver.wait()
    await_free_cpus()
    assert [line["step"] for line in records(storage / "a")] in ([1, 2], [1, 2, 3]), "the kill came after the end"
    before = {file.name: (file.stat().st_mtime_ns, digest(file)) for file in rounds.glob("*.parquet")}
    assert len(before) == 2
    run(scored, storage, name="a", resume=True, method="policy_gradient")
    after = {file.name: (file.stat().st_mtime_ns, digest(file)) for file in rounds.glob("*.parquet")}
    assert after == before
    assert [line["step"] for line in records(storage / "a")] == [1, 2, 3, 4]
    weights = "step_0000004/policy/model.safetensors"
    assert digest(storage / "a" / weights) == digest(tmp_path / "whole" / weights)


def wait_for(condition: Any, driver: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_too_few_cpus_are_told_with_the_arithmetic() -> None:
    config = load_config(values={"train": {"method": "online_dpo"}, "sampler": {"num_engines": 4}})
    with pytest.raises(ResourceError, match=r"1 training worker\(s\) x 1 \+ 4 sampling engine\(s\) x 0\.5 \+ 1 scorer"):
        check_plan(ResourcePlan.from_config(config), {"CPU": 2})


def test_a_reward_of_responses_cannot_train_token_by_token(tmp_path: Path) -> None:
    """Whatever reward.kind says: the fitted reward may come from elsewhere."""
    facts = {"centers": (0.0,), "full_center": 0.0, "temperature": 1.0, "fold_seed": 0, "metrics": {}}
    RewardFacts(kind="warm", **facts).save(tmp_path)
    values: dict[str, Any] = {"train": {"method": "policy_gradient"}, "reward": {"kind": "ava_p"}}
    check_reward(tmp_path, (), load_config(values=values))
    by_token = load_config(values={**values, "policy_gradient": {"credit": "token"}})
    with pytest.raises(DataError, match="the fitted reward is of kind warm; fit one of ava_p"):
        check_reward(tmp_path, (), by_token)
    RewardFacts(kind="ava_d", **facts).save(tmp_path)
    check_reward(tmp_path, (), by_token)
