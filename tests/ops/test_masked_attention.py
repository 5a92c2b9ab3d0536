"""masked_attention, class_token_attention, mean_attention: against definitions and others. The proof: test_proof.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigbag import Segments
from bigbag.kernels.cpu import bfloat_tiles
from bigbag.kernels.cpu import masked_attention as cpu_kernel
from bigbag.memory import peak_bytes
from bigbag.ops import fused_attention
from bigbag.ops.attention_bias import DistanceBias, RelativePositionBias, buckets, num_buckets, thresholds
from bigbag.ops.class_attention import class_token_attention, mean_attention
from bigbag.ops.dropout import drop_below, keep
from bigbag.ops.masked_attention import masked_attention
from bigbag.ops.registry import HALF, use_impl
from bigbag.samples.masked_attention import SAMPLES
from bigbag.testing import check

NAMED = {str(sample): sample for sample in SAMPLES}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_is_softmax_attention_and_packed_equals_each_bag_alone(any_impl: str, device: str) -> None:
    sizes = (5, 1, 130, 17)
    q, k, v = (randn(sum(sizes), 2, 12, seed=i).to(device) for i in range(3))
    mask = torch.arange(sum(sizes), device=device) % 2 == 0
    out = masked_attention(q, k, v, Segments.from_sizes(sizes, device), mask=mask, impl=any_impl)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        kept = mask[rows]
        alone = masked_attention(
            q[rows], k[rows], v[rows], Segments.from_sizes((size,), device), mask=kept, impl=any_impl
        )
        torch.testing.assert_close(out[rows], alone, rtol=2e-6, atol=2e-6)
        if kept.any():
            pairs = (t[rows].transpose(0, 1) for t in (q, k, v))
            torch_out = torch.nn.functional.scaled_dot_product_attention(*pairs, attn_mask=kept.expand(size, size))
            torch.testing.assert_close(alone, torch_out.transpose(0, 1), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(alone, torch.zeros_like(alone))
        start += size


def test_rows_without_keys_are_zero_forward_and_backward(any_impl: str, device: str) -> None:
    q, k, v = (randn(20, 2, 4, seed=i).to(device).requires_grad_() for i in range(3))
    mask = torch.ones(20, dtype=torch.bool, device=device)
    mask[:8] = False
    for options in ({}, {"dropout": 0.5}):
        out = masked_attention(q, k, v, Segments.from_sizes((8, 12), device), mask=mask, impl=any_impl, **options)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert torch.equal(out[:8], torch.zeros_like(out[:8])) and out[8:].ne(0).any()
        for grad in grads:
            assert torch.equal(grad[:8], torch.zeros_like(grad[:8])) and grad[8:].isfinite().all()


def test_scores_at_1e4(impl: str, device: str) -> None:
    """The output keeps its digits; the gradients lose those that exp(S - logsumexp) loses."""
    leaves = [(randn(70, 2, 8, seed=i) * (1e4 if i == 0 else 1)).to(device).requires_grad_() for i in range(3)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    weight = randn(70, 2, 8, seed=3).to(device)
    out = masked_attention(*leaves, Segments.from_sizes((40, 30), device), impl=impl)
    truth = masked_attention(*exact, Segments.from_sizes((40, 30)), impl="reference")
    torch.testing.assert_close(out.double().cpu(), truth, rtol=1e-6, atol=1e-6)
    largest = float((leaves[0].norm(dim=2).amax() * leaves[1].norm(dim=2).amax() / 8**0.5).detach())
    assert largest > 1e4
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    for grad, wanted in zip(grads, torch.autograd.grad((truth * weight.cpu()).sum(), exact)):
        assert grad.isfinite().all()
        if wanted.abs().max() > 1:  # of q and k the gradient is next to nothing: the softmax has made its choice
            loss = 2 * torch.finfo(torch.float32).eps * largest
            torch.testing.assert_close(grad.double().cpu(), wanted, rtol=loss, atol=loss * float(wanted.abs().max()))


def test_several_blocks_of_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "BLOCK_ROWS", 16)
    monkeypatch.setattr(cpu_kernel, "BLOCK_KEYS", 24)
    for name in ("dropout, masked", "distance, cross", "bias cross", "contextual product"):
        check(NAMED[f"masked_attention, {name}"], "cpu", torch.float32)


needs_tiles = pytest.mark.skipif(not bfloat_tiles.AVAILABLE, reason="this processor has no AVX-512 BF16, or has AMX")


@needs_tiles
@pytest.mark.parametrize("name", ["several", "empty bags", "masked", "values narrower", "cross", "scale"])
def test_fused_bfloat16_within_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "SMALL", 0)
    check(NAMED[f"masked_attention, {name}"], "cpu", torch.bfloat16)


@pytest.mark.parametrize(("keys", "masked", "scale"), [(None, False, None), (1300, True, -0.4), (70, False, 40.0)])
def test_fused_bfloat16_of_several_blocks(
    keys: int | None, masked: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1.2 times the error of PyTorch's kernel, up to softmaxes next to one-hot; the same bits every time."""
    rows = (1537, 3, 1100)
    cut = None if keys is None else Segments.from_sizes((keys, 0, 5))
    total = sum(rows) if cut is None else cut.num_instances
    shapes = ((sum(rows), 24), (total, 24), (total, 20), (sum(rows), 20))
    *inputs, weight = (randn(n, 2, width, seed=i).bfloat16() for i, (n, width) in enumerate(shapes))
    mask = torch.arange(total) % 3 != 1 if masked else None

    def run(impl: str, dtype: torch.dtype, small: int = cpu_kernel.SMALL) -> list[Tensor]:
        monkeypatch.setattr(cpu_kernel, "SMALL", small)
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = masked_attention(*leaves, Segments.from_sizes(rows), cut, mask=mask, scale=scale, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]

    found, again, other = (run("cpu", torch.bfloat16, small) for small in (0, 0, sum(rows)))
    for value, same, theirs, truth in zip(found, again, other, run("reference", torch.float64)):
        assert torch.equal(value, same)
        error, allowed = ((t.double() - truth).norm() for t in (value, theirs))
        assert 0 < error <= 1.2 * allowed


