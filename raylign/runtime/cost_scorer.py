"""From the files of a cost model to what prices responses with it. Cost > 0 is unsafe, cost <= 0 is safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raylign.assets import TINY_JUDGE, asset_path
from raylign.config import EMBEDDED, CostModelSection
from raylign.evaluation.scoring import RewardScorer, StatesReward
from raylign.models.cost_model import CostForward
from raylign.models.loading import load_tokenizer, resolve_dtype, resolve_layout, resolve_model
from raylign.models.numerics import actor_device, load_reference
from raylign.models.reward_model import TextReward
from raylign.runtime.cost_members import fit_directory, load_cost_members
from raylign.runtime.fitted_cost import FittedCost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.reward_scorer import TextsReward
from raylign.runtime.text_rewards import load_foreign

if TYPE_CHECKING:
    import torch

    from raylign.data.conversations import Ids
    from raylign.evaluation.scoring import ResponseReward
    from raylign.rewards.posterior import RewardPosterior
    from raylign.runtime.evaluators import ActorOptions


@dataclass(frozen=True)
class ResponseCost:
    """A cost model of responses, whatever it reads of them.

    Attributes:
        belief: believes something of responses, as a reward model does.
        sign: +1 when that is the cost, -1 when it is minus the cost.
    """

    belief: ResponseReward
    sign: float

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Transformer layers, from 1, whose states at the last token it reads; None when it reads token ids."""
        return self.belief.layers

    def __call__(
        self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids], states: torch.Tensor | None
    ) -> torch.Tensor:
        """Costs (N,) of N responses; see `ResponseReward`."""
        return self.of(self.belief(prompt_ids, response_ids, states))

    def of(self, belief: RewardPosterior) -> torch.Tensor:
        """Costs (N,) by the mean over members."""
        return self.sign * belief.mean


def load_response_cost(
    model_path: str,
    cost_dir: str,
    device: torch.device | str,
    *,
    cost_model: CostModelSection,
    options: ActorOptions,
) -> ResponseCost:
    """What was fitted to all training pairs, for responses that are none of them.

    Args:
        model_path: directory of the reference.
        cost_dir: of the cost phase.
        device: of heads.
        cost_model: which classifier, or how members are read, for a cost of texts.
        options: the actor that prices.
    """
    fitted = FittedCost.load(Path(cost_dir))
    if fitted.full is not None:
        return ResponseCost(StatesReward(fitted.full.to(device), fitted.layers), sign=1.0)
    reward = make_text_cost(model_path, fitted, cost_dir, cost_model=cost_model, options=options)
    return ResponseCost(TextsReward(reward), sign=-1.0)


def make_text_cost(
    model_path: str,
    fitted: FittedCost,
    cost_dir: str | Path,
    *,
    cost_model: CostModelSection,
    options: ActorOptions,
    fold: int = FULL,
) -> TextReward:
    """What prices texts, as a reward of texts, which is minus the cost: fine-tuned members or the external classifier.

    Args:
        model_path: directory of the policy, whose token ids are priced.
        fitted: what prices responses.
        cost_dir: of the cost phase.
        cost_model: `cost_model` section.
        options: size and number types of the actor.
        fold: that members must not have seen, `FULL` for those fitted to all training pairs.

    Raises:
        ModelError: a classifier, member, tokenizer or label that cannot be used.
    """
    if fitted.members:
        directory = fit_directory(Path(cost_dir), fold)
        return load_cost_members(model_path, fitted, directory, cost_model=cost_model, options=options)
    tokenizer = load_tokenizer(model_path, trust_remote_code=options.trust_remote_code)
    path = resolve_cost_model(cost_model)
    model, own = load_foreign(path, tokenizer, options, key="cost_model.model")
    device = actor_device(options.num_gpus)
    dtype = resolve_dtype(options.dtype, device)
    autocast = None if dtype.itemsize == 4 else dtype
    forward = CostForward(model.to(device), label=cost_model.label, where=path, autocast_dtype=autocast)
    return TextReward(forward, tokenizer, own_tokenizer=own, is_cost=True, batch_tokens=cost_model.batch_tokens)


def resolve_cost_model(cost_model: CostModelSection) -> str:
    """Directory of the external classifier; "embedded" is the judge that ships.

    Raises:
        ModelError: neither a directory nor a repository that can be downloaded.
    """
    assert cost_model.model is not None  # refused by the configuration
    if cost_model.model == EMBEDDED:
        return str(asset_path(TINY_JUDGE))
    return resolve_model(cost_model.model, key="cost_model.model")


def make_cost_scorer(
    model_path: str, cost_dir: str, *, cost_model: CostModelSection, options: ActorOptions
) -> RewardScorer:
    """The run's cost of texts; what it returns are costs.

    Args:
        model_path: directory of the reference.
        cost_dir: what `FittedCost.save` wrote.
        cost_model: which classifier, for a cost of texts.
        options: the actor that prices; its number types must be those of the features.
    """
    device = actor_device(options.num_gpus)
    forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
    cost = load_response_cost(model_path, cost_dir, device, cost_model=cost_model, options=options)
    return RewardScorer(
        forward,
        load_tokenizer(model_path, trust_remote_code=options.trust_remote_code),
        cost.belief,
        rule=cost.of,
        layout=resolve_layout("auto", forward.causal_lm.config),
    )
