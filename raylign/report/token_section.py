"""The part of the HTML report that shows responses with every token coloured by its reward.

Two channels: the background is the mean, from orange (low) over white to blue (high), which stay apart under colour
blindness; the line below a token is the thicker the less sure its reward is. Both in a few steps with a legend; the
numbers are in the tooltip of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_TOKENS = 200  # of a response that are shown
_STEPS = 4  # of colour on either side of 0
_LINES = 3  # thicknesses of the line above none
_LIMIT_QUANTILE = 0.95  # of |mean|, at which the colour is full: one outlier must not bleach all other tokens
_BLUE = ("#e3f0f8", "#bcdcef", "#8cc3e3", "#56a5d4")
_ORANGE = ("#fdeedd", "#fbd6ae", "#f6b776", "#ee9440")

TOKEN_STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .87rem/2 ui-monospace, monospace; margin: 0; }
.tokens span, .legend span { padding: .1rem 0; border-bottom: 0 solid #1c2330; color: #1c2330; font-weight: 400; }
.tokens span { margin-right: 1px; border-radius: 2px; }
.legend { font-size: .87rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; }
.legend span { padding: .1rem .5rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
""" + "".join(
    [f".p{step} {{ background: {colour}; }}\n" for step, colour in enumerate(_BLUE, start=1)]
    + [f".n{step} {{ background: {colour}; }}\n" for step, colour in enumerate(_ORANGE, start=1)]
    # more specific than `.tokens span`, which has none
    + [f".tokens .u{line}, .legend .u{line} {{ border-bottom-width: {line}px; }}\n" for line in range(1, _LINES + 1)]
)

_NOTE = (
    "The reward of a token is read after it, in the units of the reward model: blue is a high reward, no verdict of "
    "safety. Special tokens are shown as they are named. Pairs are of the test split, the first by a hash of their "
    "prompts, not chosen by their result."
)
_SIGMA_NOTE = (
    "sigma is what the model states of each token by itself, and what its members disagree about: no posterior over "
    "reward functions, and not how sure the order of two responses is."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExample:
    """One response as a reward of tokens sees it.

    Attributes:
        prompt: last user turn.
        label: what the response is, such as "chosen".
        tokens: text of each of T tokens, as it was read.
        means: T rewards, reward units.
        sigmas: T standard deviations, None where the reward model states no uncertainty.
    """

    prompt: str
    label: str
    tokens: tuple[str, ...]
    means: tuple[float, ...]
    sigmas: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class _Scale:
    """Steps of colour and line for one section: colours up to +-`limit`, lines between `low` and `high` sigma."""

    limit: float
    low: float
    high: float

    def step(self, mean: float) -> int:
        """From -_STEPS to _STEPS, 0 around 0."""
        share = min(abs(mean) / self.limit, 1.0) if self.limit else 0.0
        return int(np.copysign(round(share * _STEPS), mean))

    def line(self, sigma: float) -> int:
        """From 0 to _LINES."""
        share = (sigma - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return round(min(max(share, 0.0), 1.0) * _LINES)


def token_section(examples: Sequence[TokenExample]) -> str:
    """A legend, then prompts with their responses beside each other.

    Args:
        examples: responses to one prompt in a row; at least one.
    """
    scale = _scale(examples)
    has_sigma = any(example.sigmas is not None for example in examples)
    parts = [
        "<p class='warning'>Content warning: stored answers to harmful prompts may be offensive. They are collapsed."
        "</p>",
        _legend(scale, has_sigma=has_sigma),
        f"<p class='note'>{_NOTE}{' ' + _SIGMA_NOTE if has_sigma else ''}</p>",
    ]
    start = 0
    while start < len(examples):
        end = start + 1
        while end < len(examples) and examples[end].prompt == examples[start].prompt:
            end += 1
        responses = "".join(_response(example, scale) for example in examples[start:end])
        parts.append(
            f"<details><summary>{escape(examples[start].prompt)}</summary><div class='pair'>{responses}</div></details>"
        )
        start = end
    return "".join(parts)


def _scale(examples: Sequence[TokenExample]) -> _Scale:
    sizes = np.abs([mean for example in examples for mean in example.means])
    sigmas = np.array([sigma for example in examples for sigma in example.sigmas or ()])
    limit = float(np.quantile(sizes, _LIMIT_QUANTILE)) if sizes.size else 0.0
    low, high = np.quantile(sigmas, (1 - _LIMIT_QUANTILE, _LIMIT_QUANTILE)) if sigmas.size else (0.0, 0.0)
    return _Scale(limit=limit, low=float(low), high=float(high))


def _legend(scale: _Scale, *, has_sigma: bool) -> str:
    shown = {step: f"{scale.limit * step / _STEPS:+.2g}" for step in range(-_STEPS, _STEPS + 1)} | {0: "0"}
    shown |= {-_STEPS: f"\u2264 {shown[-_STEPS]}", _STEPS: f"\u2265 {shown[_STEPS]}"}
    marks = [f"<span class='{_colour(step)}'>{text}</span>" for step, text in shown.items()]
    parts = [f"<div>mean reward of a token {''.join(marks)}</div>"]
    if has_sigma:
        width = (scale.high - scale.low) / _LINES
        lines = [f"<span class='u{line}'>{scale.low + line * width:.2g}</span>" for line in range(_LINES + 1)]
        parts.append(f"<div>sigma {' '.join(lines)}</div>")
    return f"<div class='legend'>{''.join(parts)}</div>"


def _response(example: TokenExample, scale: _Scale) -> str:
    num_shown = min(len(example.tokens), MAX_TOKENS)
    spans = []
    for index in range(num_shown):
        mean = example.means[index]
        css, title = _colour(scale.step(mean)), f"{mean:+.3f}"
        if example.sigmas is not None:
            sigma = example.sigmas[index]
            css, title = f"{css} u{scale.line(sigma)}", f"{title}, sigma {sigma:.3f}"
        spans.append(f"<span class='{css}' title='{title}'>{_visible(example.tokens[index])}</span>")
    means = np.array(example.means)
    facts = [f"sum {means.sum():+.2f}", f"mean {means.mean():+.2f}", f"last {means[-1]:+.2f}"]
    facts.append(f"{len(means)} tokens" + (f", {num_shown} shown" if num_shown < len(means) else ""))
    return (
        f"<div><h4>{escape(example.label)}</h4><p class='tokens'>{''.join(spans)}</p>"
        f"<p class='meta'>{'; '.join(facts)}</p></div>"
    )


def _colour(step: int) -> str:
    return "z" if step == 0 else f"{'p' if step > 0 else 'n'}{abs(step)}"


def _visible(token: str) -> str:
    """The token with its line breaks to be seen, escaped; a token without text is a dot."""
    return escape(token).replace("\n", "\u21b5\n") or "\u00b7"
