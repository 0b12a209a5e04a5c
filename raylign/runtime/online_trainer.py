"""Run the online methods on Ray Train: engines and scorer beside the training workers, rounds kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train

from raylign.config import TOKEN_REWARDS, RunConfig, check_devices
from raylign.cost.ledger import Ledger
from raylign.errors import CheckpointError, DataError, OutputExistsError, ResourceError, SamplerError
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_reward import FittedReward, load_reward
from raylign.runtime.identity import base_model_name, run_identity
from raylign.runtime.online_worker import OnlineTask, online_worker, round_schedule
from raylign.runtime.phases import write_json
from raylign.runtime.prompts import collect_prompts, prompts_fingerprint, write_prompts
from raylign.runtime.resources import ResourcePlan, check_plan
from raylign.runtime.sampler import SamplerPool
from raylign.runtime.scorer import ResponseScorer
from raylign.runtime.trainer import METRICS_FILE, check_resume, fit_workers, reward_directory, store_reward

if TYPE_CHECKING:
    import ray.data

    from raylign.config import TokenRewardSection

PROMPTS_FILE = "prompts.parquet"
ROUNDS_DIR = "rounds"
IDENTITY_FILE = "identity.json"


def run_online(
    pairs: ray.data.Dataset,
    *,
    config: RunConfig,
    model_path: str | Path,
    heads: FittedReward | str | Path,
    layers: tuple[int, ...],
    storage_path: str | Path,
    name: str,
    cost: Path | None = None,
    ledger: Ledger | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.Result:
    """Train the policy on its own responses; the newest checkpoint holds a plain HF or PEFT directory `policy/`.

    Everything is written below `<storage_path>/<name>`: `metrics.jsonl`, `prompts.parquet`, `rounds/` with every
    sampled and scored response, and checkpoints `step_<update>`. A run found there is continued when
    `config.run.resume` is set: finished rounds are read, not sampled again. Ray must be initialised.

    Args:
        pairs: with the columns of the ingest phase; the distinct prompts of the training split are sampled from.
        config: of the run; `train.method` is online_dpo or policy_gradient.
        model_path: directory of the policy before training, which is the reference.
        heads: fitted reward or directory of the reward phase.
        layers: transformer layers that the heads were fitted on.
        storage_path: directory that all nodes see.
        name: of this training below it.
        cost: directory of the cost phase, on storage that all nodes see; None leaves responses without a cost.
        ledger: what it costs is recorded here; by default in `ledger/` of the training.
        callbacks: of Ray Train, run on its controller.

    Returns:
        Ray's result; `metrics` is the last record, `checkpoint` the last checkpoint.

    Raises:
        ResourceError: workers, engines and scorer do not fit the cluster, or did not start in time.
        MissingDependencyError: vLLM is not installed.
        OutputExistsError: a training is there and `run.resume` is not set.
        CheckpointError: the checkpoint to resume from is damaged or of another run.
        SamplerError: vLLM refuses the model, or engines died or hung too often.
        StaleWeightsError: an engine does not hold the trainer's weights.
        TrainingError: the loss is not finite, or workers failed more than `train.max_failures` times.
    """
    check_devices(config)
    plan = ResourcePlan.from_config(config)
    check_plan(plan, ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
    directory = Path(storage_path).expanduser().absolute() / name
    model = str(Path(model_path).absolute())
    prompts, counts = collect_prompts(pairs, max_prompt_tokens=_prompt_room(config, model))
    with reward_directory(heads) as found:
        assert found is not None
        check_reward(found, layers, config)
        identity = run_identity(config, model=model, reward=found, cost=cost) | {
            "prompts": prompts_fingerprint(prompts)
        }
    check_resume(directory, config, identity, unknown=())
    _check_start(directory, config, identity)
    directory.mkdir(parents=True, exist_ok=True)
    reward = store_reward(heads, directory)
    write_prompts(prompts, directory / PROMPTS_FILE)
    write_json(directory / "prompts.json", asdict(counts))
    write_json(directory / IDENTITY_FILE, identity)
    with _samplers(config, model, reward, layers, cost) as (sampler, scorer):
        task = OnlineTask(
            config=config,
            pairs=str(directory / PROMPTS_FILE),
            model=model,
            base=base_model_name(config.policy.model, model),
            identity=identity,
            reward=reward,
            metrics=str(directory / METRICS_FILE),
            rounds=str(directory / ROUNDS_DIR),
            sampler=sampler,
            scorer=scorer,
            ledger=ledger or Ledger(directory / LEDGER_DIR, run=name, method=config.train.method),
            devices=plan.training_devices,
        )
        num_updates = round_schedule(task, len(prompts)).num_updates
        return fit_workers(online_worker, task, directory, num_updates=num_updates, callbacks=callbacks)


def check_reward(reward: Path, layers: tuple[int, ...], config: RunConfig) -> None:
    """Refuse heads and states, or a reward and a credit, that do not fit, before an engine starts.

    Args:
        reward: directory of the reward phase.
        layers: transformer layers that are given to the heads.
        config: of the run.

    Raises:
        DataError: naming what does not fit.
    """
    fitted = load_reward(reward)
    if _token_reward(config) is not None and fitted.kind not in TOKEN_REWARDS:
        raise DataError(
            f"policy_gradient.credit=token needs a reward of every token, the fitted reward is of kind {fitted.kind}; "
            f"fit one of {', '.join(TOKEN_REWARDS)}, or set policy_gradient.credit=sequence"
        )
    if isinstance(fitted, FittedReward) and fitted.full.num_layers != len(layers):
        raise DataError(
            f"the reward heads read {fitted.full.num_layers} layers, {list(layers)} are given to them; name the "
            "layers that they were fitted on (features.layers, or fit_reward(layers=...))"
        )


def _token_reward(config: RunConfig) -> TokenRewardSection | None:
    """Credit of tokens, where tokens train the policy."""
    by_token = config.train.method == "policy_gradient" and config.policy_gradient.credit == "token"
    return config.token_reward if by_token else None


def _check_start(directory: Path, config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Rounds of a run that was stopped before its first checkpoint belong to that run only."""
    file = directory / IDENTITY_FILE
    if not file.is_file():
        return
    if not config.run.resume:
        raise OutputExistsError(f"{directory} holds a training; continue it with run.resume=true or use another name")
    have, want = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(dict(identity)))
    names = sorted(name for name in {*have, *want} if have.get(name) != want.get(name))
    if names:
        shown = "; ".join(f"{name}: was {have.get(name)!r}, now {want.get(name)!r}" for name in names[:4])
        raise CheckpointError(
            f"{directory} holds rounds of another run ({shown}); resume with the old values or use a new name"
        )


