"""The sections of a configuration: every key with its type, its default and what it does. No torch, no ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from raylign.assets import EMBEDDED as EMBEDDED


class Section(BaseModel):
    """Base of all sections: frozen, keyword-only, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class RunSection(Section):
    """Where a run lives and what makes it reproducible."""

    name: str = Field("default", description="directory of the run below run.storage", pattern=r"^[A-Za-z0-9._-]+$")
    storage: str = Field(
        "runs", description="root of all runs and of the feature cache; shared storage on several nodes"
    )
    seed: int = Field(0, ge=0, description="seed of splits, heads, data order, dropout and sampling")
    resume: bool = Field(False, description="continue the run in its directory instead of refusing to touch it")

    @field_validator("storage")
    @classmethod
    def _is_path(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError("is a directory that every node sees, not a URL: mount the bucket and name its path")
        return storage


class PolicySection(Section):
    """The model that is aligned; the frozen reference is the same model before training."""

    model: str = Field(EMBEDDED, description="HF directory or hub id; 'embedded' is the tiny model that ships")
    adapter: Literal["full", "lora"] = Field("full", description="train all weights or a LoRA adapter (peft)")
    lora_rank: int = Field(16, ge=1, description="rank of the adapter")
    lora_alpha: int = Field(32, ge=1, description="scale of the adapter is lora_alpha / lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the adapter")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto is bfloat16 on GPUs that have it and float32 elsewhere"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    trust_remote_code: bool = Field(False, description="run code shipped inside the model repository")


class DataSection(Section):
    """Preference pairs and how rows become token ids."""

    path: str = Field(EMBEDDED, description="file, directory, glob or hf://datasets/... of jsonl(.gz) or parquet")
    format: Literal["auto", "trl", "hh", "pku"] = Field(
        "auto", description="row format; auto looks at each row's columns"
    )
    prefer: Literal["safer", "better"] = Field(
        "safer", description="PKU-SafeRLHF label that says which answer is chosen"
    )
    valid_fraction: float = Field(0.1, gt=0, lt=0.5, description="prompts held out to choose the reward checkpoint")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="prompts held out for every reported number")
    max_length: int = Field(512, ge=16, description="tokens of prompt plus one answer")
    max_prompt_length: int | None = Field(
        None, ge=8, description="tokens of a prompt, longer ones are quarantined; default three quarters of max_length"
    )
    max_pairs: int | None = Field(None, ge=8, description="use at most so many valid pairs, chosen by hash")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="stop when more rows than this are quarantined")

    @property
    def prompt_limit(self) -> int:
        """Longest prompt that is used, in tokens."""
        return self.max_prompt_length if self.max_prompt_length is not None else self.max_length * 3 // 4


class FeaturesSection(Section):
    """The one forward of the reference policy per pair."""

    layers: list[int] | Literal["all"] = Field(
        "all", description="transformer layers kept, from 1; 'all' keeps every one"
    )
    dtype: Literal["float32", "float16"] = Field("float16", description="storage type of the hidden states")
    batch_tokens: int = Field(4096, ge=64, description="tokens of one forward")
    num_actors: int = Field(1, ge=1, description="model-holding Ray Data actors")
    cpus_per_actor: float = Field(1, gt=0, description="CPUs of one actor")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs of one actor, fractions allowed")


