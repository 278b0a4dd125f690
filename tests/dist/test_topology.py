import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainGroup, DomainTopology
from megamod.errors import UserError

NAMES = tuple("abcdefgh")


def layouts():
    for domains in range(1, 9):
        for world in range(1, 25):
            if world % domains == 0 or domains % world == 0:
                yield DomainTopology(world, NAMES[:domains], Sharing.DEMIX)


def test_layout_is_the_contiguous_one_of_the_formula():
    for layout in layouts():
        world, domains = layout.world_size, layout.domains
        for rank in range(world):
            expected = [
                domain
                for number, domain in enumerate(domains)
                if rank * len(domains) // world <= number
                and number * world < (rank + 1) * len(domains)
            ]
            assert list(layout.get_rank_domains(rank)) == expected


def test_ranks_of_inverts_domains_of_and_each_expert_has_one_lead():
    for layout in layouts():
        for domain in layout.domains:
            holders = [r for r in range(layout.world_size) if domain in layout.get_rank_domains(r)]
            assert list(layout.get_domain_ranks(domain)) == holders
            assert [layout.get_rank_in_group(r) for r in holders] == list(range(len(holders)))
            assert [r for r in holders if layout.is_group_lead(r)] == holders[:1]
            assert len(holders) == layout.ranks_per_domain
        sets = {layout.get_rank_domains(rank) for rank in range(layout.world_size)}
        assert len(sets) == layout.expert_parallel_size


def test_eight_domains_on_128_ranks_make_eight_groups_of_sixteen():
    layout = DomainTopology(128, NAMES, Sharing.DEMIX)
    assert layout.get_domain_ranks("c") == range(32, 48) and layout.get_rank_domains(47) == ("c",)


def test_dense_training_has_every_domain_everywhere():
    layout = DomainTopology(3, NAMES[:2], Sharing.DENSE)
    assert layout.get_rank_domains(2) == ("a", "b") and layout.get_domain_ranks("b") == range(3)
    assert [rank for rank in range(3) if layout.is_group_lead(rank)] == [0]


@pytest.mark.parametrize(
    ("world", "domains", "sharing", "message"),
    [
        (
            3,
            4,
            Sharing.DEMIX,
            "3 ranks cannot hold 4 experts (a, b, c, d): use 1, 2, 4, 8, 12, 16,",
        ),
        (6, 4, Sharing.DEMIX, "6 ranks cannot hold"),
        (2, 4, Sharing.BTM, "use 4, 8, 12, 16, ... ranks; independent experts need at least one"),
        (6, 4, Sharing.BTM, "6 ranks cannot hold"),
    ],
)
def test_a_world_size_that_does_not_fit_is_refused(world, domains, sharing, message):
    with pytest.raises(UserError) as caught:
        DomainTopology(world, NAMES[:domains], sharing)
    assert message in str(caught.value)


def test_the_table():
    layout = DomainTopology(4, ("law", "med"), Sharing.DEMIX)
    lines = layout.format_layout(["n0", "n0", "n1", "n1"], ["cpu"] * 4).splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "host", "device", "domains", "shared", "over", "experts", "over"],
        ["0", "n0", "cpu", "law", "0-3", "0-1"],
        ["1", "n0", "cpu", "law", "0-3", "0-1"],
        ["2", "n1", "cpu", "med", "0-3", "2-3"],
        ["3", "n1", "cpu", "med", "0-3", "2-3"],
    ]
    independent = DomainTopology(2, ("law", "med"), Sharing.BTM).format_layout(
        ["n"] * 2, ["cpu"] * 2
    )
    assert independent.splitlines()[2].split() == ["1", "n", "cpu", "med", "1", "-"]
    two = DomainTopology(1, ("law", "med"), Sharing.DEMIX).format_layout(["n"], ["cpu"])
    assert two.splitlines()[1].split() == ["0", "n", "cpu", "law,med", "0", "0"]


@pytest.mark.parametrize("sharing", [Sharing.DEMIX, Sharing.BTM])
def test_the_table_warns_of_experts_that_are_split_without_need(sharing):
    layout = DomainTopology(8, ("law", "med", "code", "news"), sharing)
    three_and_five = layout.format_layout(["a"] * 3 + ["b"] * 5, ["cpu"] * 8).splitlines()
    assert len(three_and_five) == 10 and three_and_five[-1].startswith("warning: ")
    assert (
        "all 2 ranks of an expert: med on a, b; use slots in multiples of 2" in three_and_five[-1]
    )
    assert "warning" not in layout.format_layout(["a"] * 2 + ["b"] * 6, ["cpu"] * 8)
    # No host has two ranks, so every split is needed.
    assert "warning" not in layout.format_layout(list("abcdefgh"), ["cpu"] * 8)
    assert "warning" not in DomainTopology(8, ("law",), Sharing.DENSE).format_layout(
        ["a"] * 3 + ["b"] * 5, ["cpu"] * 8
    )


def sum_in_group(rank: int) -> tuple[list[int], float, int, int]:
    group = DomainGroup(DomainTopology(4, ("law", "med"), Sharing.BTM))
    value = torch.tensor(10.0**rank)
    dist.all_reduce(value, group=group.get_data_parallel_group())
    index = group.get_data_parallel_rank()
    return list(group.ranks), value.item(), index, group.get_data_parallel_world_size()


def test_a_domain_group_reduces_over_its_own_ranks():
    assert on_ranks(4, sum_in_group) == [
        ([0, 1], 11.0, 0, 2),
        ([0, 1], 11.0, 1, 2),
        ([2, 3], 1100.0, 0, 2),
        ([2, 3], 1100.0, 1, 2),
    ]