@needs_tiles
def test_fused_bfloat16_keeps_what_is_not_a_number_to_its_rows() -> None:
    q, k, v = (randn(200, 2, 24, seed=i).bfloat16() for i in range(3))
    q[7, 1, 3], q[130, 0, 0] = torch.nan, torch.inf
    out = masked_attention(q, k, v, Segments.from_sizes((200,)), impl="cpu")
    wrong = out.isnan().any(2)
    assert wrong.nonzero().tolist() == [[7, 1], [130, 0]]


@pytest.mark.parametrize(
    ("features", "compiled_for", "expected"),
    [
        ({"avx512bf16": True}, None, True),
        ({"avx512bf16": True, "amx-bf16": False}, "+avx512f,+avx512bf16", True),
        ({"avx512bf16": True}, "+avx2", False),
        ({"avx512bf16": True, "amx-bf16": True}, None, False),
        ({"avx512f": True}, None, False),
    ],
)
def test_which_processors_multiply_bfloat16_in_tiles(
    features: dict[str, bool], compiled_for: str | None, expected: bool
) -> None:
    assert bfloat_tiles.suits(features, compiled_for) is expected


def test_bfloat16_where_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat_tiles, "AVAILABLE", False)
    check(NAMED["masked_attention, several"], "cpu", torch.bfloat16)


@pytest.mark.parametrize("case", ["distance", "bias", "contextual"])
def test_workers_of_the_cpu_kernel_share_the_queries(case: str) -> None:
    rows, heads, dim = 1200, 2, 4
    q, k, v = (randn(rows, heads, dim, seed=i) for i in range(3))
    coords = torch.cartesian_prod(torch.arange(30), torch.arange(40)).float()
    weights = {"distance": torch.ones(heads), "bias": randn(heads, 49), "contextual": randn(1, dim, 49)}[case]
    found = {}
    for impl, threads in (("reference", 1), ("cpu", 1), ("cpu", 2)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, weights)]
        bias = DistanceBias(coords, leaves[3]) if case == "distance" else RelativePositionBias(coords, leaves[3], case)
        torch.set_num_threads(threads)
        out = masked_attention(*leaves[:3], Segments.from_sizes((rows,)), bias=bias, dropout=0.1, impl=impl)
        found[impl, threads] = [out, *torch.autograd.grad((out * randn(*out.shape, seed=5)).sum(), leaves)]
    for threads in (1, 2):
        for value, wanted in zip(found["cpu", threads], found["reference", 1]):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["product", "euclidean", "quant"])
