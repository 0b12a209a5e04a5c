"""The phases as functions for people who already run Ray: a Dataset in, a Dataset or a Ray Train Result out.

None of them starts Ray. `storage` must be a directory that all nodes see; results that depend on their inputs alone
(pairs, features) are kept there under a fingerprint and found again by the next call.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train

from raylign.config import EMBEDDED, RunConfig, load_config
from raylign.models.loading import resolve_model
from raylign.runtime.evaluate_job import Evaluation, run_evaluation
from raylign.runtime.features_job import features_key, run_features
from raylign.runtime.fingerprints import pairs_fingerprint
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.ingest_job import QUARANTINE_FILE, read_pairs, run_ingest
from raylign.runtime.phases import digest
from raylign.runtime.progress import phase_line
from raylign.runtime.rank_job import rank_pairs
from raylign.runtime.reward_job import fit_reward as fit_heads
from raylign.runtime.run_phases import actor_options
from raylign.runtime.trainer import run_training

Sections = Mapping[str, Mapping[str, Any]]

STORAGE = "runs/api"


def ingest(
    source: ray.data.Dataset | str,
    *,
    model: str = EMBEDDED,
    storage: str | Path = STORAGE,
    seed: int = 0,
    config: Sections | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Raw preference rows to validated, tokenized, deduplicated and split pairs.

    Args:
        source: Dataset with the columns of any supported format, or what `data.path` takes.
        model: directory or hub id whose tokenizer and chat template are used.
        storage: keeps the pairs and `quarantine.jsonl` with every refused row.
        seed: of the split.
        config: other sections, for example {"policy": {"trust_remote_code": True}}.
        **options: keys of the `data` section, for example max_length=1024.

    Returns:
        Columns `TEXT_COLUMNS` and `TOKEN_COLUMNS` of `raylign.types`.

    Raises:
        DataError: unusable data; ConfigError: an unknown option.
    """
    resolved = _config(config, "data", options, seed=seed)
    root = _directory(storage)
    fresh = root / f"ingest-{uuid.uuid4().hex[:8]}"
    # A refused data set keeps its directory: the error names the quarantine file in it.
    result = run_ingest(
        source,
        config=resolved.data,
        model_path=resolve_model(model),
        output_dir=fresh,
        seed=seed,
        trust_remote_code=resolved.policy.trust_remote_code,
    )
    kept = root / f"pairs-{pairs_fingerprint(result.dataset)}"
    if kept.exists():
        shutil.rmtree(fresh)
    else:
        fresh.rename(kept)
    counts = result.counts
    phase_line(
        "ingest",
        f"{counts.used} of {counts.rows_read} rows used, {counts.num_quarantined} in {kept / QUARANTINE_FILE}",
    )
    return read_pairs(kept)