def _prompt_room(config: RunConfig, model: str) -> int | None:
    """Tokens that a prompt may have so that a response of full length and its end token fit behind it."""
    from raylign.models.loading import context_length, load_config

    context = context_length(load_config(model, trust_remote_code=config.policy.trust_remote_code))
    return None if context is None else context - config.sampler.max_new_tokens - 1


@contextmanager
def _samplers(
    config: RunConfig, model: str, reward: str, layers: tuple[int, ...], cost: Path | None
) -> Iterator[tuple[SamplerPool, Any]]:
    """Engines and scorer, started together and gone at the end of the block."""
    sampler = config.sampler
    options = ActorOptions(
        num_cpus=sampler.scorer_cpus,
        num_gpus=sampler.scorer_gpus,
        dtype=config.policy.dtype,
        trust_remote_code=config.policy.trust_remote_code,
        adapter=config.policy.adapter,
        parallel=config.train.parallel,
    )
    more: dict[str, Any] = {"token_reward": _token_reward(config)}
    if cost is not None:
        more |= {"cost_dir": str(cost), "cost_model": config.cost_model}
    scorer = (
        ray.remote(ResponseScorer)
        .options(
            num_cpus=sampler.scorer_cpus,
            num_gpus=sampler.scorer_gpus,
            max_restarts=sampler.max_restarts,
            max_task_retries=sampler.max_restarts,  # it holds no state, and a round was sampled for this
        )
        .remote(model, reward, layers, config.robust, options, config.reward_model, **more)
    )
    pool: SamplerPool | None = None
    try:
        pool = SamplerPool.start(model, config=config)
        _await_scorer(scorer, sampler.start_timeout_s)
        yield pool, scorer
    finally:
        ray.kill(scorer)
        if pool is not None:
            pool.stop()


def _await_scorer(scorer: Any, timeout_s: float) -> None:
    try:
        ray.get(scorer.is_ready.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"the scorer did not start within sampler.start_timeout_s={timeout_s:g}: another job may hold the resources"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise SamplerError(f"the scorer cannot load the reference or the reward: {error}") from error