@pytest.mark.parametrize("ratio", [1.0, 1.9, 4.0])
def test_buckets_are_those_of_irpe(method: str, ratio: float) -> None:
    irpe = pytest.importorskip("torchmil.nn.irpe")
    side = 25
    index = {"product": irpe.METHOD.PRODUCT, "euclidean": irpe.METHOD.EUCLIDEAN, "quant": irpe.METHOD.QUANT}[method]
    expected, count, _ = irpe.get_bucket_ids_2d_without_skip(index, side, side, ratio, 2 * ratio, 8 * ratio)
    lattice = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    bias = RelativePositionBias(lattice * 224, randn(1, 1), "bias", method, ratio, 2 * ratio, 8 * ratio, 224)
    assert torch.equal(buckets(bias), expected) and num_buckets(method, 2 * ratio) == (count,)
    # What kernels do: count the thresholds.
    offset = (lattice[:, None] - lattice[None]).float()
    reach = torch.tensor(thresholds(bias))

    def count_reached(x: Tensor) -> Tensor:
        return (x.abs()[..., None] >= reach).sum(-1) * x.sign().long() + bias.steps

    if method == "product":
        found = count_reached(offset[..., 0]) * (2 * bias.steps + 1) + count_reached(offset[..., 1])
    else:
        found = count_reached(offset.square().sum(-1))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["product", "cross", "euclidean"])
@pytest.mark.parametrize("mode", ["bias", "contextual"])
def test_relative_position_bias_is_that_of_irpe(mode: str, method: str) -> None:
    """On a lattice with a class token in front, against the matrix that torchmil's iRPE makes."""
    irpe = pytest.importorskip("torchmil.nn.irpe")
    heads, dim, side = 2, 4, 5
    name = {"euclidean": "euc"}.get(method, method)
    config = irpe.get_rpe_config(method=name, mode=mode, shared_head=False, skip=1)
    module = irpe.build_rpe(config, dim, heads)[1]
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed)
    tables = list(module.parameters())
    table = torch.stack(tables, -2) if method == "cross" else tables[0]
    q, k, v = (randn(side**2 + 1, heads, dim, seed=10 + i) for i in range(3))
    scaled = (q / dim**0.5).transpose(0, 1)[None]
    scores = scaled @ k.permute(1, 2, 0) + module(scaled, height=side, width=side)
    expected = (scores.softmax(-1) @ v.transpose(0, 1))[0].transpose(0, 1)
    lattice = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    coords = torch.cat([torch.full((1, 2), float("nan")), lattice])
    bias = RelativePositionBias(coords, table, mode, method)
    for impl in ("reference", "cpu"):
        out = masked_attention(q, k, v, Segments.from_sizes((side**2 + 1,)), bias=bias, impl=impl)
        torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("sizes", [(33,), (0, 20, 13)])
