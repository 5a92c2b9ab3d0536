"""Tokens-to-token layers, against torchmil."""

import pytest
import torch

from bigbag import nn
from bigbag.bags import Segments


@pytest.mark.parametrize("arguments", [
    {"out_dim": 5},
    {"out_dim": None, "kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    {"out_dim": 3, "kernel_size": (3, 5), "padding": (1, 4), "dilation": (1, 2), "use_mlp": False},
])  # fmt: skip
def test_tokens_to_token_equals_torchmil(arguments):
    arguments = {"in_dim": 6, "att_dim": 8, "n_heads": 2} | arguments
    theirs = pytest.importorskip("torchmil.nn").T2TLayer(**arguments).eval()
    ours = nn.T2TLayer(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 36, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    pack = torch.cat([x[0], x[1, :16]])
    y, segments = ours.forward_packed(pack, Segments.from_sizes((36, 16)))
    expected = torch.cat([theirs(x[:1])[0], theirs(x[1:, :16])[0]])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert sum(segments.sizes) == len(expected)
    with pytest.raises(ValueError, match="square number"):
        ours(x[:, :35])
