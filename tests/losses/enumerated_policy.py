"""A tabular policy over three tokens and at most three steps, all of whose responses can be written down.

Token 0 ends a response; the third token is cut by the length limit whatever it is. That makes 15 responses of 1 to 3
tokens over 7 states (prefixes), so expectations are sums, and expected gradients are exact.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from raylign.losses.logprobs import segment_sum

VOCABULARY, MAX_LENGTH = 3, 3


@dataclass(frozen=True)
class Responses:
    """Every response once, tokens flat: state (N,), token (N,), sequence (N,), num (M)."""

    state: torch.Tensor
    token: torch.Tensor
    sequence: torch.Tensor
    num: int

    def token_logps(self, logits: torch.Tensor) -> torch.Tensor:
        """(N,) from logits (states, vocabulary)."""
        return torch.log_softmax(logits, dim=1)[self.state, self.token]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(M,), adding up to 1."""
        return segment_sum(self.token_logps(logits), self.sequence, self.num).exp()

    def kl(self, logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
        """Exact divergence of the two distributions over responses, ()."""
        p, q = self.probabilities(logits), self.probabilities(reference_logits)
        return (p * (p.log() - q.log())).sum()


def every_response(max_length: int = MAX_LENGTH) -> Responses:
    states: dict[tuple[int, ...], int] = {}
    rows = []
    responses = [
        tokens
        for length in range(1, max_length + 1)
        for tokens in itertools.product(range(VOCABULARY), repeat=length)
        if 0 not in tokens[:-1] and (tokens[-1] == 0 or length == max_length)
    ]
    for index, tokens in enumerate(responses):
        for t, token in enumerate(tokens):
            rows.append((states.setdefault(tokens[:t], len(states)), token, index))
    state, token, sequence = torch.tensor(rows).T
    return Responses(state, token, sequence, len(responses))


def every_group(responses: Responses, num_samples: int) -> tuple[Responses, torch.Tensor]:
    """All ordered groups of so many responses, one after another, and the number of each of their responses (M,)."""
    drawn = torch.tensor(list(itertools.product(range(responses.num), repeat=num_samples))).reshape(-1)
    tokens_of = [torch.nonzero(responses.sequence == index)[:, 0] for index in range(responses.num)]
    row = torch.cat([tokens_of[index] for index in drawn.tolist()])
    sequence = torch.arange(len(drawn)).repeat_interleave(torch.bincount(responses.sequence)[drawn])
    return Responses(responses.state[row], responses.token[row], sequence, len(drawn)), drawn


def random_logits(seed: int, *, scale: float = 1.0) -> torch.Tensor:
    """(7, 3) float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, VOCABULARY, generator=generator, dtype=torch.float64)


def random_scores(seed: int, num: int) -> torch.Tensor:
    """(num,) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, generator=generator, dtype=torch.float64)