def test_columns_that_are_strided_in_memory(which: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Of q, k, v and the gradient that comes in; the same as of contiguous ones."""
    segments, found = Segments.from_sizes(sizes), []
    for strided in ((), which):
        tensors = [randn(33, 2, 8, seed=i) for i in range(4)]
        tensors = [torch.stack([t, t], -1)[..., 0] if i in strided else t for i, t in enumerate(tensors)]
        leaves = [t.requires_grad_() for t in tensors[:3]]
        out = masked_attention(*leaves, segments, impl="cpu")
        found.append([out, *torch.autograd.grad(out, leaves, tensors[3])])
    for contiguous, other in zip(*found):
        torch.testing.assert_close(other, contiguous, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_right_share_independently() -> None:
    kept = keep(11, 3, torch.arange(400), torch.arange(500), 0.3).double()
    assert kept.shape == (3, 400, 500)
    deviation = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.mean() - 0.7) < 4 * deviation
    assert (kept.mean((0, 2)) - 0.7).abs().max() < 5 * (0.21 / 1500) ** 0.5
    for other in (
        keep(12, 3, torch.arange(400), torch.arange(500), 0.3),
        kept.roll(1, 0),
        kept.roll(1, 1),
        kept.roll(1, 2),
    ):
        both = ((kept - 0.7) * (other.double() - 0.7)).mean()
        assert abs(both) < 4 * 0.21 / kept.numel() ** 0.5
    assert drop_below(0.0) == 0 and drop_below(1.0) == 2**32 - 1


def test_dropout_is_right_on_average() -> None:
    q, k, v = (randn(40, 1, 4, seed=i) for i in range(3))
    segments = Segments.from_sizes((40,))
    mean = sum(masked_attention(q, k, v, segments, dropout=0.3, seed=i, impl="cpu") for i in range(400)) / 400
    torch.testing.assert_close(mean, masked_attention(q, k, v, segments), rtol=0, atol=0.12)


@pytest.mark.parametrize("case", ["plain", "masked", "bias", "dropout"])
def test_memory_is_linear(case: str) -> None:
    """Beyond inputs: a few (T, H, d) tensors and 16 MiB; one attention matrix of a head would take 64 MiB."""
    rows, heads, dim = 4096, 1, 8
    q, k, v = (randn(rows, heads, dim, seed=i).requires_grad_() for i in range(3))
    table = torch.zeros(heads, 49, requires_grad=True)
    coords = torch.cartesian_prod(torch.arange(64), torch.arange(64)).float()
    options = {
        "masked": {"mask": torch.arange(rows) % 2 == 0},
        "bias": {"bias": RelativePositionBias(coords, table)},
        "dropout": {"dropout": 0.1},
    }.get(case, {})

    def step() -> None:
        masked_attention(q, k, v, Segments.from_sizes((rows,)), **options, impl="cpu").sum().backward()

    assert 2 * rows * dim * 4 < peak_bytes(step) < 16 * rows * heads * dim * 4 + (16 << 20)


@pytest.mark.parametrize("impl", ["varlen", "xformers"])
def test_keys_are_compacted_for_fused_kernels(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the foreign call itself, on the CPU: that call is replaced by the reference on what it is given."""

    def foreign(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, scale: float) -> Tensor:
        assert all(kv_segments.sizes) and q.shape[2] == v.shape[2] == 16
        return masked_attention(q, k, v, segments, kv_segments, scale=scale, impl="reference")

    monkeypatch.setattr(fused_attention, f"_{impl}", foreign)
    segments, keys = Segments.from_sizes((5, 1, 0, 17)), Segments.from_sizes((4, 0, 3, 20))
    q, k, v = randn(23, 2, 12), randn(27, 2, 12, seed=1), randn(27, 2, 9, seed=2)
    masks = (None, torch.arange(27) % 3 == 0, torch.arange(27) > 6)
    for mask in masks:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        found = fused_attention.run(impl, *leaves, segments, keys, mask, 0.3)
        expected = masked_attention(*leaves, segments, keys, mask=mask, scale=0.3, impl="reference")
        torch.testing.assert_close(found, expected)
        weight = randn(*found.shape, seed=3)
        both = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected)]
        for one, other in zip(*both):
            torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("impl", ["varlen", "xformers"])
@pytest.mark.parametrize("name", ["several", "empty bags", "masked", "values narrower", "cross", "scale"])
def test_fused_kernels_within_budget(name: str, impl: str) -> None:
    if (reason := fused_attention.unavailable(impl)) is not None:
        pytest.skip(reason)
    for dtype in HALF if impl == "varlen" else (*HALF, torch.float32):
        check(NAMED[f"masked_attention, {name}"], impl, dtype, "cuda")


