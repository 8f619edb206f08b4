"""AGC and an update's numbers over fragments: wherever a parameter is cut, its units are those of the whole one."""

import itertools
import math

import pytest
import torch

import nfnet.optim.agc as agc
from nfnet.optim.param_groups import settings
from nfnet.optim.sgd import SGD
from pipeline.engine.fragments import Fragment, Units, products
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.update_stats import PartStats, Sums, part_names

CPU = torch.device("cpu")
SHAPES = {"conv": (3, 2, 2), "gain": (5,), "scalar": (), "linear": (4, 3)}


def cut(name: str, whole: torch.Tensor, *ends: int) -> list[Fragment]:
    flat, bounds = whole.reshape(-1), [0, *ends, whole.numel()]
    parts = [Fragment(name, tuple(whole.shape), a, flat[a:b].clone(), True) for a, b in itertools.pairwise(bounds)]
    return [part for part in parts if len(part.weight)]


@pytest.mark.parametrize("name", SHAPES)
def test_units_norms_add_up_over_every_cut_into_three(name: str) -> None:
    whole = torch.randn(SHAPES[name])
    rows = whole.reshape(len(whole), -1) if whole.dim() > 1 else whole.reshape(1, -1)
    factors = torch.arange(1.0, len(rows) + 1)
    for ends in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        sums, scaled = torch.zeros(len(rows)), []
        for fragment in cut(name, whole, *ends):
            units = Units({name: SHAPES[name]}, [fragment], CPU)
            pieces = units.split([fragment.weight])
            sums += units.add_up(products(pieces, pieces))
            units.scale(pieces, factors)
            scaled.append(fragment.weight)
        torch.testing.assert_close(sums, rows.square().sum(1))
        torch.testing.assert_close(torch.cat(scaled).view(rows.shape), rows * factors[:, None])


def test_a_part_that_ends_where_units_end_is_one_piece_and_keeps_its_rows() -> None:
    rows = cut("linear", torch.randn(4, 3), 3, 9)[1]
    assert rows.cuts() == [(1, 2, 0, 6)] and rows.split(rows.weight)[0].shape == (2, 3)
    assert cut("linear", torch.randn(4, 3), 4, 5)[1].cuts() == [(1, 1, 0, 1)]


def test_units_are_numbered_in_the_order_of_the_parameters() -> None:
    whole = [Fragment(n, s, 0, torch.randn(math.prod(s)), True) for n, s in SHAPES.items()]
    units = Units(SHAPES, whole, CPU)
    assert (units.starts, units.count) == ({"conv": 0, "gain": 3, "scalar": 4, "linear": 5}, 9)
    assert units.index.tolist() == list(range(9))
    assert units.of_each({n: float(i) for i, n in enumerate(SHAPES)}).tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3]
    assert units.of_parameters(["linear", "gain"]).tolist() == [5, 6, 7, 8, 3]
    assert [tuple(t.shape) for t in units.split(f.weight for f in whole)] == [(3, 2, 2), (5,), (1,), (4, 3)]
    # A rank that holds nothing adds nothing.
    none = Units(SHAPES, [], CPU)
    assert none.add_up(products([], [])).tolist() == [0.0] * 9 and none.index.tolist() == []


def test_products_are_sums_a_unit_of_two_different_tensors() -> None:
    a, b = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    torch.testing.assert_close(products([a, a[0, 0]], [b, b[0, 0]])[:3], (a * b).sum((1, 2)))
    torch.testing.assert_close(products([a[0, 0]], [b[0, 0]]), (a[0, 0] * b[0, 0]).sum().view(1))


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.final_conv = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 2)


def test_the_reported_norms_are_those_of_the_update_that_follows() -> None:
    network, optim = Network(), OptimConfig(learning_rate=0.3, momentum=0.8, weight_decay=0.1)
    named = dict(network.named_parameters())
    rules = settings(list(named.items()))
    units = Units({n: tuple(p.shape) for n, p in named.items()}, [], CPU)
    sums = Sums.of_network(network, rules, units, optim)
    assert sums.names == ["stem", "final", "head"] and part_names(network, ["a.b"]) == {"a.b": "a"}

    factors = torch.linspace(0.2, 0.9, units.count)
    factors[1], factors[~sums.clip] = 1.0, 1.0
    groups = [{"params": [p], "weight_decay": optim.weight_decay * rules[n].decay} for n, p in named.items()]
    sgd = SGD(groups, lr=0.3, momentum=0.8)
    spans = [units.of_parameters([n]) for n in named]
    for _ in range(2):  # the second update has a momentum
        for p in named.values():
            p.grad = torch.randn_like(p)
        before, gradients = [p.detach().clone() for p in named.values()], [p.grad.clone() for p in named.values()]
        momenta = [sgd.state[p]["momentum"].clone() if sgd.state[p] else torch.zeros_like(p) for p in named.values()]
        pairs = [(before, before), (gradients, gradients), (gradients, before), (gradients, momenta), (before, momenta),
                 (momenta, momenta)]  # fmt: skip
        rows = torch.stack([products(a, b) for a, b in pairs])
        sgd.factors = [factors[span] for span in spans]
        sgd.step()
    moved = [p.detach() - b for p, b in zip(named.values(), before, strict=True)]
    whole, parts = sums.read(sums.of_parts(rows, factors, 0.3).flatten().tolist(), measured=True)

    def norm(tensors: list[torch.Tensor]) -> float:
        return math.sqrt(sum(float(t.square().sum()) for t in tensors))

    clipped = [g.clone() for g in gradients]
    torch._foreach_mul_(clipped, agc.per_unit(factors, clipped))
    looked_at = sum(agc.num_units(p) for n, p in named.items() if rules[n].clip)
    assert whole.clipped_share == pytest.approx(int((factors < 1).sum()) / looked_at)
    assert whole.gradient_norm == pytest.approx(norm(clipped), rel=1e-5)
    assert whole.weight_norm == pytest.approx(norm(before), rel=1e-5)
    assert whole.update_ratio == pytest.approx(norm(moved) / norm(before), rel=1e-4)
    stem, head = parts["stem"].update_ratio, parts["head"].update_ratio
    assert stem == pytest.approx(norm(moved[:2]) / norm(before[:2]), rel=1e-4)
    assert head == pytest.approx(norm(moved[4:]) / norm(before[4:]), rel=1e-4)
    # Without the momentum's products the size of the update is not known, and nothing is said of it.
    short, _ = sums.read(sums.of_parts(rows[:2], factors, 0.3).flatten().tolist(), measured=False)
    assert short == PartStats(**{**vars(whole), "update_ratio": None})