class RewardSection(Section):
    """The reward model: probes on the policy's hidden states, or fine-tuned or foreign classifiers of texts."""

    kind: Literal[
        "hybrid",
        "ensemble",
        "brme",
        "laplace",
        "lora_ensemble",
        "warm",
        "external",
        "ava_p",
        "ava_d",
        "token_bt",
    ] = Field(
        "hybrid",
        description="probe on hidden states (arXiv:2503.10093), several of them, Gaussian heads, a Laplace posterior "
        "of a linear probe; classifiers of texts: LoRA members, their average, or one of yours; or a reward for every "
        "token: AVA from preferences or demonstrations (arXiv:2411.09341), or Bradley-Terry over its score",
    )
    num_heads: int = Field(
        5, ge=1, description="members: heads, adapters, or the draws that show a Laplace posterior's spread"
    )
    head_data: Literal["bootstrap", "shards", "all"] = Field(
        "bootstrap",
        description="pairs of a member: Poisson(1) weights, all but one of num_heads parts, or all (own start only)",
    )
    standardize: bool = Field(
        True, description="shift and scale members alike on validation pairs, so that their minimum means something"
    )
    folds: int = Field(
        5,
        ge=1,
        description="each pair is scored by what was fitted on the other folds, 1 by what saw it; unless set, 2 for "
        "fine-tuned members",
    )
    max_pairs: int = Field(
        20_000, ge=8, description="pairs that the reward and the per-layer curve are fitted on, by hash; bounds memory"
    )
    epochs: int = Field(10, ge=0, description="passes over the head's training pairs after the ridge start")
    batch_size: int = Field(32, ge=1, description="pairs of one head step")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW step of the head")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of the head")
    ridge: float = Field(0.1, gt=0, description="penalty of the ridge start and of the per-layer curve, per pair")
    bce_weight: float = Field(1.0, ge=0, description="weight of the calibration anchor (E3); 0 drops it")
    margin_target: float = Field(1.0, ge=0, description="margin asked for by the pair loss (E2), reward units")
    train_probes: bool = Field(True, description="train probes and vote; False trains the vote alone")
    prior_precision: Annotated[float, Field(gt=0)] | Literal["fitted"] = Field(
        "fitted", description="Gaussian prior of the Laplace probe; 'fitted' by the likelihood of validation pairs"
    )


class BrmeSection(Section):
    """The second stage of BRME (arXiv:2409.15360): Gaussian heads fitted to the standardised first-stage reward."""

    loss: Literal["gaussian_nll", "beta_nll", "mse_reparam", "mse_reparam_kl", "margin_mse", "purm"] = Field(
        "gaussian_nll", description="mse_reparam is the paper's, whose sigma goes to its floor; purm reads pairs alone"
    )
    epochs: int = Field(20, ge=1, description="passes over the pairs")
    batch_size: int = Field(32, ge=1, description="pairs of one step")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW step, divided by the square root of the inputs")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    sigma_floor: float = Field(1e-3, gt=0, description="smallest standard deviation of a head, reward units")


class RewardModelSection(Section):
    """A reward model that reads texts: LoRA members fine-tuned from the policy, or a sequence classifier of yours."""

    model: str | None = Field(None, description="HF sequence classifier (directory or hub id) of reward.kind=external")
    label: str | None = Field(None, description="its output that is the reward; needed when it has several")
    is_cost: bool = Field(False, description="its output is a cost, above 0 unsafe; the reward is minus the cost")
    lora_rank: int = Field(8, ge=1, description="rank of a member's adapter")
    lora_alpha: int = Field(16, ge=1, description="scale of the adapter is lora_alpha / lora_rank")
    diversity_weight: float = Field(
        0.0, ge=0, description="pull of members away from each other (normalised nuclear norm, arXiv:2401.00243)"
    )
    epochs: int = Field(1, ge=1, description="passes over a member's training pairs")
    batch_size: int = Field(16, ge=1, description="pairs of one step")
    learning_rate: float = Field(1e-3, gt=0, description="peak step of AdamW, linear decay")
    batch_tokens: int = Field(4096, ge=64, description="token budget of one forward")


class RobustSection(Section):
    """How the members' rewards of a response become the one that online training and best-of-n maximise."""

    rule: Literal["mean", "min", "uwo", "lcb", "cvar", "entropic", "brme"] = Field(
        "mean", description="rule over members; unless set, brme when reward.kind=brme"
    )
    w_nominal: float = Field(
        0.2, ge=0, le=1, description="weight of the most confident head against the minimum (brme)"
    )
    set_type: Literal["heads_pointwise", "heads_global"] = Field(
        "heads_pointwise",
        description="minimum per response (min, brme), or the one head that is worst on average over the round",
    )
    uncertainty_weight: float = Field(0.5, ge=0, description="weight of the members' variance (uwo)")
    lcb_k: float = Field(1.0, ge=0, description="standard deviations below the mean (lcb)")
    cvar_level: float = Field(0.4, gt=0, le=1, description="share of the lowest members that is averaged (cvar)")
    entropic_b: float = Field(1.0, gt=0, description="risk temperature, towards the minimum at 0 (entropic)")


