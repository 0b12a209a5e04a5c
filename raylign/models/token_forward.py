r"""A causal language model that rewards every token: one trunk per member, read by a reward head and by its own policy.

The reward of a token is read from the state that has seen it, so that it changes with that token and with no later one;
its q is read from the state before it, which predicts it. Prompts are context: none of their tokens is rewarded, and no
padding is, because positions come from the lengths of the responses.

sigma is what one Gaussian per token, computed by a network, states of itself. It is not a posterior over reward
functions: there is no joint law of the rewards of several tokens.

Shape letters as in `raylign.types`: B pairs, N response tokens of 2B sequences, D hidden width, V vocabulary, S row
length; n = 2B sequences, chosen first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from raylign.errors import ModelError
from raylign.losses.token_q import token_q
from raylign.models.forward import PolicyForward
from raylign.types import PackedBatch

HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenForm:
    """What a member says of a token.

    Attributes:
        q_from: where q comes from, see `ava.q_from`; None for rewards alone, without sigma and without a policy.
        logit_scale: factor of logits, probabilities or Q values before the softmax.
        sigma_floor: smallest sigma, reward units.
    """

    q_from: Literal["logits", "probs", "q_head"] | None
    logit_scale: float = 1.0
    sigma_floor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutputs:
    """What the active member says of the N response tokens of n sequences, float32, with gradient.

    Attributes:
        mu: (N,) reward of each token, read after it, reward units.
        sequence: (N,) int64 in [0, n), the sequence of each token, tokens of one sequence in a row.
        before: (n,) what the reward head says of the state before the first token: the score of an empty response.
        sigma: (N,) standard deviation that the member states of it, None without q.
        before_sigma: (n,) that of `before`, None without q.
        q: (N,) value of choosing the token, read before it, nats (raw with a Q head), None without q.
        log_likelihood: (N,) log-probability of the token under the softmax of its q, nats, None without q; q itself
            unless there is a Q head.
        attention: (N,) weight of each token for the last one of its sequence, in the last layer, mean over heads; None
            when it was not asked for.
    """

    mu: torch.Tensor
    sequence: torch.Tensor
    before: torch.Tensor
    sigma: torch.Tensor | None = None
    before_sigma: torch.Tensor | None = None
    q: torch.Tensor | None = None
    log_likelihood: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Chosen and rejected responses, n."""
        return len(self.before)


_PRIOR_START = 0.1