def extract_features(
    pairs: ray.data.Dataset,
    *,
    model: str = EMBEDDED,
    storage: str | Path = STORAGE,
    config: Sections | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Add hidden states and reference log-probs of `model`, from one forward per pair, or from the cache.

    Args:
        pairs: of `ingest`.
        model: the reference: the policy before training.
        storage: keeps the features under a key of everything they depend on.
        config: other sections, for example {"policy": {"dtype": "float32"}}.
        **options: keys of the `features` section, for example layers=[8, 16], num_actors=4, gpus_per_actor=1.

    Returns:
        The pairs with `FEATURE_COLUMNS` of `raylign.types`.
    """
    resolved = _config(config, "features", options)
    path = resolve_model(model)
    fingerprint = pairs_fingerprint(pairs)
    key = features_key(
        config=resolved.features,
        policy=resolved.policy,
        model_path=path,
        data_fingerprint=fingerprint,
        parallel=resolved.train.parallel,
    )
    return run_features(
        pairs,
        config=resolved.features,
        policy=resolved.policy,
        model_path=path,
        output_dir=_directory(storage) / f"features-{digest(key)}",
        data_fingerprint=fingerprint,
        parallel=resolved.train.parallel,
    )


def fit_reward(
    features: ray.data.Dataset,
    *,
    seed: int = 0,
    layers: tuple[int, ...] | None = None,
    config: Sections | None = None,
    **options: Any,
) -> FittedReward:
    """Fit a reward on the hidden states; `metrics` of the result hold its held-out quality.

    Args:
        features: of `extract_features`.
        seed: of folds and heads.
        layers: transformer layers of the features when they are not all of the model's, so that live confidence reads
            the same ones.
        config: other sections, for example {"brme": {"loss": "purm"}}.
        **options: keys of the `reward` section, for example kind="ensemble", folds=10.
    """
    return fit_heads(features, config=_config(config, "reward", options, seed=seed), layers=layers)


def rank(features: ray.data.Dataset, reward: FittedReward, **options: Any) -> ray.data.Dataset:
    """Add a reward margin and a label confidence to every pair; lazy.

    Args:
        features: of `extract_features`.
        reward: of `fit_reward`.
        **options: keys of the `confidence` section, for example floor=0.5, squash="none".

    Returns:
        The pairs with `RANK_COLUMNS` of `raylign.types`, without the hidden states.
    """
    return rank_pairs(features, reward=reward, confidence=_config(None, "confidence", options).confidence)


def train(
    ranked: ray.data.Dataset,
    *,
    name: str,
    model: str = EMBEDDED,
    storage: str | Path = STORAGE,
    seed: int = 0,
    resume: bool = False,
    reward: FittedReward | None = None,
    config: Sections | None = None,
    **options: Any,
) -> ray.train.Result:
    """Train the policy off-policy on ranked pairs with Ray Train.

    Args:
        ranked: of `rank`; the output of `extract_features` is enough for dpo, cdpo, rdpo and ipo.
        name: of the run below `storage`.
        model: directory or hub id of the policy before training.
        storage: directory of the run.
        seed: of data order and dropout.
        resume: continue the run of that name.
        reward: heads, needed for confidence.source=live.
        config: other sections, for example {"policy": {"adapter": "lora"}, "resources": {"num_workers": 4}}.
        **options: keys of the `train` section, for example objective="dpo", beta=0.1.

    Returns:
        Ray's result; `result.checkpoint.path` holds `policy/`, a plain HF or PEFT directory.
    """
    sections = {**(config or {}), "run": {"resume": resume}}
    sections["policy"] = {**sections.get("policy", {}), "model": model}  # the name that an adapter calls its base
    resolved = _config(sections, "train", options, seed=seed)
    return run_training(
        ranked,
        config=resolved,
        model_path=resolve_model(model),
        storage_path=_directory(storage),
        name=name,
        heads=reward,
    )


def train_online(
    pairs: ray.data.Dataset,
    reward: FittedReward,
    *,
    name: str,
    model: str = EMBEDDED,
    storage: str | Path = STORAGE,
    seed: int = 0,
    resume: bool = False,
    config: Sections | None = None,
    **options: Any,
) -> ray.train.Result:
    """Train the policy on responses that it samples itself, on vLLM engines beside Ray Train's workers.

    Args:
        pairs: of `ingest`; the prompts of their training split are sampled from.
        reward: of `fit_reward`, on features of `model`; scores the responses.
        name: of the run below `storage`.
        model: directory or hub id of the policy before training, which is the reference.
        storage: directory of the run.
        seed: of prompts, sampling and dropout.
        resume: continue the run of that name.
        config: other sections, for example {"online": {"num_rounds": 8}, "sampler": {"num_engines": 2}}.
        **options: keys of the `train` section; method="online_dpo" unless "policy_gradient" is asked for.

    Returns:
        Ray's result; `result.checkpoint.path` holds `policy/`, a plain HF or PEFT directory.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """
    from raylign.models.forward import resolve_layers
    from raylign.models.loading import load_config as load_architecture
    from raylign.runtime.online_trainer import run_online

    sections = {**(config or {}), "run": {"resume": resume}}
    sections["policy"] = {**sections.get("policy", {}), "model": model}
    resolved = _config(sections, "train", {"method": "online_dpo", **options}, seed=seed)
    path = resolve_model(model)
    architecture = load_architecture(path, trust_remote_code=resolved.policy.trust_remote_code)
    return run_online(
        pairs,
        config=resolved,
        model_path=path,
        heads=reward,
        layers=reward.layers or resolve_layers(resolved.features.layers, architecture.num_hidden_layers),
        storage_path=_directory(storage),
        name=name,
    )


def evaluate(model: str | Path, *, seed: int = 0, config: Sections | None = None, **options: Any) -> Evaluation:
    """Judge a HF or PEFT directory on safety and benign prompts.

    Args:
        model: directory or hub id.
        seed: of the choice of prompts, sampling and bootstrap.
        config: other sections, for example {"features": {"gpus_per_actor": 1}, "policy": {"dtype": "float32"}}.
        **options: keys of the `evaluate` section, for example num_prompts=400, judge="/models/classifier".
    """
    resolved = _config(config, "evaluate", options, seed=seed)
    return run_evaluation(model, config=resolved.evaluate, seed=seed, options=actor_options(resolved))


def _config(sections: Sections | None, section: str, options: Mapping[str, Any], *, seed: int = 0) -> RunConfig:
    """Defaults, the given sections, and the call's own options, checked as a whole."""
    merged = {name: dict(content) for name, content in (sections or {}).items()}
    merged.setdefault(section, {}).update(options)
    merged.setdefault("run", {})["seed"] = seed
    return load_config(values=merged)


def _directory(storage: str | Path) -> Path:
    path = Path(storage).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path