class ConfidenceSection(Section):
    """How a reward margin becomes the label confidence gamma of the loss (E4)."""

    source: Literal["fixed", "live"] = Field(
        "fixed", description="from the cached reference features, or from the policy's current detached states"
    )
    level: Literal["pair", "batch"] = Field(
        "pair", description="one gamma per pair, or one for the whole update batch (live only)"
    )
    alpha: float = Field(7.5, gt=0, description="sharpness of gamma")
    floor: float = Field(0.0, ge=0, lt=1, description="smallest gamma; 0.5 forbids flips, as the released code does")
    center: Literal["ema", "none"] = Field(
        "ema", description="subtract the mean reward before the squash: a running mean when live, else that of the fold"
    )
    center_decay: float = Field(0.99, ge=0, lt=1, description="decay of that mean, per update")
    squash: Literal["sigmoid", "none"] = Field("sigmoid", description="none is sigmoid(margin / temperature)")
    temperature: Annotated[float, Field(gt=0)] | Literal["fitted"] = Field(
        "fitted", description="reward units, for squash=none; 'fitted' calibrates on out-of-fold pairs"
    )
    track: Literal["none", "anchor", "stored_order"] = Field(
        "none",
        description="let the head follow the drifting states, on labelled anchor pairs or on the batch's stored order",
    )
    track_learning_rate: float = Field(1e-3, gt=0, description="step of the tracking head, once per update")
    track_batch_size: int = Field(16, ge=1, description="anchor pairs re-encoded per update")


class TrainSection(Section):
    """The trainer: what one update is, whatever the rows come from."""

    method: Literal["offline", "online_dpo", "policy_gradient"] = Field(
        "offline", description="stored pairs, pairs sampled from the current policy, or rewards of sampled responses"
    )
    objective: Literal["label_confidence", "dpo", "cdpo", "rdpo", "ipo", "sft", "ava_p", "ava_d"] = Field(
        "label_confidence",
        description="loss over pairs, or of the chosen responses alone (sft, ava_d); unless set, dpo when pairs are "
        "sampled online",
    )
    beta: float = Field(0.15, gt=0, description="strength of the KL tie to the reference")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="assumed share of flipped labels (cdpo, rdpo)")
    ipo_tau: float = Field(0.1, gt=0, description="regularisation of ipo; its target margin is 1 / (2 tau)")
    epochs: int = Field(1, ge=1, description="passes over the training pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after so many updates")
    batch_size: int = Field(
        16, ge=1, description="pairs (prompts with policy_gradient) per update over all workers, whatever their number"
    )
    batch_tokens: int = Field(4096, ge=64, description="token budget of one micro-batch on one worker")
    learning_rate: float = Field(
        1e-6, gt=0, description="peak step of AdamW; unless set, 1e-6 (full), 1e-5 (lora) or 5e-5 (embedded model)"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the updates that warm up linearly")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay of matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    layout: Literal["auto", "shared", "packed", "padded"] = Field(
        "auto", description="auto shares the prompt between both answers where the architecture allows it"
    )
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="replicate the model or shard it (FSDP2)")
    checkpoint_every: int = Field(50, ge=1, description="updates between checkpoints; the last update always has one")
    log_every: int = Field(5, ge=1, description="updates between metric records")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    max_failures: int = Field(2, ge=0, description="worker failures survived by restarting from the last checkpoint")


class OnlineSection(Section):
    """Rounds of sampling, scoring and training on what was sampled (online_dpo, policy_gradient)."""

    num_rounds: int = Field(4, ge=1, description="rounds; weights go to the samplers at the start of each")
    prompts_per_round: int = Field(64, ge=1, description="prompts of one round, in a random order without repetition")
    num_samples: int = Field(4, ge=2, description="responses sampled per prompt (K)")
    reference: Literal["initial", "previous_round"] = Field(
        "initial", description="what online_dpo ties the policy to: the first model, or the policy of the round's start"
    )
    pairs: Literal["best_worst", "bradley_terry"] = Field(
        "best_worst", description="pair of a prompt: highest against lowest reward, or two responses in sampled order"
    )
    round_epochs: int = Field(1, ge=1, description="passes over the responses of one round")