def test_requests_that_cannot_run_say_why() -> None:
    q = randn(4, 1, 4)
    segments = Segments.from_sizes((4,))
    for impl in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=f"'{impl}' can't run: it needs a CUDA device"):
            masked_attention(q, q, q, segments, impl=impl)
        with pytest.raises(ValueError, match="needs a CUDA device"), use_impl({"masked_attention": impl}):
            masked_attention(q, q, q, segments)
    with pytest.raises(ValueError, match="no such implementation"):
        masked_attention(q, q, q, segments, impl="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": randn(6, 2, 5)}, "expected q"),
        ({"v": randn(6, 2, 4).double()}, "share a floating dtype"),
        ({"segments": Segments.from_sizes((5,))}, "q has 6 rows"),
        ({"kv_segments": Segments.from_sizes((3, 3))}, "kv_segments 2"),
        ({"mask": torch.ones(6)}, "mask must be bool"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"bias": DistanceBias(randn(6, 3), randn(2))}, "bias.coords has shape"),
        ({"bias": DistanceBias(randn(6, 2), randn(3))}, "bias.slopes has shape"),
        ({"bias": RelativePositionBias(randn(6, 2), randn(2, 48))}, "bias.table has shape"),
        ({"bias": RelativePositionBias(randn(6, 2), randn(2, 49), "other")}, "mode 'other'"),
        ({"bias": RelativePositionBias(randn(6, 2), randn(2, 49), beta=0.5)}, "alpha < beta"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    fitting = {"q": randn(6, 2, 4), "k": randn(6, 2, 4), "v": randn(6, 2, 4), "segments": Segments.from_sizes((6,))}
    with pytest.raises(ValueError, match=message):
        masked_attention(**(fitting | change))


@pytest.mark.parametrize("sizes", [(5,), (5, 3)])
def test_no_heads(sizes: tuple[int, ...]) -> None:
    """PyTorch's attention divides by their number, which ends the process."""
    q = torch.zeros(sum(sizes), 0, 4, requires_grad=True)
    out = masked_attention(q, q, q, Segments.from_sizes(sizes))
    assert out.shape == q.shape
    out.sum().backward()


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = (randn(9, 2, 4, seed=i) for i in range(3))
    segments = Segments.from_sizes((9,))
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k, v, segments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, masked_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), segments))


def test_mean_attention_is_as_precise_under_autocast() -> None:
    q, k, segments = randn(9, 2, 4), randn(9, 2, 4, seed=1), Segments.from_sizes((6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_attention(q, k, segments)
    assert torch.equal(found, mean_attention(q, k, segments))


@pytest.mark.parametrize("masked", [False, True])
def test_class_token_attention_is_a_row_of_the_matrix(masked: bool) -> None:
    sizes = (7, 0, 530)
    q, k = randn(3, 2, 6), randn(537, 2, 6, seed=1)
    mask = torch.arange(537) % 3 != 0 if masked else None
    a = class_token_attention(q, k, Segments.from_sizes(sizes), mask=mask)
    for bag, rows in ((0, slice(0, 7)), (2, slice(7, 537))):
        scores = torch.einsum("hd,jhd->jh", q[bag], k[rows]) / 6**0.5
        if mask is not None:
            scores[~mask[rows]] = -float("inf")
        torch.testing.assert_close(a[rows], scores.softmax(0))
    none = class_token_attention(q, k, Segments.from_sizes(sizes), mask=torch.zeros(537, dtype=torch.bool))
    assert torch.equal(none, torch.zeros(537, 2))


@pytest.mark.parametrize("options", ["plain", "masked", "bias"])
def test_mean_attention_is_the_column_mean(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbag.ops import class_attention

    sizes, kv_sizes = (7, 3, 30, 2), (5, 0, 40, 4)
    q, k = randn(42, 2, 6), randn(49, 2, 6, seed=1)
    mask = (torch.arange(49) % 3 != 0) & (torch.arange(49) > 4) if options == "masked" else None
    bias = DistanceBias(randn(42, 2), torch.tensor([0.5, 2.0]), randn(49, 2, seed=2)) if options == "bias" else None
    cut = Segments.from_sizes(sizes), Segments.from_sizes(kv_sizes)
    # With the identity as values, attention gives its own matrix.
    values = torch.eye(49)[:, None].expand(49, 2, 49)
    matrix = masked_attention(q, k, values, *cut, mask=mask, bias=bias, impl="reference")
    total = torch.stack([rows.sum(0) / len(rows) for rows in matrix.split(sizes)]).sum(0).t()
    for block_bytes in (1, 64 << 20):
        monkeypatch.setattr(class_attention, "_BLOCK_BYTES", block_bytes)
        torch.testing.assert_close(mean_attention(q, k, *cut, mask=mask, bias=bias), total)
