"""Nystrom attention of one token per bag: the row of nystrom_attention, and its gradients."""

import pytest
import torch

from bigbag import Segments, ops

SIZES = (7, 1, 40)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("num_landmarks", [4, 16])
def test_row_of_a_token_is_that_of_all_rows(impl, num_landmarks):
    """Through a projection, with which landmarks commute."""
    torch.manual_seed(0)
    segments, first = Segments.from_sizes(SIZES), [0, 7, 8]
    x, weight = torch.randn(sum(SIZES), 6, dtype=torch.float64), torch.randn(6, 3, 2, 4, dtype=torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    options = {"num_landmarks": num_landmarks, "impl": impl}

    def all_rows():
        q, k, v = torch.einsum("ti,ichd->cthd", x, weight)
        return ops.nystrom_attention(q, k, v, segments, **options)[first]

    def token_rows():
        q = torch.einsum("bmi,ihd->bmhd", ops.landmark_means(x, segments, **options), weight[:, 0])
        tokens = torch.einsum("bi,ihd->bhd", x[first], weight[:, 0])
        k, v = torch.einsum("ti,ichd->cthd", x, weight[:, 1:])
        return ops.nystrom_token_attention(tokens, q, k, v, segments, **options)

    results = []
    for rows in (all_rows, token_rows):
        out = rows()
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, weight))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_landmarks_of_bags_that_have_none(impl):
    segments = Segments.from_sizes((0, 3))
    means = ops.landmark_means(torch.tensor([[1.0], [2.0], [6.0]]), segments, num_landmarks=2, impl=impl)
    torch.testing.assert_close(means, torch.tensor([[[0.0], [0.0]], [[1.0], [4.0]]]))


def test_shapes_are_checked():
    segments, k = Segments.from_sizes((3,)), torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"expected query_landmarks \(1, 3, 2, 4\)"):
        ops.nystrom_token_attention(k[:1], torch.randn(1, 2, 2, 4), k, k, segments)
    with pytest.raises(ValueError, match=r"expected x \(3, P\)"):
        ops.landmark_means(torch.randn(4, 2), segments)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_packs_without_bags(impl):
    segments, k = Segments.from_sizes(()), torch.zeros(0, 2, 4, requires_grad=True)
    assert ops.landmark_means(k.flatten(1), segments, impl=impl).shape == (0, 1, 8)
    out = ops.nystrom_token_attention(k, torch.zeros(0, 1, 2, 4), k, k, segments, impl=impl)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
