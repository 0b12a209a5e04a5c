"""Label confidence read from the policy's current hidden states, and heads that follow those states.

The forward that scores a pair also yields the states at its two response ends. Fold heads turn them into rewards: a
pair is judged by the head of its own fold, which never saw it. Rewards become gamma by E4 of docs/math.md.

The running centre in force during an update is the mean over the updates before it, so that gamma of a pair depends
neither on how the batch is cut nor on the number of workers, at no cost. Where E4 needs the whole batch first (level
"batch", and the first centre of a run) the update starts with a forward without gradient: about a third of its time.

Shape letters: B pairs of the update, K heads, L layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from raylign.config import ConfidenceSection, RewardSection
from raylign.errors import CheckpointError, ConfigError, DataError
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.rewards.confidence import EmaCenter, pair_confidence, update_center
from raylign.rewards.posterior import RewardHead, margin_posterior
from raylign.training.micro_batches import Packing, encode
from raylign.training.order import DataOrder
from raylign.training.table import PairBatch, PairTable
from raylign.training.world import World
from raylign.types import PairScores

_BELIEF = 3  # chosen reward, rejected reward and margin variance of a pair


class LiveConfidence:
    """Gamma of the pairs of an update from the policy's states, with everything that it remembers between updates.

    Args:
        heads: K fold heads, alike in shape, moved to the worker's device.
        layers: L transformer layers that the heads read.
        settings: how rewards become gamma, and how heads are tracked.
        reward: losses of the tracking step.
        packing: how additional forwards are cut.
        seed: of the anchor order.
        world: this worker.
        temperature: reward units, needed for squash "none".
        anchors: labelled pairs that no head was fitted on, needed for track "anchor".

    Raises:
        ConfigError: a temperature or anchors are missing.
        DataError: no head.
    """

    def __init__(
        self,
        heads: Sequence[RewardHead],
        *,
        layers: tuple[int, ...],
        settings: ConfidenceSection,
        reward: RewardSection,
        packing: Packing,
        seed: int = 0,
        world: World | None = None,
        temperature: float | None = None,
        anchors: PairTable | None = None,
    ) -> None:
        if not heads:
            raise DataError("confidence.source=live needs at least one reward head; run the reward phase first")
        if settings.track == "anchor" and anchors is None:
            raise ConfigError("confidence.track=anchor needs labelled held-out pairs; there are none (split 'valid')")
        self.layers = layers
        self.center = EmaCenter()
        self._settings = settings
        self._reward = reward
        self._packing = packing
        self._world = world or World()
        self._temperature = _resolve_temperature(settings, temperature)
        self._heads = nn.ModuleList(heads).to(self._world.device)
        self._optimizer = self._head_optimizer() if settings.track != "none" else None
        self._anchors = anchors
        self._anchor_order = (
            DataOrder(num_pairs=len(anchors), batch_size=settings.track_batch_size, seed=seed, epochs=None)
            if anchors is not None
            else None
        )
        self._rewards = torch.zeros(0)
        self._gamma: torch.Tensor | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._batch_fold = torch.zeros(0)

    @property
    def heads(self) -> Sequence[RewardHead]:
        """The K heads as they are now."""
        return cast(list[RewardHead], list(self._heads))

    def begin_update(self, policy: nn.Module, batch: PairBatch) -> None:
        """Forget the last update; run the forward without gradient where E4 needs the whole batch first.

        Args:
            policy: what training calls.
            batch: all B pairs of the update.
        """
        device = self._world.device
        self._batch_fold = batch.fold.to(device)
        self._rewards = torch.zeros(2, batch.num_pairs, dtype=torch.float64, device=device)
        self._kept = []
        self._gamma = None
        if not self._needs_whole_batch():
            return
        beliefs = torch.zeros(_BELIEF, batch.num_pairs, dtype=torch.float64, device=device)
        for micro, scores in encode(policy, batch.tokens, layers=self.layers, packing=self._packing, world=self._world):
            if micro.weight:
                index = torch.tensor(micro.indices, device=device)
                beliefs[:, index] = self._believe(scores, self._batch_fold[index])
        beliefs = self._world.sum(beliefs)
        if self._settings.center == "ema" and self.center.value is None:
            self.center = EmaCenter(beliefs[:2].mean())
        self._gamma = self._squash(beliefs)

    def confidence(self, scores: PairScores, index: torch.Tensor, *, is_filler: bool = False) -> torch.Tensor:
        """Gamma of the pairs of one micro-batch.

        Args:
            scores: of these pairs, with states of `layers`.
            index: positions of these pairs in the batch of `begin_update`. Shape (micro-batch,), int64.
            is_filler: the pairs repeat others and must leave no trace in the centre and the heads.

        Returns:
            Gamma, detached, float32, shape of `index`.
        """
        beliefs = self._believe(scores, self._batch_fold[index])
        if not is_filler:
            self._rewards[:, index] = beliefs[:2]
        if self._settings.track == "stored_order" and not is_filler:
            assert scores.chosen_states is not None and scores.rejected_states is not None
            self._kept.append((scores.chosen_states, scores.rejected_states, index))
        gamma = self._gamma[index] if self._gamma is not None else self._squash(beliefs)
        return gamma.float()

    def end_update(self, policy: nn.Module, update: int) -> None:
        """Move the centre, and let the heads follow the policy; the policy is not touched.

        Args:
            policy: with the weights after the update.
            update: number of updates finished before this one; picks the anchors.
        """
        rewards = self._world.sum(self._rewards)
        if self._settings.center == "ema":
            self.center = update_center(self.center, rewards.mean(), decay=self._settings.center_decay)
        if self._settings.track == "anchor":
            self._track_anchors(policy, update)
        elif self._settings.track == "stored_order":
            self._track_stored_order()

    def state_dict(self) -> dict[str, Any]:
        """Centre, and where heads are tracked the heads and their optimiser: tensors and plain values only.

        Heads that stay are in the directory of the reward, and can be larger than the policy.
        """
        is_tracked = self._optimizer is not None
        return {
            "center": self.center.value,
            "heads": [head.state_dict() for head in self._heads] if is_tracked else None,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            CheckpointError: the state is of other heads, or of a run that tracked its heads and this one does not, or
                the other way round.
        """
        saved = state["heads"]
        if (saved is None) != (self._optimizer is None):
            raise CheckpointError(
                f"the checkpoint holds {'no ' * (saved is None)}tracked reward heads, this run has "
                f"confidence.track={self._settings.track}; resume with the configuration of the run"
            )
        if self._optimizer is not None:
            if len(saved) != len(self._heads):
                raise CheckpointError(
                    f"the checkpoint holds {len(saved)} reward heads, this run has {len(self._heads)}"
                )
            for head, tensors in zip(self._heads, saved, strict=True):
                head.load_state_dict(tensors)
            self._optimizer.load_state_dict(state["optimizer"])
        center = state["center"]
        self.center = EmaCenter(None if center is None else center.to(self._world.device))

    def _needs_whole_batch(self) -> bool:
        is_first_center = self._settings.center == "ema" and self.center.value is None
        return self._settings.level == "batch" or (self._settings.squash == "sigmoid" and is_first_center)

    @torch.no_grad()
    def _believe(self, scores: PairScores, fold: torch.Tensor) -> torch.Tensor:
        """Chosen and rejected reward and margin variance of each pair, by the head of its fold. Shape (3, B), float64.

        A pair without a fold was seen by no head, so all of them may judge it.
        """
        assert scores.chosen_states is not None and scores.rejected_states is not None
        by_head = []
        for head in self._heads:
            chosen, rejected = head(scores.chosen_states), head(scores.rejected_states)
            variance = margin_posterior(chosen, rejected).variance
            by_head.append(torch.stack([chosen.mean, rejected.mean, variance]))
        beliefs_K3B = torch.stack(by_head).double()
        own = fold.clamp(0, len(self._heads) - 1).expand(1, _BELIEF, -1)
        return torch.where(fold < 0, beliefs_K3B.mean(0), beliefs_K3B.gather(0, own)[0])

    def _squash(self, beliefs: torch.Tensor) -> torch.Tensor:
        center = self.center.value if self._settings.center == "ema" else None
        return pair_confidence(
            *beliefs,
            alpha=self._settings.alpha,
            floor=self._settings.floor,
            center=0.0 if center is None else center,
            level=self._settings.level,
            squash=self._settings.squash,
            temperature=self._temperature,
        ).label_confidence

    def _track_anchors(self, policy: nn.Module, update: int) -> None:
        assert self._anchors is not None and self._anchor_order is not None
        batch = self._anchors.batch(self._anchor_order.batch(update))
        fold = batch.fold.to(self._world.device)
        kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for micro, scores in encode(policy, batch.tokens, layers=self.layers, packing=self._packing, world=self._world):
            if micro.weight:
                assert scores.chosen_states is not None and scores.rejected_states is not None
                kept.append((scores.chosen_states, scores.rejected_states, torch.tensor(micro.indices)))
        self._head_step(kept, fold)

    def _track_stored_order(self) -> None:
        self._head_step(self._kept, self._batch_fold)

    def _head_step(self, kept: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], fold: torch.Tensor) -> None:
        """One step of every head on E2 + E3 over the pairs outside its fold, summed over all workers.

        Args:
            kept: chosen states (b, L, D), rejected states and batch positions of this worker's pairs.
            fold: of all pairs of the batch. Shape (B,).
        """
        assert self._optimizer is not None
        parameters = [p for p in self._heads.parameters() if p.requires_grad]
        self._optimizer.zero_grad(set_to_none=False)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for number, head in enumerate(self._heads):
            is_seen = (fold != number) if len(self._heads) > 1 else torch.ones_like(fold, dtype=torch.bool)
            count = max(1, int(is_seen.sum()))
            for chosen_states, rejected_states, index in kept:
                mask = is_seen[index.to(fold.device)].float()[:, None]
                chosen, rejected = head(chosen_states).head_rewards, head(rejected_states).head_rewards
                loss = margin_loss(chosen, rejected, margin_target=self._reward.margin_target)
                loss = loss + self._reward.bce_weight * anchor_loss(chosen, rejected)
                ((loss * mask).sum() / count).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]  # of all: they started as zeros
        flat = self._world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
        self._optimizer.step()

    def _head_optimizer(self) -> torch.optim.AdamW:
        for name, parameter in self._heads.named_parameters():
            parameter.requires_grad_(self._reward.train_probes or name.endswith("vote"))
        return torch.optim.AdamW(
            [parameter for parameter in self._heads.parameters() if parameter.requires_grad],
            lr=self._settings.track_learning_rate,
            weight_decay=self._reward.weight_decay,
        )


def _resolve_temperature(settings: ConfidenceSection, temperature: float | None) -> float:
    """The configured number, or the fitted one; 1 where E4 does not read it."""
    if settings.squash == "sigmoid":
        return 1.0
    if settings.temperature != "fitted":
        return float(settings.temperature)
    if temperature is None:
        raise ConfigError("confidence.temperature=fitted needs the temperature of the rank phase; give a number")
    return temperature
