"""bigbag: deep multiple-instance learning on whole bags."""

from bigbag import torchmil_files
from bigbag.bags import Adjacency, Bag, PackedBags, Segments

__version__ = "0.1.0"

torchmil_files.register()

__all__ = ["Adjacency", "Bag", "PackedBags", "Segments", "load_model"]


def load_model(path: str):  # type: ignore[no-untyped-def]
    """Load a trained model from a run folder or a checkpoint folder; see :func:`bigbag.models.load_model`."""
    from bigbag.models import load_model as load

    return load(path)
