"""Token log-probabilities against log_softmax of the full logits, on both ways of computing them."""

from __future__ import annotations

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses import logprobs
from raylign.losses.logprobs import segment_sum, token_logprobs

N, D, V = 13, 5, 11


@pytest.fixture(params=["direct", "chunked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, chosen by the number of logits."""
    monkeypatch.setattr(logprobs, "_DIRECT_ELEMENTS", 2**62 if request.param == "direct" else 0)
    return str(request.param)


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_log_softmax(path: str, softcap: float | None, with_bias: bool) -> None:
    hidden, weight, bias, labels = make_inputs()
    logits = hidden @ weight.T + (bias if with_bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()[torch.arange(N), labels]

    actual = token_logprobs(
        hidden, weight, labels, chunk_tokens=4, bias=bias if with_bias else None, logit_softcap=softcap
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(path: str, softcap: float | None, frozen: str) -> None:
    hidden, weight, bias, labels = make_inputs()
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    bias.requires_grad_(frozen != "weight")

    def function(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return token_logprobs(h, w, labels, chunk_tokens=4, bias=b, logit_softcap=softcap)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("chunk_tokens", [1, 3, N, 1000])
def test_chunk_size_changes_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    upstream = torch.linspace(-2, 2, N)
    results = []
    for limit in (2**62, 0):
        monkeypatch.setattr(logprobs, "_DIRECT_ELEMENTS", limit)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = token_logprobs(h, w, labels, chunk_tokens=chunk_tokens)
        (values * upstream).sum().backward()
        results.append((values.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_one_token_does_not_touch_another(path: str) -> None:
    hidden, weight, _, labels = make_inputs()
    everything = token_logprobs(hidden, weight, labels, chunk_tokens=4)
    kept = torch.tensor([12, 3, 7])

    torch.testing.assert_close(token_logprobs(hidden[kept], weight, labels[kept], chunk_tokens=4), everything[kept])


def test_extreme_logits_stay_finite(path: str) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    hidden = (1e4 * hidden).requires_grad_()
    values = token_logprobs(hidden, weight, labels, chunk_tokens=4)
    values.sum().backward()

    assert hidden.grad is not None
    assert torch.isfinite(values).all() and torch.isfinite(hidden.grad).all()


def test_no_token_is_no_log_probability(path: str) -> None:
    hidden, weight, _, labels = make_inputs()
    hidden.requires_grad_()
    values = token_logprobs(hidden[:0], weight, labels[:0])
    values.sum().backward()

    assert values.shape == (0,)
    assert hidden.grad is not None and not hidden.grad.any()


def test_bfloat16_inputs_are_summed_in_float32(path: str) -> None:
    hidden, weight, _, labels = make_inputs(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    values = token_logprobs(hidden, weight, labels, chunk_tokens=4)
    values.sum().backward()
    exact = token_logprobs(hidden.detach().double(), weight.detach().double(), labels)

    assert values.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=0.05)


def test_autocast_rounds_alike_in_both_passes(path: str) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    low_hidden, low_weight = (x.bfloat16().float().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        token_logprobs(low_hidden, low_weight, labels, chunk_tokens=4).sum().backward()
    plain_hidden, plain_weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    token_logprobs(plain_hidden, plain_weight, labels, chunk_tokens=4).sum().backward()

    torch.testing.assert_close(low_hidden.grad, plain_hidden.grad, check_dtype=False, rtol=0, atol=0)
    torch.testing.assert_close(low_weight.grad, plain_weight.grad, check_dtype=False, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("hidden", "labels", "chunk_tokens"), [((3, 4), (3,), 8), ((3, 5), (2,), 8), ((3, 5), (3,), 0)]
)
def test_misfits_are_refused(hidden: tuple[int, int], labels: tuple[int], chunk_tokens: int) -> None:
    with pytest.raises(ShapeError):
        token_logprobs(
            torch.zeros(hidden), torch.zeros(V, D), torch.zeros(labels, dtype=torch.int64), chunk_tokens=chunk_tokens
        )


def test_segment_sum_adds_up_each_segment() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([2, 0, 2, 0])

    assert segment_sum(values, segments, 4).tolist() == [10.0, 0.0, 5.0, 0.0]
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, segments, 4), (values,))
    with pytest.raises(ShapeError):
        segment_sum(values, segments[:2], 4)
