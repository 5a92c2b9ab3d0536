"""The smoothing family: SmABMIL against torchmil."""

import numpy as np
import pytest
import torch

from bigbag.graphs import build_adjacency
from bigbag.models import SmABMIL

WIDTH = 6


def adjacency(size: int, normalize: str = "symmetric") -> torch.Tensor:
    """(1, size, size) dense, of a lattice four wide joined to its 8 neighbours."""
    coords = np.stack(np.divmod(np.arange(size), 4), 1)
    return build_adjacency(coords, radius=1.5, normalize=normalize).to_coo().to_dense()[None]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("where", ["early", "mid", "late", "none"])
@pytest.mark.parametrize("mode", ["approx", "exact"])
def test_sm_abmil_equals_torchmil(mode, where, sparse):
    theirs_class = pytest.importorskip("torchmil.models").SmABMIL
    settings = {"in_shape": (WIDTH,), "att_dim": 4, "sm_mode": mode, "sm_where": where, "sm_alpha": 0.8}
    theirs, ours = theirs_class(**settings).eval(), SmABMIL(**settings).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in (1, 13):
        X, Y, dense = torch.randn(1, size, WIDTH), torch.ones(1), adjacency(size)
        adj = dense.to_sparse() if sparse else dense
        torch.testing.assert_close(ours.predict(X, adj), theirs.predict(X, dense), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(X, adj), theirs(X, dense), rtol=1e-4, atol=1e-5)
        expected, losses = (m.compute_loss(Y, X, dense)[1] for m in (theirs, ours))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_sm_abmil_needs_a_shape_and_a_graph():
    with pytest.raises(ValueError, match="needs in_shape"):
        SmABMIL(in_shape=None)
    with pytest.raises(ValueError, match="needs adj"):
        SmABMIL((WIDTH,))(torch.randn(1, 3, WIDTH))
