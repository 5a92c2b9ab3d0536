"""Bags shared out over several ranks: the same losses and gradients as on one."""

import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bigbag import Bag, PackedBags
from bigbag.config import ModelConfig, TaskConfig
from bigbag.graphs import build_adjacency
from bigbag.memory import peak_bytes
from bigbag.models import MODELS, build_model
from bigbag.nn import VariationalAutoEncoder, prob_smooth_attention_pool
from bigbag.ops.join import join_parts
from bigbag.parts import Parts
from bigbag.segments import Segments
from bigbag.testing import run_ranks
from tests.models.test_models import SMALL, build, make_bag

ENCODER = {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]}
IN_PARTS = [(name, SMALL.get(name, {})) for name, model in MODELS.items() if model.in_parts]
VARIANTS = IN_PARTS + [
    ("ABMIL", {"gated": True, "feat_ext": ENCODER}),
    ("MaxMIL", {"feat_ext": ENCODER}),
    ("CLAM_SB", {"feat_ext": ENCODER, "k_sample": 3}),
    ("DSMIL", {"nonlinear_q": True, "feat_ext": ENCODER}),
    ("SmABMIL", {"sm_where": "mid", "sm_alpha": 0.3, "feat_ext": ENCODER}),
    ("SmABMIL", {"sm_where": "late"}),
    ("SmABMIL", {"sm_mode": "exact"}),
    ("PatchGCN", {"n_gcn_layers": 3, "hidden_dim": 5, "mlp_depth": 2, "feat_ext": ENCODER}),
    ("DeepGraphSurv", {"n_layers_rep": 2, "hidden_dim": 8, "att_dim": 4, "compute_lambda_max": True}),
    ("TransMIL", {**SMALL["TransMIL"], "n_layers": 3, "conv_residual": True, "feat_ext": ENCODER}),
    ("TransMIL", {**SMALL["TransMIL"], "zero_padding": False, "use_mlp": True}),
    ("CAMIL", {**SMALL["CAMIL"], "zero_padding": False, "gated_pool": True, "feat_ext": ENCODER}),
    ("TransformerABMIL", {"transf_att_dim": 7, "transf_n_heads": 7, "transf_n_layers": 2, "feat_ext": ENCODER}),
    ("SmTransformerABMIL", {**SMALL["SmTransformerABMIL"], "transf_use_mlp": False}),
    ("DTFDMIL", {"distill_mode": "afs", "n_groups": 3, "feat_ext": ENCODER}),
    ("ProbSmoothABMIL", {"att_dim": 6, "n_samples_train": 7, "feat_ext": ENCODER}),
]


def make_bags(seed: int):
    """Random sizes, among them a bag smaller than the number of ranks; seed 0: one instance in all."""
    if seed == 0:
        return [make_bag(1, 1, 0)]
    numbers = random.Random(seed)
    sizes = [numbers.randint(4, 30), 1, numbers.randint(1, 30)]
    return [make_bag(size, i % 2, 10 * seed + i) for i, size in enumerate(sizes)]


def mean_samples(self, mean, log_std, n_samples=1):
    """No random numbers: they are drawn instance by instance, so differently on other numbers of ranks."""
    return (mean + 0 * log_std)[:, None].expand(-1, n_samples, -1)