class SamplerSection(Section):
    """The vLLM engines that sample for the online methods."""

    num_engines: int = Field(1, ge=1, description="engine actors, each with a copy of the policy")
    cpus_per_engine: float = Field(0.5, gt=0, description="CPUs of one engine actor; it idles while the trainer works")
    gpus_per_engine: int = Field(0, ge=0, description="GPUs of one engine actor, its tensor-parallel size; 0 is CPU")
    scorer_cpus: float = Field(0.5, gt=0, description="CPUs of the actor that scores responses with the reference")
    scorer_gpus: float = Field(0, ge=0, description="GPUs of that actor, fractions allowed")
    temperature: float = Field(1.0, ge=0.01, le=2, description="sampling temperature, within what vLLM takes")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; policy gradients need 1")
    max_new_tokens: int = Field(64, ge=1, description="length limit of a response")
    cache_mib: int = Field(64, ge=1, description="key-value cache of an engine on CPUs")
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1, description="share of a GPU that an engine may fill")
    enforce_eager: bool | None = Field(
        None,
        description="skip compilation, which starts in seconds instead of minutes and samples slower; unless set, on "
        "CPUs only",
    )
    weight_transfer: Literal["object_store", "nccl"] = Field(
        "object_store", description="way of full weights to the engines; nccl is vLLM's own broadcast from GPU to GPU"
    )
    start_timeout_s: float = Field(300, gt=0, description="longest wait for engines to start")
    timeout_s: float = Field(600, gt=0, description="longest wait for one call to an engine")
    max_restarts: int = Field(2, ge=0, description="deaths or hangs of engines survived in one run")


class PolicyGradientSection(Section):
    """PPO-clip over sampled responses."""

    advantage: Literal["group", "gae"] = Field(
        "group", description="leave-one-out within the responses of a prompt, or a value head with GAE"
    )
    group_scale: Literal["none", "std"] = Field(
        "none", description="std divides by the group's deviation, which bends the gradient"
    )
    credit: Literal["sequence", "token"] = Field(
        "sequence", description="one reward at the end of a response, or one per token, see token_reward.credit"
    )
    beta: float = Field(0.05, ge=0, description="weight of the KL to the reference, in the reward")
    clip: float = Field(0.2, gt=0, lt=1, description="bound of the probability ratio of one update")
    importance_cap: float = Field(
        2.0, gt=0, description="bound of trainer over sampler probability, per token (truncated importance weight)"
    )
    reduction: Literal["token_global", "sequence_sum"] = Field(
        "token_global", description="loss per token or per response of the whole batch"
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="bias against variance of GAE; the discount is 1")
    value_learning_rate: float = Field(1e-3, gt=0, description="step of the value head")
    value_clip: float = Field(5.0, gt=0, description="bound of a value's change in one round, reward units")
    score_clip: float = Field(50.0, gt=0, description="bound of rewards, reward units")


class EvaluateSection(Section):
    """Safety and over-refusal, before and after, and the drift check."""

    prompts: str = Field(EMBEDDED, description="jsonl with prompt, category, harmful; 'embedded' ships")
    judge: str = Field(EMBEDDED, description="HF sequence classifier (directory or hub id) with an 'unsafe' label")
    num_prompts: int = Field(160, ge=2, description="prompts used, half of them benign, chosen by seed")
    max_new_tokens: int = Field(64, ge=4, description="length limit of an answer")
    temperature: float = Field(0.7, ge=0, description="sampling temperature; 0 is greedy")
    best_of: int = Field(
        1, ge=1, description="answers sampled per prompt, of which the one with the highest reward is judged"
    )
    batch_size: int = Field(64, ge=1, description="answers generated together")
    num_actors: int = Field(1, ge=1, description="actors that answer and judge, each with features.cpus_per_actor CPUs")
    drift_prompts: int = Field(24, ge=4, description="held-out prompts whose candidates measure drift")
    drift_candidates: int = Field(8, ge=2, description="answers sampled per prompt from the reference")
    constraint_samples: int = Field(
        0, ge=0, description="answers sampled per prompt from the final policy and priced by the cost model; 0 is none"
    )
    bootstrap_samples: int = Field(1000, ge=100, description="resamples behind intervals of means")


class ResourcesSection(Section):
    """What Ray is asked for; compared with the cluster before anything starts."""

    num_workers: int = Field(1, ge=1, description="training workers")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one training worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one training worker, 0 or 1")
    placement: Literal["pack", "spread"] = Field(
        "pack", description="training workers on as few nodes as hold them, or on as many"
    )
    start_timeout_s: float = Field(120, gt=0, description="longest wait for workers to start")


class TrackingSection(Section):
    """Where metrics go besides the run directory."""

    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Weights & Biases; key from WANDB_API_KEY only"
    )
    project: str = Field("raylign", description="Weights & Biases project")


class CostSection(Section):
    """What the cost ledger is told; it measures device-seconds whatever is set here."""

    prices: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="money per device-hour by kind of device as the ledger names it, e.g. {cpu: 0.05, H200: 4}"
    )
    currency: str = Field("USD", min_length=1, description="of cost.prices")
