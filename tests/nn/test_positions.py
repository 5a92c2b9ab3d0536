"""Encodings of positions against torchmil's."""

import pytest
import torch

from bigbag.nn import SinusoidalPositionalEncodingND


@pytest.mark.parametrize("shape", [(2, 5, 10), (2, 3, 4, 7), (1, 2, 3, 4, 12)])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_equals_torchmil(shape, dtype):
    theirs = pytest.importorskip("torchmil.nn").SinusoidalPositionalEncodingND
    x = torch.zeros(shape)
    ours, other = (cls(len(shape) - 2, shape[-1], dtype) for cls in (SinusoidalPositionalEncodingND, theirs))
    ours.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), other(x))


def test_an_input_wider_than_the_encoding_gets_all_of_it():
    theirs, x = pytest.importorskip("torchmil.nn").SinusoidalPositionalEncodingND, torch.zeros(2, 3, 9)
    torch.testing.assert_close(SinusoidalPositionalEncodingND(1, 5)(x), theirs(1, 5)(x))


def test_formula_and_error():
    encoding = SinusoidalPositionalEncodingND(1, 4)(torch.zeros(1, 3, 4))
    expected = [[f(p * w) for w in (1.0, 0.01) for f in (torch.sin, torch.cos)] for p in torch.arange(3.0)]
    torch.testing.assert_close(encoding[0], torch.tensor(expected))
    with pytest.raises(RuntimeError, match="has to be 3d"):
        SinusoidalPositionalEncodingND(1, 4)(torch.zeros(3, 4))
