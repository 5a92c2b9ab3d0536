"""Attention by the fused CUDA kernels of others: ``torch.nn.attention.varlen`` and xformers.

Both take packs as they are, cut by cumulative sizes. Instances that are masked out are left out of the keys by copying
the rest (one wait for the device, since the number of keys of each bag is then known there only). A bag without keys
gets one of zeros, and its rows are set to 0 afterwards. Head dimensions are padded with zeros to a multiple of 8.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from bigbag.bags import Segments

IMPLS = ("varlen", "xformers")
_MAX_FLASH_DIM = 256
_ALIGN = 8


@cache
def unavailable(impl: str) -> str | None:
    """Why ``impl`` ("varlen", "xformers") is not there at all, or None if it is; nothing is imported."""
    if impl == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if impl == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'bigbag[cuda]')"
    return None


def why_not(impl: str, q: Tensor, v: Tensor, has_bias: bool, dropout: float) -> str | None:
    """Why ``impl`` can't take this call, or None if it can (its device and dtypes are the registry's to check)."""
    if has_bias:
        return "it takes no bias that is computed on the fly"
    if dropout:
        return "it has no dropout that other implementations can reproduce"
    if impl == "varlen" and max(q.shape[2], v.shape[2]) > _MAX_FLASH_DIM:
        return f"it takes head dimensions up to {_MAX_FLASH_DIM}, got {max(q.shape[2], v.shape[2])}"
    return None


def kept_keys(mask: Tensor) -> Tensor:
    """Rows of the keys that take part."""
    return torch.nonzero(mask).squeeze(1)


def compact(
    k: Tensor, v: Tensor, kv_segments: Segments, mask: Tensor | None
) -> tuple[Tensor, Tensor, Segments, Tensor | None]:
    """Keys and values that take part, at least one per bag; their cut; (B,) bool: the bag has keys (None: all have)."""
    if mask is None and all(kv_segments.sizes):
        return k, v, kv_segments, None
    bag = kv_segments.bag_of_instance
    keys = torch.arange(k.shape[0], device=k.device) if mask is None else kept_keys(mask)
    counts = torch.bincount(bag[keys], minlength=kv_segments.num_bags)
    has_keys = counts > 0
    # Row Tk is one of zeros, for bags without keys; sorting by bag is stable, so keys keep their order.
    without = torch.nonzero(~has_keys).squeeze(1)
    rows = torch.cat([keys, without.new_full(without.shape, k.shape[0])])
    rows = rows[torch.cat([bag[keys], without]).sort(stable=True).indices]
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 1)).index_select(0, rows) for t in (k, v))
    return k, v, Segments.from_sizes(counts.clamp_min(1).tolist(), k.device), has_keys


def run(
    impl: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """:func:`bigbag.ops.masked_attention` by ``impl``: (Tq, H, dv)."""
    width = v.shape[2]
    k, v, kv_segments, has_keys = compact(k, v, kv_segments, mask)
    if q.shape[0] == 0:
        return (k.sum() + v.sum()) * 0 + v.new_zeros(0, *v.shape[1:]) + q.sum() * 0
    dim = -(-max(q.shape[2], width) // _ALIGN) * _ALIGN
    q, k, v = (torch.nn.functional.pad(t, (0, dim - t.shape[2])).contiguous() for t in (q, k, v))
    attend = {"varlen": _varlen, "xformers": _xformers}[impl]
    out = attend(q, k, v, segments, kv_segments, scale)[..., :width]
    if has_keys is not None:
        out = torch.where(has_keys[segments.bag_of_instance][:, None, None], out, 0)
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cuts = (segments.offsets.int(), kv_segments.offsets.int(), max(segments.sizes), max(kv_segments.sizes))
    out = varlen_attn(q, k, v, *cuts, scale=scale)
    assert isinstance(out, Tensor)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, scale: float) -> Tensor:
    from xformers.ops import fmha

    sizes, kv_sizes = list(segments.sizes), list(kv_segments.sizes)
    cut = fmha.BlockDiagonalMask.from_seqlens(sizes, kv_sizes, device=q.device)
    return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=cut, scale=scale)[0]
