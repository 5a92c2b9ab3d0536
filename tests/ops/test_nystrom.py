"""nystrom_attention: torchmil, memory, the class token's row. The proof of the contract is in test_proof.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigbag import Segments
from bigbag.kernels.cpu import bfloat_tiles
from bigbag.memory import peak_bytes
from bigbag.ops import nystrom as nystrom_module
from bigbag.ops import pseudo_inverse
from bigbag.ops.nystrom import nystrom_attention, nystrom_class_token_attention
from bigbag.samples.nystrom import SAMPLES
from bigbag.testing import check

NAMED = {sample.name: sample for sample in SAMPLES}


def qkv(rows: int, heads: int = 2, dim: int = 16, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = (dim, dim, width)
    return [torch.randn(rows, heads, w, generator=generator, dtype=torch.float64).to(dtype) for w in widths]


def test_reference_and_adjoint_pass_gradcheck() -> None:
    """The reference, whose gradient is autograd's, and the cpu implementation, whose adjoints are written by hand."""
    tensors = [tensor.requires_grad_() for tensor in qkv(14, dim=4, width=3)]
    segments = Segments.from_sizes((9, 0, 4, 1))
    for impl in ("reference", "cpu"):

        def call(*values: Tensor, impl: str = impl) -> Tensor:
            return nystrom_attention(*values, segments, num_landmarks=4, num_iterations=3, impl=impl)

        assert torch.autograd.gradcheck(call, tuple(tensors), fast_mode=True)


def test_autocast_around_the_backward_pass_changes_nothing(impl: str, device: str) -> None:
    """The iteration's adjoint neither rounds to bfloat16 nor fails at the landmarks that a bag lacks."""
    tensors = [tensor.to(device).requires_grad_() for tensor in qkv(30, dtype=torch.float32)]
    found = []
    for enabled in (False, True):
        out = nystrom_attention(*tensors, Segments.from_sizes((25, 0, 5), device), num_landmarks=8, impl=impl)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out.square().sum(), tensors))
    for plain, cast in zip(*found):
        assert torch.equal(plain, cast)


def test_gradients_are_laid_out_as_compilers_are_told(impl: str, device: str) -> None:
    """Whatever the strides of the landmarks, gradients are contiguous, as the fake kernels say."""
    (q, _, v), segments = (
        (t.to(device) for t in qkv(12, width=16, dtype=torch.float32)),
        Segments.from_sizes([12], device),
    )
    counts = torch.tensor([4], device=device)
    keys, values = (torch.randn(1, 4, 2, 16, device=device).transpose(1, 2) for _ in range(2))
    spread, gather = (nystrom_module._OPS[name, impl] for name in ("spread", "gather"))
    for op, args in ((spread, (q, keys, values)), (gather, (keys, q, v))):
        leaves = [t.detach().requires_grad_() for t in args]
        out = op(*leaves, segments.offsets, counts)[0]
        assert all(g.is_contiguous() for g in torch.autograd.grad(out.square().sum(), leaves))