class TokenHeads(nn.Module):
    """The float32 heads of one member: mu and, with q, rho of sigma; and a Q head where the form has one.

    Args:
        width: D.
        vocab_size: V.
        form: what the member says.
        seed: of the weights, N(0, std); the global generator is left as it was.
        std: of the weights. With q, mu and rho start at a tenth of it: near the prior for all tokens, mu at 0 and sigma
            at log 2. Larger by chance, they would make the first steps those of the KL and the TD term alone.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        form: TokenForm,
        *,
        seed: int = 0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.reward = nn.utils.skip_init(nn.Linear, width, 1 if form.q_from is None else 2)  # type: ignore[no-untyped-call]
        self.q: nn.Linear | None = None
        if form.q_from == "q_head":
            self.q = nn.utils.skip_init(nn.Linear, width, vocab_size, bias=False)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for head in (self.reward, self.q):
                if head is not None:
                    head.weight.normal_(0, std, generator=generator)
            self.reward.bias.zero_()
            if form.q_from is not None:
                self.reward.weight *= _PRIOR_START

    def save(self, directory: Path) -> None:
        """Write `HEADS_FILE`."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, directory / HEADS_FILE)

    def load(self, directory: Path) -> TokenHeads:
        """Take the weights that `save` wrote; returns itself.

        Raises:
            ModelError: no such file, or heads of another model or form.
        """
        try:
            self.load_state_dict(load_file(directory / HEADS_FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the heads in {directory}, fit the reward model again: {error}") from error
        return self


class TokenRewardForward(PolicyForward):
    """Members on one causal language model; `read` gives what the active one says of each response token.

    Called, it scores pairs by the active member's policy, as `PolicyForward` does.

    Args:
        model: peft model around a causal language model, one adapter per member.
        heads: of each member, by its name.
        form: what members say.
        autocast_dtype: runs the trunk in mixed precision, None in the dtype of the weights. Heads are float32.

    Attributes:
        active: name of the member that answers.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: dict[str, TokenHeads],
        *,
        form: TokenForm,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, autocast_dtype=autocast_dtype)
        self.heads = nn.ModuleDict(heads).float()
        self.form = form
        self.active = next(iter(heads))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def activate(self, member: str) -> None:
        """Let this adapter and its heads answer from now on; in training mode, of all adapters it requires gradients.

        Args:
            member: name of an adapter.
        """
        model: Any = self.model
        model.set_adapter(member, inference_mode=not model.training)
        self.active = member

    def read(self, batch: PackedBatch, *, with_attention: bool = False) -> TokenOutputs:
        """What the active member says of every response token of B pairs.

        Args:
            batch: on the device of the model.
            with_attention: also the weights of the last layer; needs a model with eager attention.

        Raises:
            ModelError: attention that this model does not give.
        """
        first_n, read_at_N = reward_positions(batch)
        with self._autocast():
            with self._last_attention(with_attention) as weights:
                hidden_SD = self._decode(batch)
            q_N, likelihood_N = self._values(hidden_SD.index_select(0, batch.score_from), batch.score_labels)
        # outside of autocast: bfloat16 outputs would have three digits, too few to tell good answers apart
        heads: Any = self.heads[self.active]
        said = heads.reward(hidden_SD.index_select(0, read_at_N).float())
        before = heads.reward(hidden_SD.index_select(0, batch.score_from[first_n]).float())
        return TokenOutputs(
            mu=said[:, 0],
            sigma=self._sigma(said),
            q=q_N,
            log_likelihood=likelihood_N,
            sequence=batch.score_sequence,
            before=before[:, 0],
            before_sigma=self._sigma(before),
            attention=_attended(weights, batch, read_at_N) if with_attention else None,
        )

    def _sigma(self, said_k2: torch.Tensor) -> torch.Tensor | None:
        return None if self.form.q_from is None else F.softplus(said_k2[:, 1]) + self.form.sigma_floor

    def _values(
        self, hidden_ND: torch.Tensor, labels_N: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Values q and log-likelihood of the tokens that these states predict."""
        if self.form.q_from is None:
            return None, None
        if self.form.q_from == "q_head":
            with torch.autocast(hidden_ND.device.type, enabled=False):
                heads: Any = self.heads[self.active]
                values_NV = heads.q(hidden_ND.float())
                likelihood_N = -F.cross_entropy(self.form.logit_scale * values_NV, labels_N, reduction="none")
                return values_NV.gather(1, labels_N[:, None])[:, 0], likelihood_N
        q_N = self._policy_q(hidden_ND, labels_N)
        return q_N, q_N

    def _policy_q(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """From the policy: log-probabilities of its scaled logits or, as printed, of its scaled probabilities."""
        head = self.causal_lm.get_output_embeddings()
        assert self.form.q_from in ("logits", "probs")
        return token_q(
            hidden_ND,
            head.weight,
            labels_N,
            q_from=self.form.q_from,
            logit_scale=self.form.logit_scale,
            chunk_tokens=self.chunk_tokens,
            bias=getattr(head, "bias", None),
            logit_softcap=getattr(self.causal_lm.config, "final_logit_softcapping", None),
        )

    @contextmanager
    def _last_attention(self, is_wanted: bool) -> Iterator[list[torch.Tensor]]:
        """Collect the attention weights (rows, heads, S, S) that the last layer returns while the decoder runs."""
        found: list[torch.Tensor] = []

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
                found.append(output[1].detach())

        modules = self.decoder_layers()[-1].children() if is_wanted else ()
        handles = [module.register_forward_hook(hook) for module in modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def reward_positions(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rewards are read.

    A token predicts from its own position, so that the position of token t is where token t + 1 is predicted from; the
    last one is where its sequence ends.

    Returns:
        Index of each sequence's first token among the N tokens, (n,), and the flat position of every token itself,
        (N,); both int64.
    """
    lengths_n = torch.bincount(batch.score_sequence, minlength=2 * batch.num_pairs)
    last_n = lengths_n.cumsum(0) - 1
    read_at_N = batch.score_from.roll(-1)
    read_at_N[last_n] = batch.end_positions
    return last_n + 1 - lengths_n, read_at_N


def _attended(weights: Sequence[torch.Tensor], batch: PackedBatch, read_at_N: torch.Tensor) -> torch.Tensor:
    """Weight of each token for the last one of its sequence, mean over heads. Shape (N,), float32."""
    rows, length = batch.input_ids.shape
    if (
        len(weights) != 1
        or weights[0].dim() != 4
        or weights[0].shape[0] != rows
        or weights[0].shape[2:] != (length, length)
    ):
        raise ModelError(
            f"token_reward.credit=attention needs the weights of the last layer, which returned "
            f"{[tuple(found.shape) for found in weights]}; use an architecture with eager attention, or "
            "token_reward.credit=own or differences"
        )
    mean_RSS = weights[0].float().mean(1)
    query_N = batch.end_positions[batch.score_sequence]
    attended: torch.Tensor = mean_RSS[query_N // length, query_N % length, read_at_N % length]
    return attended
