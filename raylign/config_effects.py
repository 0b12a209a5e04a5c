"""Which keys of a configuration have an effect together: what one choice makes idle, and what does not fit.

No torch, no ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raylign.config_ava import AvaSection
from raylign.config_cost_effects import (
    add_idle_constraint,
    add_idle_cost_model,
    check_constraint,
    check_cost_model,
)
from raylign.config_sections import (
    BrmeSection,
    ConfidenceSection,
    OnlineSection,
    PolicyGradientSection,
    RobustSection,
    SamplerSection,
)
from raylign.errors import ConfigError

if TYPE_CHECKING:
    from raylign.config import RunConfig

TOKEN_REWARDS = ("ava_p", "ava_d", "token_bt")  # kinds that reward every token of a text
# kinds that read texts instead of cached hidden states
TEXT_REWARDS = ("lora_ensemble", "warm", "external", *TOKEN_REWARDS)
AVA = ("ava_p", "ava_d")  # rewards and objectives
PAIR_OBJECTIVES = ("dpo", "cdpo", "rdpo", "ipo")  # over pairs alone, whoever ordered them
RULE_KEYS = {
    "brme": "w_nominal",
    "uwo": "uncertainty_weight",
    "lcb": "lcb_k",
    "cvar": "cvar_level",
    "entropic": "entropic_b",
}


def check_effects(config: RunConfig) -> None:
    """Refuse keys that were set but that the chosen method never reads.

    Raises:
        ConfigError: naming the key, the choice that makes it idle, and the choice that would read it.
    """
    for key, cure in idle_keys(config).items():
        section, _, name = key.partition(".")
        if name in getattr(config, section).model_fields_set:
            raise ConfigError(f"{key} is set but has no effect here; remove it or {cure}")
    if config.data.prompt_limit >= config.data.max_length:
        raise ConfigError(
            f"data.max_prompt_length={config.data.max_prompt_length} leaves no room for an answer "
            f"within data.max_length={config.data.max_length}"
        )
    if config.resources.gpus_per_worker not in (0, 1):
        raise ConfigError(
            f"resources.gpus_per_worker={config.resources.gpus_per_worker:g} must be 0 or 1: "
            "one process drives one GPU; use more workers (resources.num_workers)"
        )
    if config.train.method == "online_dpo" and config.train.objective not in PAIR_OBJECTIVES:
        raise ConfigError(
            f"train.objective={config.train.objective} reads stored pairs and their labels; pairs sampled online are "
            "ordered by the reward itself: use dpo, cdpo, rdpo or ipo, or train.method=offline"
        )
    if config.train.method == "policy_gradient" and (config.sampler.temperature, config.sampler.top_p) != (1.0, 1.0):
        raise ConfigError(
            f"sampler.temperature={config.sampler.temperature:g} and sampler.top_p={config.sampler.top_p:g} must both "
            "be 1 for train.method=policy_gradient: other values sample from another policy than the trained one"
        )
    if config.sampler.weight_transfer == "nccl" and config.train.method != "offline":
        _check_transfer(config)
    if config.evaluate.best_of > 1 and config.evaluate.temperature == 0:
        raise ConfigError(
            f"evaluate.best_of={config.evaluate.best_of} needs evaluate.temperature above 0: "
            "greedy answers are all alike"
        )
    if config.data.valid_fraction + config.data.test_fraction >= 1:
        raise ConfigError("data.valid_fraction + data.test_fraction must leave pairs to train on")
    _check_reward(config)
    _check_ava(config)
    check_constraint(config)
    check_cost_model(config)


def _check_transfer(config: RunConfig) -> None:
    """Refuse an NCCL transfer between what has no GPU, and of an adapter, which vLLM takes as a file."""
    gpus = {
        "sampler.gpus_per_engine": config.sampler.gpus_per_engine,
        "resources.gpus_per_worker": config.resources.gpus_per_worker,
    }
    without = [f"{key}={number:g}" for key, number in gpus.items() if not number]
    if without:
        raise ConfigError(
            f"sampler.weight_transfer=nccl goes from GPU to GPU, found {' and '.join(without)}: give both GPUs, or use "
            "object_store"
        )
    if config.policy.adapter == "lora":
        raise ConfigError(
            "sampler.weight_transfer=nccl sends full weights, policy.adapter=lora has an adapter to send, which goes "
            "through the object store: use object_store"
        )


def _check_log_prob(config: RunConfig) -> None:
    """Refuse to score responses by a log-probability that is none, or to expect a sigma of it."""
    ava = config.ava
    if ava.q_from == "probs" or (ava.q_from == "logits" and ava.logit_scale != 1):
        raise ConfigError(
            f"token_reward.score=log_prob with ava.q_from={ava.q_from} and ava.logit_scale={ava.logit_scale:g} would "
            "sum what is no log-probability of the policy, which ranks by length: use ava.q_from=logits with "
            "ava.logit_scale=1, or another score"
        )
    if config.robust.rule == "brme":
        raise ConfigError(
            "robust.rule=brme needs a sigma, which token_reward.score=log_prob has not: use min, or another score"
        )


def _check_reward(config: RunConfig) -> None:
    """Refuse reward models and rules over their members that do not fit together."""
    reward, robust, confidence = config.reward, config.robust, config.confidence
    if reward.kind == "external" and config.reward_model.model is None:
        raise ConfigError("reward.kind=external needs reward_model.model, the directory of a sequence classifier")
    if reward.head_data == "shards" and reward.num_heads < 2:
        raise ConfigError("reward.head_data=shards leaves each member a part out: set reward.num_heads above 1")
    if robust.rule == "brme" and reward.kind not in ("brme", *AVA):
        raise ConfigError(
            f"robust.rule=brme needs heads that state their own sigma, reward.kind={reward.kind} has none: "
            "use min, or reward.kind=brme"
        )
    if reward.kind == "token_bt" and config.token_reward.score == "log_prob":
        raise ConfigError(
            "token_reward.score=log_prob is what the policy inside ava_p and ava_d says, reward.kind=token_bt has "
            "none: use last, sum or mean"
        )
    if reward.kind in AVA and config.token_reward.score == "log_prob":
        _check_log_prob(config)
    if config.train.method == "policy_gradient" and config.policy_gradient.credit == "token":
        if reward.kind not in TOKEN_REWARDS:
            raise ConfigError(
                f"policy_gradient.credit=token needs a reward for every token, reward.kind={reward.kind} rewards whole "
                "responses: use reward.kind=ava_p, ava_d or token_bt, or policy_gradient.credit=sequence"
            )
        if config.token_reward.score == "log_prob":
            raise ConfigError(
                "policy_gradient.credit=token gives tokens rewards, token_reward.score=log_prob scores responses by "
                "log-probabilities: use last, sum or mean, or policy_gradient.credit=sequence"
            )
    if not reward.standardize and reward.bce_weight == 0 and reward.kind == "ensemble" and robust.rule != "mean":
        raise ConfigError(
            f"robust.rule={robust.rule} compares members whose zero nothing ties together: keep "
            "reward.standardize=true, or give reward.bce_weight a value above 0"
        )
    if robust.set_type == "heads_global" and config.evaluate.best_of > 1:
        raise ConfigError(
            "robust.set_type=heads_global picks one head for a whole round, best-of-n has no rounds: "
            "use evaluate.best_of=1 or robust.set_type=heads_pointwise"
        )
    if confidence.source == "live" and reward.kind in TEXT_REWARDS:
        raise ConfigError(
            f"confidence.source=live reads the policy's hidden states, reward.kind={reward.kind} reads texts: "
            "use confidence.source=fixed or another reward.kind"
        )
    if confidence.track != "none" and reward.kind not in ("hybrid", "ensemble"):
        raise ConfigError(
            f"confidence.track={confidence.track} lets probes follow the states, reward.kind={reward.kind} has none "
            "that one step can move: use confidence.track=none or reward.kind=hybrid or ensemble"
        )


def _check_ava(config: RunConfig) -> None:
    """Refuse coefficients at which the variational objective has no minimum, and a Q that a policy has not."""
    ava, is_trained = config.ava, config.train.method == "offline" and config.train.objective in AVA
    if config.reward.kind not in AVA and not is_trained:
        return
    if ava.td_weight >= 1 and ("sigma_floor" not in ava.model_fields_set or ava.sigma_floor == 0):
        raise ConfigError(
            f"ava.td_weight={ava.td_weight:g} outweighs the KL: from 1 on the best sigma of a well-fitted token is 0, "
            "where the loss has no lower bound or its gradient no upper one; use a value below 1, or set "
            "ava.sigma_floor above 0 to accept that sigma lies on it"
        )
    if is_trained and ava.q_from == "q_head":
        raise ConfigError(
            f"ava.q_from=q_head is a reward model's; train.objective={config.train.objective} trains the policy, "
            "whose q are its own log-probabilities: use logits or probs"
        )


def idle_keys(config: RunConfig) -> dict[str, str]:
    """Keys that the chosen method does not read, each with the change that would make it read."""
    train, confidence, policy = config.train, config.confidence, config.policy
    idle: dict[str, str] = {}

    def reads(is_read: bool, section: str, names: Sequence[str], cure: str) -> None:
        if not is_read:
            idle.update({f"{section}.{name}": cure for name in names if f"{section}.{name}" not in idle})

    is_offline, is_gradient = train.method == "offline", train.method == "policy_gradient"
    uses_confidence = train.objective == "label_confidence" and is_offline
    online = "set train.method=online_dpo or policy_gradient"
    reads(not is_offline, "online", list(OnlineSection.model_fields), online)
    reads(not is_offline, "sampler", list(SamplerSection.model_fields), online)
    reads(not is_gradient, "train", ["objective", "beta"], "use policy_gradient.beta, or another train.method")
    reads(is_gradient, "policy_gradient", list(PolicyGradientSection.model_fields), "set train.method=policy_gradient")
    reads(train.method == "online_dpo", "online", ["reference", "pairs"], "set train.method=online_dpo")
    has_values = config.policy_gradient.advantage == "gae"
    value_keys = ["gae_lambda", "value_learning_rate", "value_clip"]
    reads(has_values, "policy_gradient", value_keys, "set policy_gradient.advantage=gae")
    reads(not has_values, "policy_gradient", ["group_scale"], "set policy_gradient.advantage=group")
    add_idle_constraint(config, reads)
    add_idle_cost_model(config, reads)
    reads(is_offline, "train", ["epochs", "max_steps"], "use online.num_rounds and online.round_epochs")
    on_gpu = config.sampler.gpus_per_engine > 0
    reads(on_gpu, "sampler", ["gpu_memory_utilization"], "set sampler.gpus_per_engine above 0")
    reads(not on_gpu, "sampler", ["cache_mib"], "set sampler.gpus_per_engine=0")
    reads(train.objective in ("cdpo", "rdpo"), "train", ["label_smoothing"], "set train.objective=cdpo or rdpo")
    reads(train.objective == "ipo", "train", ["ipo_tau"], "set train.objective=ipo")
    reads(train.objective != "ipo", "train", ["beta"], "use train.ipo_tau, which is what ipo reads")
    has_reference = train.objective in ("label_confidence", *PAIR_OBJECTIVES)
    reads(has_reference, "train", ["beta"], "use an objective with a reference, such as dpo")
    reads(uses_confidence, "confidence", list(ConfidenceSection.model_fields), "set train.objective=label_confidence")
    live = confidence.source == "live"
    reads(live, "confidence", ["level", "track"], "set confidence.source=live")
    reads(live and confidence.track != "none", "confidence", ["track_learning_rate"], "set confidence.track=anchor")
    reads(live and confidence.track == "anchor", "confidence", ["track_batch_size"], "set confidence.track=anchor")
    squashed = confidence.squash == "sigmoid"
    reads(not squashed, "confidence", ["temperature"], "set confidence.squash=none")
    reads(squashed, "confidence", ["alpha", "center"], "set confidence.squash=sigmoid")
    has_ema = live and squashed and confidence.center == "ema"
    reads(has_ema, "confidence", ["center_decay"], "set confidence.source=live and confidence.center=ema")
    reads(config.data.format in ("auto", "pku"), "data", ["prefer"], "set data.format=auto or pku")
    _add_idle_reward(config, reads)
    _add_idle_tokens(config, reads)
    reads(policy.adapter == "lora", "policy", ["lora_rank", "lora_alpha", "lora_dropout"], "set policy.adapter=lora")
    reads(config.tracking.wandb != "off", "tracking", ["project"], "set tracking.wandb=offline")
    reads(config.cost.prices is not None, "cost", ["currency"], "set cost.prices")
    return idle


def _add_idle_reward(config: RunConfig, reads: Callable[[bool, str, Sequence[str], str], None]) -> None:
    """Keys of the reward that its kind and its rule do not read."""
    kind, robust, is_offline = config.reward.kind, config.robust, config.train.method == "offline"
    is_many, is_fine_tuned = config.reward.num_heads > 1, kind in ("lora_ensemble", "warm", *TOKEN_REWARDS)
    has_members = kind == "laplace" or (is_many and kind in ("ensemble", "brme", "lora_ensemble", *TOKEN_REWARDS))
    has_probes = kind in ("hybrid", "ensemble", "brme")
    another = "use another reward.kind than"
    reads(kind not in ("hybrid", "external"), "reward", ["num_heads"], "set reward.kind=ensemble")
    is_drawn = kind in ("ensemble", "brme", "lora_ensemble", "warm", *TOKEN_REWARDS)
    reads(is_drawn, "reward", ["head_data"], "set reward.kind=ensemble")
    is_standardized = kind in ("ensemble", "lora_ensemble") or (is_many and kind in TOKEN_REWARDS)
    reads(is_standardized, "reward", ["standardize"], "set reward.kind=ensemble")
    reads(kind != "external", "reward", ["folds"], f"{another} external")
    probe_steps = ["batch_size", "learning_rate", "weight_decay", "bce_weight", "margin_target", "train_probes"]
    reads(has_probes, "reward", ["epochs", *probe_steps], f"{another} {kind}")
    reads(config.reward.epochs > 0, "reward", probe_steps, "set reward.epochs above 0")  # else the start is all
    reads(kind not in TEXT_REWARDS, "reward", ["ridge"], f"{another} {kind}")
    reads(kind == "laplace", "reward", ["prior_precision"], "set reward.kind=laplace")
    reads(kind == "brme", "brme", list(BrmeSection.model_fields), "set reward.kind=brme")
    reads(kind == "external", "reward_model", ["model", "label", "is_cost"], "set reward.kind=external")
    reads(kind in TEXT_REWARDS, "reward_model", ["batch_tokens"], "set reward.kind=lora_ensemble, warm or external")
    steps = ["lora_rank", "lora_alpha", "diversity_weight", "epochs", "batch_size", "learning_rate"]
    reads(is_fine_tuned, "reward_model", steps, "set reward.kind=lora_ensemble")
    reads(kind not in TOKEN_REWARDS, "reward_model", ["diversity_weight"], "set reward.kind=lora_ensemble")
    reads(is_many, "reward_model", ["diversity_weight"], "set reward.num_heads above 1")
    is_aggregated = not is_offline or config.evaluate.best_of > 1
    reads(is_aggregated, "robust", list(RobustSection.model_fields), "set evaluate.best_of above 1 or an online method")
    reads(has_members, "robust", list(RobustSection.model_fields), "set reward.kind=ensemble and num_heads above 1")
    of_members = robust.rule in ("min", "cvar", "entropic")
    reads(is_many or not of_members, "robust", ["rule"], "set reward.num_heads above 1")
    reads(robust.rule in ("min", "brme"), "robust", ["set_type"], "set robust.rule=min or brme")
    reads(not is_offline, "robust", ["set_type"], "set train.method=online_dpo or policy_gradient")
    for rule, key in RULE_KEYS.items():
        reads(robust.rule == rule, "robust", [key], f"set robust.rule={rule}")


def _add_idle_tokens(config: RunConfig, reads: Callable[[bool, str, Sequence[str], str], None]) -> None:
    """Keys of rewards of tokens, and of the variational objective, that nothing reads."""
    kind, ava, train = config.reward.kind, config.ava, config.train
    offline = [train.objective] if train.method == "offline" else []
    readers = {name for name in (kind, *offline) if name in AVA}
    is_token = kind in TOKEN_REWARDS
    by_token = config.policy_gradient.credit == "token"
    reads(is_token, "token_reward", ["score", "credit", "dense_weight"], "set reward.kind=ava_p, ava_d or token_bt")
    reads(
        by_token,
        "token_reward",
        ["credit", "dense_weight"],
        "set train.method=policy_gradient and policy_gradient.credit=token",
    )
    is_gradient = train.method == "policy_gradient"
    reads(is_gradient, "token_reward", ["credit", "dense_weight"], "set train.method=policy_gradient")
    is_spread = config.token_reward.credit != "own"
    reads(is_spread, "token_reward", ["dense_weight"], "set token_reward.credit=differences or attention")
    reads(bool(readers), "ava", list(AvaSection.model_fields), "set reward.kind or train.objective to ava_p or ava_d")
    reads(set(readers) & set(offline) != set(), "ava", ["head_learning_rate"], "set train.objective to ava_p or ava_d")
    reads("ava_p" in readers, "ava", ["cer_weight", "cer", "negative"], "set reward.kind or train.objective to ava_p")
    reads(ava.cer_weight > 0, "ava", ["cer"], "set ava.cer_weight above 0")
    has_irl = ava.irl_weight > 0
    of_irl = ["td_weight", "discount", "terminal", "standardize_td", "detach_q"]
    reads(has_irl, "ava", of_irl, "set ava.irl_weight above 0")
    reads(ava.td_weight > 0, "ava", ["discount", "terminal", "standardize_td", "detach_q"], "set ava.td_weight above 0")


def check_devices(config: RunConfig) -> None:
    """Refuse a whole run whose parts would compute in different number types.

    Raises:
        ConfigError: some run on GPUs, some do not, and the type is left to each.
    """
    sampler = config.sampler
    gpus = {
        "features.gpus_per_actor": config.features.gpus_per_actor,
        "resources.gpus_per_worker": config.resources.gpus_per_worker,
    }
    if config.train.method != "offline":
        gpus |= {"sampler.gpus_per_engine": sampler.gpus_per_engine, "sampler.scorer_gpus": sampler.scorer_gpus}
    if len({number > 0 for number in gpus.values()}) > 1 and config.policy.dtype == "auto":
        shown = ", ".join(f"{key}={number:g}" for key, number in gpus.items())
        raise ConfigError(
            f"parts of the run are on different devices ({shown}), where policy.dtype=auto would mean two number "
            "types; set policy.dtype=float32 or bfloat16"
        )