def test_agrees_with_torchmil_where_it_pads_nothing(any_impl: str, device: str) -> None:
    layer = pytest.importorskip("torchmil.nn.attention.nystrom_attention").NystromAttention
    torch.manual_seed(0)
    theirs = layer(in_dim=12, att_dim=32, n_heads=2, n_landmarks=8, out_dim=32)
    x = torch.randn(1, 48, 12)
    expected = theirs(x)[0]
    packed = theirs.qkv_nn(x[0]).to(device).view(48, 3, 2, 16).unbind(1)
    found = nystrom_attention(*packed, Segments.from_sizes((48,), device), num_landmarks=8, impl=any_impl)
    torch.testing.assert_close(found.flatten(1).cpu(), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(48, 32)
    wanted = torch.autograd.grad((expected * weight).sum(), theirs.qkv_nn.weight, retain_graph=True)[0]
    got = torch.autograd.grad((found.flatten(1).cpu() * weight).sum(), theirs.qkv_nn.weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_landmarks_are_means_of_the_real_rows_only() -> None:
    """A direct computation for 7 rows and 3 landmarks: groups 0-1, 2-3, 4-6."""
    q, k, v = qkv(7, heads=1)
    groups = [slice(0, 2), slice(2, 4), slice(4, 7)]
    ql, kl = (torch.stack([x[group, 0].mean(0) for group in groups]) for x in (q, k))
    first, a, third = ((left @ right.T / 4).softmax(1) for left, right in ((q[:, 0], kl), (ql, kl), (ql, k[:, 0])))
    z = a.T / (a.sum(1).max() * a.sum(0).max())
    for _ in range(20):
        z = 0.25 * z @ (13 * torch.eye(3) - a @ z @ (15 * torch.eye(3) - a @ z @ (7 * torch.eye(3) - a @ z)))
    torch.testing.assert_close(z, torch.linalg.pinv(a))
    for impl in ("reference", "cpu"):
        found = nystrom_attention(q, k, v, Segments.from_sizes((7,)), num_landmarks=3, num_iterations=20, impl=impl)
        torch.testing.assert_close(found[:, 0], first @ torch.linalg.pinv(a) @ third @ v[:, 0])


def test_as_many_landmarks_as_rows_give_exact_attention() -> None:
    """With m = N and a pseudo-inverse that has converged, A A^-1 A v = A v."""
    q, k, v = qkv(6, dim=16)
    found = nystrom_attention(q, k, v, Segments.from_sizes((6,)), num_iterations=40, impl="cpu")
    exact = ((q.transpose(0, 1) @ k.permute(1, 2, 0)) / 4).softmax(2) @ v.transpose(0, 1)
    torch.testing.assert_close(found, exact.transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_few_iterations(iterations: int) -> None:
    """None, the last alone, which forms no matrix of landmarks, and one before it; values and gradients in float64."""
    tensors = [tensor.requires_grad_() for tensor in qkv(40)]
    segments = Segments.from_sizes((30, 10))
    found, expected = (
        nystrom_attention(*tensors, segments, num_landmarks=8, num_iterations=iterations, impl=impl)
        for impl in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (found, expected)]
    torch.testing.assert_close(*grads)


def test_the_iteration_corrects_its_own_rounding() -> None:
    """Landmarks that attend to themselves: one that never looks at A Z again errs by 3e-4 of the largest value."""
    a = (10 * torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(3)
    a, other = a.float().double(), torch.eye(64, dtype=torch.float64).expand(1, 2, 64, 64)
    z = pseudo_inverse.initial_inverse(a)[0]
    exact = a @ pseudo_inverse.times(a, z, other, 6)
    found = a @ pseudo_inverse.times(a.float(), z.float(), other.float(), 6).double()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("token", [0, -1])
def test_class_token_row_is_that_of_the_whole_matrix(impl: str, device: str, token: int) -> None:
    sizes = (9, 0, 30, 1)
    q, k, _ = qkv(40, dtype=torch.float32)
    q, k = q.to(device), k.to(device)
    segments = Segments.from_sizes(sizes, device)
    row = nystrom_class_token_attention(q, k, segments, token=token, num_landmarks=4, impl=impl)
    for start, end in ((0, 9), (9, 39), (39, 40)):
        # Values that are the identity give back the attention matrix.
        size = end - start
        eye = torch.eye(size, device=q.device)[:, None].expand(-1, 2, -1).contiguous()
        alone = Segments.from_sizes((size,), device)
        matrix = nystrom_attention(q[start:end], k[start:end], eye, alone, num_landmarks=4, impl=impl)
        torch.testing.assert_close(row[start:end].T, matrix[token], rtol=1e-4, atol=1e-5)


def test_one_instance_gives_its_value_and_no_gradient_to_its_scores(impl: str, device: str) -> None:
    q, k, v = (tensor.float().to(device).requires_grad_() for tensor in qkv(1))
    out = nystrom_attention(q, k, v, Segments.from_sizes((1,), device), impl=impl)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert float(grads[0].abs().max()) < 1e-5 and float(grads[1].abs().max()) < 1e-5
    torch.testing.assert_close(grads[2], torch.ones_like(v), rtol=1e-6, atol=1e-6)


def test_compiles_to_one_graph_that_does_not_depend_on_the_cut() -> None:
    tensors = [tensor.requires_grad_() for tensor in qkv(40)]

    def step(offsets: Tensor, *values: Tensor) -> Tensor:
        return nystrom_attention(*values, Segments(offsets, (40,)), num_landmarks=8).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for sizes in ((30, 10), (5, 35)):
        loss = compiled(Segments.from_sizes(sizes).offsets, *tensors)
        expected = nystrom_attention(*tensors, Segments.from_sizes(sizes), num_landmarks=8).square().sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors))


def test_similar_bags_share_a_batch_and_each_is_in_one() -> None:
    groups = torch.tensor([256, 3, 0, 200, 16, 17])
    found = list(pseudo_inverse.batches(2, 256, groups))
    assert sorted(bag for bags, _ in found for bag in bags) == list(range(6))
    assert all(groups[bag] <= size <= 256 for bags, size in found for bag in bags)
    assert ([1, 2, 4], 16) in found and ([5], 32) in found


def test_memory_holds_no_matrix_of_rows_by_landmarks() -> None:
    """At 20,000 rows and 64 landmarks: the output, three gradients and one more, chunks; a quarter of torchmil's."""
    rows, heads, dim, landmarks = 20_480, 4, 16, 64
    tensors = [tensor.requires_grad_() for tensor in qkv(rows, heads, dim, dim, torch.float32)]
    segments = Segments.from_sizes((rows,))

    def peak(impl: str) -> int:
        def step() -> None:
            out = nystrom_attention(*tensors, segments, num_landmarks=landmarks, impl=impl)
            torch.autograd.grad(out.sum(), tensors)

        return peak_bytes(step)

    one = rows * heads * dim * 4
    assert 4 * one < peak("cpu") < 6.5 * one + (24 << 20)
    assert peak("reference") > 4 * rows * heads * landmarks * 4  # the measure sees what the definition keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_pieces_do_not_depend_on_the_number_of_threads_nor_leave_it_changed(dtype: torch.dtype) -> None:
    tensors = [tensor.requires_grad_() for tensor in qkv(9_000, 2, 8, 8, dtype)]
    segments = Segments.from_sizes((8_500, 3, 497))
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        out = nystrom_attention(*tensors, segments, num_landmarks=32, impl="cpu")
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert torch.get_num_threads() == count
    with torch.inference_mode():
        again = nystrom_attention(*tensors, segments, num_landmarks=32, impl="cpu")
    close = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=close, atol=close * float(one.detach().abs().max()))
    assert torch.equal(again, found[1][0])


def _step(tensors: list[Tensor], weight: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = nystrom_attention(*leaves, Segments.from_sizes(sizes), num_landmarks=64, impl="cpu")
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


needs_tiles = pytest.mark.skipif(not bfloat_tiles.AVAILABLE, reason="this processor has no AVX-512 BF16, or has AMX")


@needs_tiles
@pytest.mark.parametrize(("spread", "common"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1.0), (0.1, 1.0)])
def test_tiles_of_bfloat16_err_little_more_than_products_in_float32(
    spread: float, common: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From softmaxes that are close to one-hot to ones close to even. There weights, gradients of scores and landmarks
    that were simply rounded would lose what tells rows apart: gradients to q erred by their own size."""
    generator = torch.Generator().manual_seed(1)
    tensors = [
        (spread * torch.randn(2_003, 2, 32, generator=generator) + common * torch.randn(2, 32, generator=generator))
        for _ in range(3)
    ]
    inputs, weight = [t.bfloat16() for t in tensors], torch.randn(2_003, 2, 32, generator=generator).bfloat16()
    truth, found = _step([t.double() for t in inputs], weight, (1_700, 303)), _step(inputs, weight, (1_700, 303))
    monkeypatch.setattr(bfloat_tiles, "AVAILABLE", False)
    for exact, value, other in zip(truth, found, _step(inputs, weight, (1_700, 303))):
        error, allowed = ((t.double() - exact).norm() for t in (value, other))
        assert 0 < error <= 2 * allowed


@needs_tiles
def test_tiles_keep_what_is_not_a_number_to_its_bag() -> None:
    q, k, v = qkv(400, 2, 16, 16, torch.bfloat16)
    weight = torch.ones_like(v)
    clean = _step([q, k, v], weight, (150, 250))
    k[3, 1, 2] = torch.nan
    for before, after in zip(clean, _step([q, k, v], weight, (150, 250))):
        assert after[:150, 1].isnan().all() and torch.equal(after[150:], before[150:])


def test_bfloat16_where_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat_tiles, "AVAILABLE", False)
    check(NAMED["several"], "cpu", torch.bfloat16)


def test_errors_name_what_does_not_fit() -> None:
    q, k, v = qkv(5)
    segments = Segments.from_sizes((5,))
    with pytest.raises(ValueError, match="expected floating q, k"):
        nystrom_attention(q, k[:, :1], v, segments)
    with pytest.raises(ValueError, match="4 instances"):
        nystrom_attention(q, k, v, Segments.from_sizes((4,)))
    with pytest.raises(ValueError, match="num_landmarks >= 1"):
        nystrom_attention(q, k, v, segments, num_landmarks=0)
    with pytest.raises(ValueError, match="k or v is torch.float32"):
        nystrom_attention(q, k, v.float(), segments)
    with pytest.raises(ValueError, match="no row token=5"):
        nystrom_class_token_attention(q, k, segments, token=5)
