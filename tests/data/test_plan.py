"""The plan of an epoch, against what it promises for any sizes, budget, world and batch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbag.data.plan import EpochPlan, derive_seed, plan_epoch

arguments = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 60), min_size=1, max_size=40),
        "seed": st.integers(-5, 2**40),
        "epoch": st.integers(0, 5),
        "world_size": st.integers(1, 7),
        "budget_instances": st.integers(1, 150),
        "batch_bags": st.integers(1, 17),
        "shuffle": st.booleans(),
    }
)


def make(args: dict, **changes: int) -> EpochPlan:
    args = {**args, **changes}
    sizes = args.pop("sizes")
    return plan_epoch(sizes, range(len(sizes)), **args)


def all_packs(plan: EpochPlan) -> list:
    return [pack for step in plan.steps for micro in step.micro_steps for pack in micro]


@given(arguments)
@settings(max_examples=150, deadline=None)
def test_every_bag_exactly_once(args: dict) -> None:
    plan = make(args)
    visited = sorted(bag for pack in all_packs(plan) if not pack.is_filler for bag in pack.bags)
    assert visited == list(range(len(args["sizes"])))
    assert plan.num_bags == len(args["sizes"])
    for step in plan.steps:
        assert step.num_bags == sum(len(p.bags) for m in step.micro_steps for p in m if not p.is_filler)


@given(arguments)
@settings(max_examples=150, deadline=None)
def test_every_rank_has_a_pack_in_every_micro_step_within_the_budget(args: dict) -> None:
    sizes, budget = args["sizes"], args["budget_instances"]
    plan = make(args)
    smallest = min(sizes)
    for step in plan.steps:
        for micro in step.micro_steps:
            assert len(micro) == args["world_size"]
    for pack in all_packs(plan):
        assert pack.num_instances == sum(sizes[bag] for bag in pack.bags)
        assert pack.num_instances <= budget or len(pack.bags) == 1
        assert not pack.is_filler or [sizes[bag] for bag in pack.bags] == [smallest]


@given(arguments)
@settings(max_examples=150, deadline=None)
def test_instances_are_balanced_within_one_largest_bag(args: dict) -> None:
    plan = make(args)
    totals = [sum(p.num_instances for _, _, p in plan.of_rank(rank)) for rank in range(args["world_size"])]
    assert max(totals) - min(totals) <= max(args["sizes"])


@given(arguments, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_the_bags_of_each_step_do_not_depend_on_the_world(args: dict, other_world: int) -> None:
    def steps(plan: EpochPlan) -> list[list[int]]:
        return [sorted(b for m in s.micro_steps for p in m if not p.is_filler for b in p.bags) for s in plan.steps]

    assert steps(make(args)) == steps(make(args, world_size=other_world))


@given(arguments)
@settings(max_examples=50, deadline=None)
def test_plans_are_reproducible_and_seeds_differ(args: dict) -> None:
    plan = make(args)
    assert plan == make(args)
    seeds = [pack.seed for pack in all_packs(plan)] + [pack.seed for pack in all_packs(make(args, epoch=9))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_order_follows_bags_without_shuffling_and_changes_with_the_epoch() -> None:
    kwargs = {"seed": 3, "world_size": 1, "budget_instances": 1, "batch_bags": 2}
    sizes = [1] * 30
    fixed = plan_epoch(sizes, [7, 3, 9, 1], epoch=0, shuffle=False, **kwargs)
    assert [sorted(p.bags[0] for m in s.micro_steps for p in m) for s in fixed.steps] == [[3, 7], [1, 9]]

    def order(epoch: int) -> list[int]:
        plan = plan_epoch(sizes, range(30), epoch=epoch, **{**kwargs, "batch_bags": 1})
        return [pack.bags[0] for _, _, pack in plan.of_rank(0)]

    assert sorted(order(0)) == list(range(30))
    assert len({tuple(order(epoch)) for epoch in range(4)}) == 4
    assert order(0) != list(range(30))


def test_packs_are_few_full_and_fillers_fill_the_rest() -> None:
    # 6 + 4, 5 + 5, 10: three packs of ten; on two ranks four packs, still no filler, since there are five bags
    sizes = [6, 4, 5, 5, 10]
    one = plan_epoch(sizes, range(5), seed=0, epoch=0, world_size=1, budget_instances=10, batch_bags=5)
    assert sorted(sorted(sizes[b] for b in p.bags) for _, _, p in one.of_rank(0)) == [[4, 6], [5, 5], [10]]
    two = plan_epoch(sizes, range(5), seed=0, epoch=0, world_size=2, budget_instances=10, batch_bags=5)
    assert two.num_packs == 2 and not any(p.is_filler for p in all_packs(two))
    four = plan_epoch([8, 3], range(2), seed=0, epoch=0, world_size=4, budget_instances=100, batch_bags=2)
    assert [(p.bags, p.is_filler) for p in four.steps[0].micro_steps[0]] == [
        ((0,), False), ((1,), False), ((1,), True), ((1,), True),
    ]  # fmt: skip


def test_resume_starts_at_the_step() -> None:
    plan = plan_epoch([1] * 10, range(10), seed=0, epoch=0, world_size=1, budget_instances=2, batch_bags=3)
    assert list(plan.of_rank(0, start_step=2)) == [item for item in plan.of_rank(0) if item[0] >= 2]
    assert plan.num_steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0}, "world_size is 0"),
        ({"budget_instances": 0}, "budget_instances is 0"),
        ({"batch_bags": 0}, "batch_bags is 0"),
        ({"bags": [1, 1]}, "twice"),
        ({"bags": [0, 5]}, "there are 3 bags"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    args = {"bags": [0, 1], "seed": 0, "epoch": 0, "world_size": 1, "budget_instances": 1, "batch_bags": 1, **changes}
    with pytest.raises(ValueError, match=message):
        plan_epoch([1, 2, 3], args.pop("bags"), **args)


def test_derived_seeds_are_the_same_everywhere() -> None:
    # A golden number: another one would change every run that is resumed after an update.
    assert derive_seed(0, 1, 2) == 4450782424123420391 != derive_seed(0, 2, 1)
    assert derive_seed(-1) != derive_seed(1)


def test_planning_a_large_set_is_fast() -> None:
    import time

    start = time.perf_counter()
    plan = plan_epoch([1000 + i % 977 for i in range(20_000)], range(20_000), seed=0, epoch=0, world_size=64,
                      budget_instances=131_072, batch_bags=64)  # fmt: skip
    assert plan.num_bags == 20_000
    assert time.perf_counter() - start < 10
