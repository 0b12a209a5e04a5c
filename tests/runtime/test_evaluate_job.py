"""Evaluation on Ray: the pool gives what the plain classes give, and nothing is lost on the way.

Real: Ray Data, generation, the refusal detector. Policies and judge are tiny and have random weights; the judge's
labels are put the right way round for the sign check, because which way random weights point is chance.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from raylign.assets import asset_path
from raylign.config import EvaluateSection, FeaturesSection, RewardModelSection, RobustSection
from raylign.errors import ConfigError, DataError, ModelError
from raylign.evaluation.judges import SafetyJudge
from raylign.evaluation.prompts import load_prompts, select_prompts
from raylign.evaluation.refusal import load_refusal_labels
from raylign.models.numerics import actor_device
from raylign.rewards.hybrid import HybridReward
from raylign.runtime import evaluators, reward_scorer
from raylign.runtime.evaluate_job import (
    SAMPLE_COLUMNS,
    check_drift,
    evaluate_models,
    evaluation_inputs,
    load_completions,
    run_evaluation,
    sample_models,
    save_completions,
    save_drift,
)
from raylign.runtime.evaluators import ActorOptions, DriftScorer, Evaluator
from raylign.runtime.features_job import FeatureExtractor
from raylign.runtime.fitted_reward import FittedReward
from raylign.types import Message

WIDTHS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset_path("tiny_chat"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tokenizer):
    """Directory of a judge that passes the sign check, and of the same judge with its labels swapped."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("judges") / "judge"
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **WIDTHS)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    flipped = shutil.copytree(directory, directory.with_name("flipped"))
    name_labels(directory, ["safe", "unsafe"])
    name_labels(flipped, ["unsafe", "safe"])
    try:
        SafetyJudge(directory).check_sign(sign_labels())
    except ModelError:
        return flipped, directory
    return directory, flipped


def sign_labels():
    from raylign.evaluation.judges import sign_rows

    return sign_rows(load_refusal_labels())


def name_labels(directory, labels: list[str]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"id2label": dict(enumerate(labels))}
    config["label2id"] = {label: column for column, label in enumerate(labels)}
    file.write_text(json.dumps(config))


