"""Padded batches and dense grids, with torchmil's names: for scripts that feed models by a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def pad_tensors(tensor_list: Sequence[Tensor], padding_value: float = 0) -> tuple[Tensor, Tensor]:
    """Stack tensors of different lengths.

    Args:
        tensor_list: B tensors ``(N_b, ...)``.
        padding_value: what fills the rest.

    Returns:
        ``(B, N, ...)`` with N the largest ``N_b``, and the mask ``(B, N)`` uint8, 1 where there is an instance.
    """
    sizes = torch.tensor([len(tensor) for tensor in tensor_list], device=tensor_list[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(tensor_list), batch_first=True, padding_value=padding_value)
    places = torch.arange(padded.shape[1], device=padded.device)
    return padded, (places < sizes[:, None]).to(torch.uint8)


def collate_fn(batch_list: Sequence[Mapping[str, Tensor]], sparse: bool = True) -> Any:
    """A batch from bags that are dicts of tensors with the same keys.

    Tensors with an axis over instances are padded, numbers stacked, sparse ``(N_b, N_b)`` matrices put into one sparse
    ``(B, N, N)``. ``mask (B, N)`` marks the instances, of ``X`` where there is one (torchmil takes the first
    padded entry, be it a label of shape (1,)).

    Args:
        batch_list: the bags.
        sparse: False makes sparse entries dense.

    Returns:
        A ``tensordict.TensorDict`` with the keys of the bags and "mask".

    Raises:
        ImportError: tensordict is not installed.
    """
    batch: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for key in batch_list[0].keys():  # noqa: SIM118  (a TensorDict iterates over rows)
        tensors = [bag[key] for bag in batch_list]
        if tensors[0].is_sparse:
            stacked = _stack_sparse(tensors)
            batch[key] = stacked if sparse else stacked.to_dense()
        elif tensors[0].dim() == 0:
            batch[key] = torch.stack(tensors)
        else:
            batch[key], masks[key] = pad_tensors(tensors)
    if masks and "mask" not in batch:
        batch["mask"] = masks.get("X", next(iter(masks.values())))
    return as_tensordict(batch)


def as_tensordict(tensors: Mapping[str, Tensor]) -> Any:
    """What torchmil's scripts get as a bag and as a batch: a ``tensordict.TensorDict``.

    Raises:
        ImportError: tensordict is not installed.
    """
    try:
        from tensordict import TensorDict
    except ImportError:
        raise ImportError("bags and batches are TensorDicts, as torchmil's are: install bigbag[torchmil]") from None
    return TensorDict(dict(tensors))


def seq_to_spatial(X: Tensor, coords: Tensor, mask: Tensor | None = None) -> Tensor:
    """Put instances on a dense grid: ``out[b, c_1, ..., c_n] = X[b, i]`` where ``c = coords[b, i]``, zero elsewhere.

    Args:
        X: ``(B, N, D)``.
        coords: ``(B, N, n)`` integers of 0 or more.
        mask: ``(B, N)``, zero for rows to leave out; None writes all rows, padding too, whose coordinates are zeros.

    Returns:
        ``(B, C_1, ..., C_n, D)``, each C the largest coordinate plus one.
    """
    bag = torch.arange(X.shape[0], device=X.device)[:, None].expand(coords.shape[:2])
    index = (bag, *coords.long().unbind(-1))
    grid = X.new_zeros(X.shape[0], *(coords.amax((0, 1)) + 1).tolist(), X.shape[-1])
    if mask is None:
        grid[index] = X
    else:
        kept = mask != 0
        grid[tuple(axis[kept] for axis in index)] = X[kept]
    return grid


def spatial_to_seq(X_esp: Tensor, coords: Tensor) -> Tensor:
    """Read instances off a dense grid, the inverse of :func:`seq_to_spatial`: ``out[b, i] = X_esp[b, coords[b, i]]``.

    Args:
        X_esp: ``(B, C_1, ..., C_n, D)``.
        coords: ``(B, N, n)`` integers.

    Returns:
        ``(B, N, D)``.
    """
    bag = torch.arange(X_esp.shape[0], device=X_esp.device)[:, None].expand(coords.shape[:2])
    return X_esp[(bag, *coords.long().unbind(-1))]


def _stack_sparse(matrices: Sequence[Tensor]) -> Tensor:
    """Sparse ``(N_b, M_b)`` matrices as one sparse ``(B, N, M)``."""
    parts = [matrix.coalesce() for matrix in matrices]
    bag = torch.repeat_interleave(torch.tensor([part.values().shape[0] for part in parts])).to(parts[0].device)
    indices = torch.cat([bag[None], torch.cat([part.indices() for part in parts], 1)])
    rows, columns = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    values = torch.cat([part.values() for part in parts])
    return torch.sparse_coo_tensor(indices, values, (len(parts), rows, columns), check_invariants=False).coalesce()