def masked_batch(seed):
    """A padded batch whose mask rules out rows anywhere, which hold large numbers and have edges to the others."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 17, generator=generator) < torch.tensor([[0.7], [0.4], [0.1]])
    mask[:, 5] = True
    X = torch.randn(3, 17, 6, generator=generator).masked_fill(~mask[..., None], 1e6)
    adj = torch.rand(3, 17, 17, generator=generator).triu(1) * (torch.rand(3, 17, 17, generator=generator) < 0.3)
    coords = torch.stack([torch.randperm(25, generator=generator)[:17] for _ in range(3)])
    coords = torch.stack([coords // 5, coords % 5], -1)
    return {"X": X, "mask": mask, "adj": adj + adj.mT, "coords": coords}, torch.tensor([1.0, 0.0, 1.0])


def bags_of(batch, Y):
    """The bags of a padded batch, without what is masked out."""
    found = []
    for i, y in enumerate(Y.tolist()):
        pack = PackedBags.from_padded(**{key: value[i : i + 1] for key, value in batch.items()})
        found.append(Bag(pack.x, int(y), f"bag{i}", coords=pack.coords, adj=pack.adj))
    return found


def masked_errors(variants, seed):
    """Of losses and gradients of parts, against those of the padded batch with its mask; fp64."""
    batch, Y = masked_batch(seed)
    bags, found = bags_of(batch, Y), {}
    for name, arguments in variants:
        model = build(name, arguments).double()
        taken = {"X", "mask", *model.needs}
        given = {key: value.double() if key in ("X", "adj") else value for key, value in batch.items() if key in taken}
        torch.manual_seed(3)
        with mock.patch.object(VariationalAutoEncoder, "get_reparameterized_samples", mean_samples):
            _, losses = model.compute_loss(Y.double(), **given)
        sum(losses.values()).backward()
        ranks = (dist.get_rank(), dist.get_world_size())
        own, grads, _, _ = compute(name, arguments, bags, torch.float64, ranks)
        pairs = [(own[key], losses[key].detach()) for key in losses]
        pairs += [(grads[key], p.grad) for key, p in model.named_parameters() if p.grad is not None]
        scale = max(float(expected.norm()) for _, expected in pairs[len(losses) :])
        found[name] = max(float((a - b).norm() / (b.norm() + 1e-3 * scale)) for a, b in pairs)
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_masked_instances_are_in_no_part(num_ranks):
    for found in run_ranks(masked_errors, num_ranks, IN_PARTS, num_ranks):
        assert len(found) == len(IN_PARTS)
        assert max(found.values()) <= 1e-5, found


def compute(name, arguments, bags, dtype, parts=None):
    """Losses, gradients, scores; of this rank's part and added up over the ranks, if ``parts`` is (rank, ranks)."""
    model = build(name, arguments).to(dtype)
    model.activation_checkpointing, model.chunk_instances = "feat_ext" in arguments, 5
    pack = PackedBags.from_bags(bags if parts is None else [bag.part(*parts) for bag in bags])
    pack = pack.with_x(pack.x.to(dtype))
    num_ranks = 1
    if parts is not None:
        rank, num_ranks = parts
        pack = join_parts(replace(pack, parts=Parts.even([bag.num_instances for bag in bags], num_ranks, rank)))
    torch.manual_seed(3)
    with mock.patch.object(VariationalAutoEncoder, "get_reparameterized_samples", mean_samples):
        _, losses = model.compute_loss(pack.y, pack)
        (sum(losses.values()) / num_ranks).backward()
        _, scores = model.eval().predict(pack, return_inst_pred=True)
    # DeepSpeed's reductions are in the order of the weights that have a gradient: the same ones on all ranks.
    without = [key for key, p in model.named_parameters() if p.grad is None]
    grads = {key: p.grad if p.grad is not None else torch.zeros_like(p) for key, p in model.named_parameters()}
    if parts is not None:
        for grad in grads.values():
            dist.all_reduce(grad)
    cut = [part.detach() for part in scores.split(pack.sizes)]
    return {key: value.detach() for key, value in losses.items()}, grads, cut, without


