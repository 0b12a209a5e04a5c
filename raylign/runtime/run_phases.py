"""The phases of a run, each done once for its inputs; what strings them together is the pipeline."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from raylign.config import TEXT_REWARDS, RunConfig, needs_cost
from raylign.cost.ledger import Ledger
from raylign.errors import DataError
from raylign.evaluation.scoring import RewardScorer
from raylign.models.forward import resolve_layers
from raylign.models.loading import load_config, model_fingerprint, tokenizer_fingerprint
from raylign.runtime.constrain_job import constrain_pairs, constraint_key
from raylign.runtime.cost_job import cost_key, run_cost
from raylign.runtime.costs import open_ledger, phase_devices, record_reuse
from raylign.runtime.evaluate_job import (
    COMPLETIONS_FILE,
    DRIFT_FILE,
    FREE_KEYS,
    check_drift,
    evaluate_models,
    evaluation_inputs,
    save_completions,
    save_drift,
)
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import features_key, read_cost, read_features, run_features
from raylign.runtime.fingerprints import pairs_fingerprint, source_state
from raylign.runtime.fitted_reward import FittedTexts, RewardFacts, load_reward
from raylign.runtime.identity import method_identity
from raylign.runtime.ingest_job import held_out_prompts, read_pairs, run_ingest
from raylign.runtime.phases import MANIFEST, Run, digest, open_run
from raylign.runtime.preflight import check_cluster
from raylign.runtime.price_job import attach_costs
from raylign.runtime.rank_job import confidence_facts, rank_pairs
from raylign.runtime.resources import ResourcePlan
from raylign.runtime.reward_job import fit_reward
from raylign.runtime.reward_scorer import make_reward_scorer
from raylign.runtime.text_reward_phase import SCORED_DIR, fit_text_reward, text_key
from raylign.runtime.tracking import track_run
from raylign.runtime.trainer import METRICS_FILE, run_training

POLICY_DIR = "policy"
CACHES = "cache"


@dataclass(frozen=True, kw_only=True)
class CostPhase:
    """What the cost phase left.

    Attributes:
        directory: cost model and the costs of all pairs.
        facts: see `run_cost`.
        key: of all that it is made of, for the phases that read it.
    """

    directory: Path
    facts: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class Phases:
    """One method per phase; each returns what the next ones need and is skipped when its manifest is there.

    Attributes:
        config: of the run.
        run: its directory.
        model: directory of the policy before training.
        caches: directory of the feature caches; None is `cache/` beside the run.
    """

    config: RunConfig
    run: Run
    model: str
    caches: Path | None = None

    @property
    def ledger(self) -> Ledger | None:
        """Of the run, for what the phase at work lets others do."""
        return self.run.ledger and self.run.ledger.below()

    @property
    def layers(self) -> tuple[int, ...]:
        """Transformer layers of the features, from 1."""
        trust = self.config.policy.trust_remote_code
        return resolve_layers(
            self.config.features.layers, load_config(self.model, trust_remote_code=trust).num_hidden_layers
        )

    def reward_scorer(self, reward: Path) -> Callable[[], RewardScorer]:
        """Loads the fitted reward in an actor that answers; `reward` is the directory of the reward phase.

        An evaluation has no rounds: its minimum is one of each response, so that rewards do not depend on batches.
        """
        config = self.config
        return functools.partial(
            make_reward_scorer,
            self.model,
            str(reward),
            self.layers,
            robust=config.robust.model_copy(update={"set_type": "heads_pointwise"}),
            options=actor_options(config),
            reward_model=config.reward_model,
        )

    def ingest(self) -> tuple[Path, dict[str, Any]]:
        """Rows to tokenized, split, deduplicated pairs."""
        data, seed = self.config.data, self.config.run.seed
        key = {
            "data": data.model_dump(exclude={"path", "max_bad_fraction"}),
            "source": source_state(data.path),
            "tokenizer": tokenizer_fingerprint(self.model),
            "seed": seed,
        }

        def work(directory: Path) -> dict[str, Any]:
            result = run_ingest(
                data.path,
                config=data,
                model_path=self.model,
                output_dir=directory,
                seed=seed,
                trust_remote_code=self.config.policy.trust_remote_code,
            )
            return {**asdict(result.counts), "fingerprint": pairs_fingerprint(result.dataset)}

        return self.run.phase("ingest", key, work)

    def features(self, ingest: Path, fingerprint: str) -> tuple[Path, str]:
        """Hidden states and reference log-probs, from the cache when it has them."""
        config = self.config
        key = features_key(
            config=config.features,
            policy=config.policy,
            model_path=self.model,
            data_fingerprint=fingerprint,
            parallel=config.train.parallel,
        )
        cache = (self.caches or self.run.directory.parent / CACHES) / f"features-{digest(key)}"

        def work(_: Path) -> dict[str, Any]:
            is_reused = cache.exists()
            run_features(
                read_pairs(ingest),
                config=config.features,
                policy=config.policy,
                model_path=self.model,
                output_dir=cache,
                data_fingerprint=fingerprint,
                parallel=config.train.parallel,
                ledger=self.ledger,
                show_progress=sys.stderr.isatty(),
            )
            if self.run.ledger is not None and is_reused:
                record_reuse(self.run.ledger, "features", read_cost(cache), key=digest(key))
            return {"cache": str(cache), "is_reused": is_reused}

        self.run.phase("features", key, work, is_kept=lambda _: (cache / MANIFEST).is_file())
        return cache, digest(key)

    def reward(self, features: Path, features_digest: str, *, flips: float = 0.0) -> tuple[Path, dict[str, Any]]:
        """Heads, scored out of fold, judged on the test split; fitted to labels of which a share is reversed."""
        config = self.config
        key = {
            "features": features_digest,
            "reward": config.reward.model_dump(),
            "brme": config.brme.model_dump(),
            **({"texts": text_key(config, self.model)} if config.reward.kind in TEXT_REWARDS else {}),
            "confidence": config.confidence.model_dump(include={"alpha", "center", "squash", "temperature"}),
            "seed": config.run.seed,
            **({"flips": flips} if flips else {}),
        }

        def work(directory: Path) -> dict[str, Any]:
            pairs = read_features(features)
            fitted: RewardFacts
            if config.reward.kind in TEXT_REWARDS:
                options = replace(actor_options(config), num_actors=config.features.num_actors, ledger=self.ledger)
                fitted = fit_text_reward(
                    pairs, config=config, model_path=self.model, directory=directory, options=options
                )
            else:
                fitted = fit_reward(pairs, config=config, layers=self.layers, flips=flips)
            fitted.save(directory)
            # not all that a reward is shows in its metrics
            return {**fitted.metrics, "key": digest(key)}

        return self.run.phase("reward", key, work)

    def cost(self, features: Path, features_digest: str) -> CostPhase | None:
        """What prices responses, checked, and the costs of all pairs; None when the run needs no cost."""
        config = self.config
        if not needs_cost(config):
            return None
        key = cost_key(config, model_path=self.model, features_digest=features_digest)

        def work(directory: Path) -> dict[str, Any]:
            return run_cost(
                read_features(features),
                config=config,
                layers=self.layers,
                model_path=self.model,
                directory=directory,
                options=replace(actor_options(config), num_actors=config.features.num_actors, ledger=self.ledger),
            )

        directory, facts = self.run.phase("cost", key, work)
        return CostPhase(directory=directory, facts=facts, key=digest([key, facts]))

    def rank(
        self, features: Path, reward: Path, reward_key: str, cost: CostPhase | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """A label confidence for every pair, with costs and under the constraint where the run has them."""
        config = self.config
        key = {"reward": reward_key, "confidence": config.confidence.model_dump(), **_cost_key(cost)}
        key |= constraint_key(config)

        def work(directory: Path) -> dict[str, Any]:
            fitted = load_reward(reward)
            is_text = isinstance(fitted, FittedTexts)
            source = reward / SCORED_DIR if is_text else features
            rows = ray.data.read_parquet(str(source), include_paths=False) if is_text else read_features(source)
            ranked = rank_pairs(rows, reward=fitted, confidence=config.confidence)
            if cost is not None:
                ranked = attach_costs(ranked, cost.directory)
            facts: dict[str, Any] = {}
            if config.constraint.kind != "none":
                ranked, found = constrain_pairs(ranked, reward=fitted, config=config)
                facts["constraint"] = found.to_dict()
            pairs = directory / "ranked"
            shutil.rmtree(pairs, ignore_errors=True)
            ranked.write_parquet(str(pairs))
            table = pq.read_table(pairs, columns=["split", "label_confidence"])
            num_pairs = sum(pq.read_metadata(file).num_rows for file in source.rglob("*.parquet"))
            if len(table) != num_pairs:
                raise DataError(f"ranking was given {num_pairs} pairs and wrote {len(table)}")
            table = table.filter(pc.equal(table["split"], "train"))
            return confidence_facts(table["label_confidence"].to_numpy()) | facts

        directory, facts = self.run.phase("rank", key, work)
        return directory / "ranked", facts

    def train(self, ranked: Path, rank_key: str, reward: Path) -> tuple[Path, dict[str, Any]]:
        """The off-policy trainer; the phase directory is Ray Train's experiment directory."""
        config = self.config
        key = {"ranked": rank_key, "model": model_fingerprint(self.model), **method_identity(config)}

        def work(directory: Path) -> dict[str, Any]:
            with track_run(config, self.run.directory, directory / METRICS_FILE):
                result = run_training(
                    ranked,
                    config=config.model_copy(update={"run": config.run.model_copy(update={"resume": True})}),
                    model_path=self.model,
                    storage_path=directory.parent,
                    name=directory.name,
                    heads=reward,
                    ledger=self.ledger,
                )
            return {"checkpoint": str(Path(result.checkpoint.path) / POLICY_DIR), "metrics": result.metrics}

        _, facts = self.run.phase("train", key, work)
        return self._link(facts)

    def train_online(
        self, ingest: Path, fingerprint: str, reward: Path, reward_key: str, cost: CostPhase | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """The trainer that samples its own responses to the prompts of the training split."""
        config = self.config
        key = {
            "pairs": fingerprint,
            "reward": reward_key,
            "model": model_fingerprint(self.model),
            **_cost_key(cost),
            **method_identity(config),
        }

        def work(directory: Path) -> dict[str, Any]:
            from raylign.runtime.online_trainer import run_online

            with track_run(config, self.run.directory, directory / METRICS_FILE):
                result = run_online(
                    read_pairs(ingest),
                    config=config.model_copy(update={"run": config.run.model_copy(update={"resume": True})}),
                    model_path=self.model,
                    heads=reward,
                    layers=self.layers,
                    cost=None if cost is None else cost.directory,
                    storage_path=directory.parent,
                    name=directory.name,
                    ledger=self.ledger,
                )
            return {"checkpoint": str(Path(result.checkpoint.path) / POLICY_DIR), "metrics": result.metrics}

        _, facts = self.run.phase("train", key, work)
        return self._link(facts)

    def _link(self, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """`<run>/checkpoint` leads to the trained policy."""
        new = self.run.directory / ".checkpoint"
        new.unlink(missing_ok=True)
        new.symlink_to(Path(facts["checkpoint"]).relative_to(self.run.directory))
        new.replace(self.run.directory / "checkpoint")
        return Path(facts["checkpoint"]), facts

    def evaluate(self, checkpoint: Path, ingest: Path, reward: Path, reward_key: str) -> tuple[Path, dict[str, Any]]:
        """Answers before and after, judged; and the drift check on held-out prompts."""
        config = self.config
        key = {
            "before": model_fingerprint(self.model),
            "after": model_fingerprint(checkpoint),
            # answers do not depend on how prompts are batched or spread over actors
            "evaluate": config.evaluate.model_dump(exclude=set(FREE_KEYS)),
            **evaluation_inputs(config.evaluate),
            "reward": reward_key,
            "robust": config.robust.model_dump(),
            "seed": config.run.seed,
        }

        def work(directory: Path) -> dict[str, Any]:
            options = replace(actor_options(config), ledger=self.ledger)
            evaluations = evaluate_models(
                {"before": self.model, "after": checkpoint},
                config=config.evaluate,
                seed=config.run.seed,
                options=options,
                make_reward_fn=self.reward_scorer(reward),
            )
            save_completions(directory / COMPLETIONS_FILE, {name: e.completions for name, e in evaluations.items()})
            drift = check_drift(
                self.model,
                checkpoint,
                held_out_prompts(ingest, config.evaluate.drift_prompts),
                config=config.evaluate,
                seed=config.run.seed,
                options=options,
            )
            save_drift(directory / DRIFT_FILE, drift)
            before = evaluations["before"]
            return {"judge": asdict(before.judge), "refusal_detector": asdict(before.refusal_detector)}

        return self.run.phase("evaluate", key, work)


def _cost_key(cost: CostPhase | None) -> dict[str, str]:
    """The part of a phase's key that a cost model is; phases from before there were costs keep theirs."""
    return {} if cost is None else {"cost": cost.key}


def check_demand(config: RunConfig) -> None:
    """Compare what a run asks for with the cluster, and what it reads and writes with what its nodes see.

    Raises:
        ResourceError: with the arithmetic.
        ConfigError: a node does not see the run's files.
    """
    check_cluster(config)


def open_phases(config: RunConfig, model: str, *, caches: Path | None = None) -> Phases:
    """The phases of a run in its directory, priced by its ledger.

    Args:
        config: of the run.
        model: directory of the policy before training.
        caches: directory of the feature caches; None is `cache/` beside the run.

    Raises:
        OutputExistsError: the directory is in use and `run.resume` is not set.
    """
    plan, cluster = ResourcePlan.from_config(config), ray.cluster_resources()
    run = open_run(config)
    run.ledger = open_ledger(config, run.directory, cluster)
    run.devices = phase_devices(plan, cluster, driver_cpus=torch.get_num_threads())
    return Phases(config, run, model, caches)


def actor_options(config: RunConfig) -> ActorOptions:
    """Evaluation actors: as many as asked for, each as large as a feature actor."""
    return ActorOptions(
        num_actors=config.evaluate.num_actors,
        num_cpus=config.features.cpus_per_actor,
        num_gpus=config.features.gpus_per_actor,
        dtype=config.policy.dtype,
        trust_remote_code=config.policy.trust_remote_code,
        adapter=config.policy.adapter,
        parallel=config.train.parallel,
    )