def save_policy(directory, tokenizer, *, seed: int):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, **WIDTHS)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def policies(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("policies")
    return {name: save_policy(root / name, tokenizer, seed=i) for i, name in enumerate(("before", "after"))}


@pytest.fixture
def section(judge):
    return EvaluateSection(
        judge=str(judge[0]),
        num_prompts=8,
        max_new_tokens=6,
        batch_size=3,
        drift_prompts=4,
        drift_candidates=3,
        bootstrap_samples=100,
    )


def make_length_reward():
    """A factory that travels to the actors by value, with a stand-in reward: characters of the answer."""

    def make():
        return lambda prompts, responses: np.array(
            [
                float(len(response)) * (prompt[-1].role == "user")
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        )

    return make


@pytest.mark.ray
def test_pool_equals_the_plain_class(ray_cluster, section, policies):
    """Two policies, eight prompts, batches of three: every answer once, in order, equal to one run without Ray."""
    found = evaluate_models(policies, config=section, seed=0, make_reward_fn=make_length_reward())
    prompts = select_prompts(load_prompts("embedded"), num=8, seed=0)
    plain = Evaluator(
        models={name: str(path) for name, path in policies.items()},
        prompts=prompts,
        config=section,
        seed=0,
        options=ActorOptions(),
        make_reward_fn=make_length_reward(),
    )
    for name, evaluation in found.items():
        answers = evaluation.completions
        assert [(a.prompt, a.harmful, a.category) for a in answers] == [
            (p.text, p.harmful, p.category) for p in prompts
        ]
        batch = plain({"model": np.array([name] * 8, dtype=object), "index": np.arange(8)})
        assert [a.response for a in answers] == batch["response"].tolist()
        np.testing.assert_allclose([a.cost for a in answers], batch["cost"], atol=1e-5)
        assert [a.reward for a in answers] == [float(len(a.response)) for a in answers]
        assert evaluation.summary.attack_success.num_items == 4
        assert evaluation.judge.auroc > 0.5
        assert evaluation.refusal_detector.accuracy > 0.9
    assert [a.response for a in found["before"].completions] != [a.response for a in found["after"].completions]


@pytest.mark.ray
def test_one_policy_without_reward(ray_cluster, section, policies):
    evaluation = run_evaluation(policies["before"], config=section, seed=0)
    assert all(math.isnan(answer.reward) for answer in evaluation.completions)
    assert evaluation.summary.mean_reward is None


@pytest.mark.ray
def test_flipped_judge_stops_the_evaluation(ray_cluster, section, policies, judge):
    with pytest.raises(ModelError, match="id2label"):
        run_evaluation(policies["before"], config=section.model_copy(update={"judge": str(judge[1])}), seed=0)


@pytest.mark.ray
def test_error_in_an_actor_keeps_its_type(ray_cluster, section, policies, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        run_evaluation(tmp_path, config=section, seed=0)
    with pytest.raises(ModelError, match=r"evaluate\.judge"):
        run_evaluation(policies["before"], config=section.model_copy(update={"judge": str(tmp_path)}), seed=0)


@pytest.mark.ray
def test_drift_of_the_same_policy_is_none_and_of_another_is_seen(ray_cluster, section, policies, tmp_path):
    prompts = [(Message(role="user", content=f"Question {i}?"),) for i in range(9)]
    same = check_drift(policies["before"], policies["before"], prompts, config=section, seed=0)
    assert (same.kendall_tau.mean, same.js_divergence, same.kl.mean) == (1.0, 0.0, 0.0)
    assert (same.num_prompts, same.num_candidates) == (4, 3)
    other = check_drift(policies["before"], policies["after"], prompts, config=section, seed=0)
    assert other.kendall_tau.mean < 0.9
    assert other.kl.mean > 0
    save_drift(tmp_path / "drift.json", other)
    assert json.loads((tmp_path / "drift.json").read_text())["kl"]["mean"] == other.kl.mean


def test_best_of_n_judges_the_answer_that_the_reward_prefers(section, policies):
    """Of four answers per prompt the longest is judged; one sample gives the first of the four."""
    prompts = select_prompts(load_prompts("embedded"), num=8, seed=0)
    found = {}
    for best_of in (1, 4):
        evaluator = Evaluator(
            models={"before": str(policies["before"])},
            prompts=prompts,
            config=section.model_copy(update={"best_of": best_of}),
            seed=0,
            options=ActorOptions(),
            make_reward_fn=make_length_reward(),
        )
        found[best_of] = evaluator({"model": np.array(["before"] * 8, dtype=object), "index": np.arange(8)})
    assert (found[4]["reward"] >= found[1]["reward"]).all()
    assert found[4]["reward"].sum() > found[1]["reward"].sum()
    assert [float(len(text)) for text in found[4]["response"]] == found[4]["reward"].tolist()


def test_several_answers_are_all_kept_and_priced_and_start_with_that_of_the_evaluation(section, policies):
    prompts = select_prompts(load_prompts("embedded"), num=8, seed=0)
    found = {}
    for num_samples in (None, 3):
        evaluator = Evaluator(
            models={"before": str(policies["before"])},
            prompts=prompts,
            config=section,
            seed=0,
            options=ActorOptions(),
            make_reward_fn=make_length_reward(),
            num_samples=num_samples,
            make_cost_fn=make_length_reward() if num_samples else None,
        )
        # another order of prompts than theirs, as the pool hands them out by length
        found[num_samples] = evaluator({"model": np.array(["before"] * 8, dtype=object), "index": np.arange(8)[::-1]})
    one, three = found[None], found[3]
    assert three["index"].tolist() == np.repeat(np.arange(8)[::-1], 3).tolist()
    assert three["sample"].tolist() == [0, 1, 2] * 8
    first = three["sample"] == 0
    assert three["index"][first].tolist() == one["index"].tolist()
    assert three["response"][first].tolist() == one["response"].tolist()
    np.testing.assert_allclose(three["cost"][first], one["cost"], atol=1e-5)
    assert len({*three["response"][:3].tolist()}) > 1
    lengths = [float(len(text)) for text in three["response"]]
    assert three["reward"].tolist() == three["model_cost"].tolist() == lengths
    assert np.isnan(one["model_cost"]).all()


@pytest.mark.ray
def test_the_pool_gives_every_answer_of_every_policy_once(ray_cluster, section, policies):
    config = section.model_copy(update={"constraint_samples": 2})
    table = sample_models(
        policies,
        config=config,
        seed=0,
        options=ActorOptions(num_actors=2),
        make_reward_fn=make_length_reward(),
        make_cost_fn=make_length_reward(),
    )
    assert tuple(table.column_names) == SAMPLE_COLUMNS
    assert table["policy"].to_pylist() == ["before"] * 16 + ["after"] * 16
    assert table["sample"].to_pylist() == [0, 1] * 16
    prompts = select_prompts(load_prompts("embedded"), num=8, seed=0)
    assert table["prompt"].to_pylist() == [prompt.text for prompt in prompts for _ in range(2)] * 2
    assert table["harmful"].to_pylist() == [prompt.harmful for prompt in prompts for _ in range(2)] * 2
    assert table["model_cost"].to_pylist() == [float(len(text)) for text in table["response"].to_pylist()]
    once = evaluate_models({"before": policies["before"]}, config=section, seed=0)["before"].completions
    assert table["response"].to_pylist()[:16:2] == [answer.response for answer in once]


def test_best_of_n_needs_a_reward(section, policies):
    evaluator = Evaluator(
        models={"before": str(policies["before"])},
        prompts=select_prompts(load_prompts("embedded"), num=8, seed=0),
        config=section.model_copy(update={"best_of": 2}),
        seed=0,
        options=ActorOptions(),
        make_reward_fn=None,
    )
    with pytest.raises(ConfigError, match=r"evaluate\.best_of=2 chooses by the run's reward"):
        evaluator({"model": np.array(["before"], dtype=object), "index": np.arange(1)})


def test_candidates_do_not_depend_on_the_trained_policy(section, policies):
    prompts = [(Message(role="user", content="Question?"),)]
    scorers = [
        DriftScorer(
            reference_path=str(policies["before"]),
            policy_path=str(policies[after]),
            prompts=prompts,
            config=section,
            seed=0,
            options=ActorOptions(),
        )
        for after in ("before", "after")
    ]
    same, other = (scorer({"index": np.array([0])}) for scorer in scorers)
    np.testing.assert_array_equal(same["reference_mean_logps"], other["reference_mean_logps"])
    assert same["reference_mean_logps"].shape == (1, 3)
    np.testing.assert_array_equal(same["policy_mean_logps"], same["reference_mean_logps"])


def test_actors_without_a_gpu_stay_off_the_one_they_see(monkeypatch, section, policies):
    """A pretended GPU: had the actor believed in it, its dtype would be bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model, _ = evaluators._load(str(policies["before"]), ActorOptions(dtype="auto", num_gpus=0))
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert actor_device(0.5) == "cuda"


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_rewards_have_the_number_types_of_the_features(policies, tmp_path, adapter):
    options = ActorOptions(dtype="bfloat16", adapter=adapter)
    head = HybridReward(1, 16)
    facts = {"centers": (0.0,), "full_center": 0.0, "temperature": 1.0, "fold_seed": 0, "metrics": {}}
    FittedReward(heads=(head,), full=head, **facts).save(tmp_path)
    scorer = reward_scorer.make_reward_scorer(
        str(policies["before"]),
        str(tmp_path),
        (1,),
        robust=RobustSection(),
        options=options,
        reward_model=RewardModelSection(),
    )
    features = FeatureExtractor(str(policies["before"]), FeaturesSection(), options.policy)
    for forward in (scorer._forward, features.forward):
        assert forward.autocast_dtype == torch.bfloat16
        weights = torch.float32 if adapter == "full" else torch.bfloat16
        assert {parameter.dtype for parameter in forward.parameters()} == {weights}


def test_inputs_follow_the_content_of_prompts_and_judge(tmp_path, section, judge):
    """What the evaluation phase was done for: edits in place count, copies elsewhere do not."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a", "harmful": True}) + "\n")
    model = shutil.copytree(judge[0], tmp_path / "judge")
    config = section.model_copy(update={"prompts": str(prompts), "judge": str(model)})
    inputs = evaluation_inputs(config)
    assert evaluation_inputs(config.model_copy(update={"judge": str(judge[0])})) == inputs

    prompts.write_text(json.dumps({"prompt": "b", "harmful": True}) + "\n")
    edited = evaluation_inputs(config)
    assert {name for name in inputs if inputs[name] != edited[name]} == {"prompts"}
    name_labels(model, ["fine", "unsafe"])
    relabelled = evaluation_inputs(config)
    assert {name for name in inputs if edited[name] != relabelled[name]} == {"judge"}
    with pytest.raises(DataError, match=r"evaluate\.prompts"):
        evaluation_inputs(config.model_copy(update={"prompts": str(tmp_path / "none")}))
    with pytest.raises(ModelError, match=r"evaluate\.judge"):
        evaluation_inputs(config.model_copy(update={"judge": str(tmp_path / "none")}))


def test_no_prompt_for_drift(section, policies):
    with pytest.raises(DataError, match="at least one"):
        check_drift(policies["before"], policies["after"], [], config=section, seed=0)


def test_completions_survive_the_file(tmp_path, section, policies):
    from raylign.types import Completion

    answer = Completion(
        prompt="p \u2028 <b>",
        response="line\nline",
        category="",
        harmful=True,
        num_tokens=3,
        reached_end=False,
        cost=-0.5,
        is_refusal=True,
        reward=2.0,
    )
    answers = {"before": [answer], "after": [dataclasses.replace(answer, reward=math.nan)]}
    save_completions(tmp_path / "c.jsonl", answers)
    assert "NaN" not in (tmp_path / "c.jsonl").read_text()
    loaded = load_completions(tmp_path / "c.jsonl")
    assert loaded["before"] == (answer,)
    assert math.isnan(loaded["after"][0].reward)
