"""segment_dots against its reference, and take_rows."""

import pytest
import torch

from bigbag import ops
from bigbag.bags import Segments

SEGMENTS = Segments.from_sizes((3, 0, 4100, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vectors", [1, 3])
def test_segment_dots(dtype, vectors):
    x = torch.randn(SEGMENTS.num_instances, 9).to(dtype).requires_grad_()
    y = torch.randn(4, vectors, 9, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    results = []
    for impl in ("reference", "cpu"):
        s = ops.segment_dots(x, y, SEGMENTS, impl=impl)
        grads = torch.autograd.grad(s.square().sum(), (x, y))
        assert s.dtype == y.dtype and grads[0].dtype == dtype
        results.append((s, *grads))
    low = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=low, atol=low)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-3)


def test_segment_dots_gradient_and_errors():
    segments = Segments.from_sizes((2, 0, 3))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    inputs = (x.requires_grad_(), y.requires_grad_())
    torch.autograd.gradcheck(lambda x, y: ops.segment_dots(x, y, segments, impl="cpu"), inputs)
    with pytest.raises(ValueError, match="T = 5"):
        ops.segment_dots(x[:4], y, segments)
    with pytest.raises(ValueError, match=r"y \(B, S, P\)"):
        ops.segment_dots(x, y[:2], segments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vectors", [1, 8])
def test_autocast_does_not_round_the_sums(dtype, vectors):
    """Only the features are stored in few bits: sums of a thousand products stay in float32."""
    segments = Segments.from_sizes((2000, 1000))
    x, y, w = torch.randn(3000, 1024).to(dtype), torch.randn(2, vectors, 1024), torch.rand(3000, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        s, z = ops.segment_dots(x, y, segments), ops.segment_pool(w, x, segments)
    wide, wide_y = x.double(), y.double()
    expected = torch.cat([wide[:2000] @ wide_y[0].t(), wide[2000:] @ wide_y[1].t()])
    torch.testing.assert_close(s.double(), expected, atol=1e-4, rtol=1e-5)
    expected = torch.stack([w[:2000].double().t() @ wide[:2000], w[2000:].double().t() @ wide[2000:]])
    torch.testing.assert_close(z.double(), expected, atol=1e-3, rtol=1e-5)


def test_take_rows():
    x = torch.randn(4, 3, requires_grad=True)
    rows = ops.take_rows(x, torch.tensor([[2, -1], [0, 2]]))
    torch.testing.assert_close(rows, torch.stack([torch.stack([x[2], 0 * x[0]]), torch.stack([x[0], x[2]])]))
    rows.sum().backward()
    torch.testing.assert_close(x.grad.sum(1), torch.tensor([3.0, 0, 6, 0]))
    assert ops.take_rows(x[:0], torch.tensor([-1])).tolist() == [[0, 0, 0]]