def errors_of(name, arguments, bags, dtype, parts):
    """The largest relative error of losses, of gradients, and of scores against one rank."""
    losses, grads, scores, without = compute(name, arguments, bags, dtype)
    found, own, part, missing = compute(name, arguments, bags, dtype, parts)
    assert missing == without, f"{name}, rank {parts[0]}: no gradient of {missing}, expected those of {without}"
    scale = max(float(grad.norm()) for grad in grads.values())
    loss = max(float(abs(found[key] - losses[key]) / abs(losses[key])) for key in losses)
    grad = max(float((own[key] - g).norm() / (g.norm() + 1e-3 * scale)) for key, g in grads.items())
    pieces = [whole[len(whole) * parts[0] // parts[1] :][: len(mine)] for whole, mine in zip(scores, part)]
    whole, mine = torch.cat(pieces), torch.cat(part)
    score = float((mine - whole).abs().max() / torch.cat(scores).abs().max()) if len(mine) else 0.0
    return loss, grad, score


def all_errors(variants, runs):
    parts = (dist.get_rank(), dist.get_world_size())
    found = {}
    for number, (name, arguments) in enumerate(variants):
        for seed, dtype in runs:
            found[f"{number} {name} {dtype} seed {seed}"] = errors_of(name, arguments, make_bags(seed), dtype, parts)
    return found


@pytest.mark.parametrize("num_ranks, second", [(2, (2, torch.float32)), (3, (0, torch.float64))])
def test_several_ranks_give_what_one_gives(num_ranks, second):
    for found in run_ranks(all_errors, num_ranks, VARIANTS, ((num_ranks, torch.float64), second), timeout_s=400):
        assert len(found) == 2 * len(VARIANTS)
        for key, errors in found.items():
            tolerance = 1e-5 if "float64" in key else 1e-3
            assert all(error <= tolerance for error in errors), f"{key}: {errors}"


def drawn_seeds():
    torch.manual_seed(dist.get_rank())
    parts = Parts.even([5, 0, 9], dist.get_world_size(), dist.get_rank())
    seeds = prob_smooth_attention_pool._new_seeds(Segments.of_parts(parts))
    return seeds.tolist(), torch.rand(1).item()


def test_ranks_agree_on_the_seeds_of_their_draws():
    (seeds, after), (others, other_after) = run_ranks(drawn_seeds, 2)
    assert seeds == others and len(set(seeds)) == 3 and after != other_after


LARGE = {
    "ABMIL": ({"att_dim": 32}, 100, 0.62),
    "SmABMIL": ({"att_dim": 32}, 100, 0.76),
    "PatchGCN": ({"n_gcn_layers": 3, "hidden_dim": 32, "att_dim": 32}, 100, 0.58),
    "TransMIL": ({"att_dim": 32, "n_heads": 2, "n_landmarks": 16}, 100, 0.58),
    "TransformerABMIL": ({"transf_att_dim": 32, "transf_n_heads": 8, "transf_use_mlp": False}, 60, 0.76),
}
"""Arguments, side of a square bag, and how much of one rank's memory each of two may take: a half, borders, and what
does not depend on the bag, such as a chunk of 2048 rows."""


def peak_of_step(name, arguments, side, width):
    """Most bytes of tensors in a step, beyond the instances, on a bag that is a square of tissue."""
    coords = np.stack(np.divmod(np.arange(side**2), side), 1)
    x = torch.randn(side**2, width, generator=torch.Generator().manual_seed(0))
    bag = Bag(x, 1, "square", coords=coords, adj=build_adjacency(coords, radius=1.5, normalize="symmetric"))
    pack = PackedBags.from_bags([bag])
    if dist.is_initialized():
        place = (dist.get_rank(), dist.get_world_size())
        parts = Parts.even([side**2], place[1], place[0])
        pack = join_parts(replace(PackedBags.from_bags([bag.part(*place)]), parts=parts))
    model = build_model(ModelConfig(name=name, **arguments), (width,), TaskConfig())

    def step():
        model.zero_grad()
        _, losses = model.compute_loss(pack.y, pack)
        sum(losses.values()).backward()

    return peak_bytes(step)


def peaks():
    return {name: peak_of_step(name, arguments, side, 32) for name, (arguments, side, _) in LARGE.items()}


def test_a_rank_holds_its_part():
    whole = peaks()
    for found in run_ranks(peaks, 2, timeout_s=300):
        for name, (_, _, share) in LARGE.items():
            assert found[name] <= share * whole[name], f"{name}: {found[name]} bytes on 1 of 2, {whole[name]} alone"
