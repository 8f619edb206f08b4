"""Binary trunks: estimators against their formulas, filters against a loop, the account of the variance, what two steps share."""

import math

import pytest
import torch

from nfnet.normalizers.method import ConvSite
from nfnet.normalizers.registry import make_method
from nfnet.trunks.binary import BinaryConv2d, binary_filters, sign
from nfnet.trunks.networks import create


def test_signs_have_no_third_value_and_the_published_derivative() -> None:
    """Derivative 2 + 2x on [-1, 0), 2 - 2x on [0, 1), 0 outside: that of the source's surrogate."""
    x = torch.tensor(
        [-1.5, -1.0, -0.75, -0.25, -0.0, 0.0, 0.25, 0.75, 1.0, 1.5], dtype=torch.float64, requires_grad=True
    )
    out = sign(x)
    assert out.tolist() == [-1] * 4 + [1] * 6
    out.sum().backward()
    assert x.grad is not None

    def surrogate(
        v: torch.Tensor,
    ) -> torch.Tensor:  # Liu et al. 2018 (Bi-Real), equation 5: what the sign is replaced by
        inner = torch.where(v < 0, 2 * v + v * v, 2 * v - v * v)
        return torch.where(v < -1, -1.0, torch.where(v >= 1, 1.0, inner))

    inside = x.detach()[[0, 2, 3, 6, 7, 9]]
    slope = (surrogate(inside + 1e-6) - surrogate(inside - 1e-6)) / 2e-6
    torch.testing.assert_close(x.grad[[0, 2, 3, 6, 7, 9]], slope, atol=1e-6, rtol=1e-6)
    assert x.grad[4] == x.grad[5] == 2


def test_filters_have_one_size_each_and_pass_gradients_within_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    upstream = torch.randn(3, 2, 3, 3)
    out = binary_filters(weight)
    out.backward(upstream)
    assert weight.grad is not None
    for o in range(3):
        flat = weight[o].flatten().tolist()
        mean = sum(map(abs, flat)) / len(flat)
        assert out[o].flatten().tolist() == pytest.approx([math.copysign(mean, w) for w in flat])
        wanted = [mean * g * (abs(w) < 1) for w, g in zip(flat, upstream[o].flatten().tolist(), strict=True)]
        assert weight.grad[o].flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("binary_gain", "variance"), [(0.0, 1.0), (1.0, 2 / math.pi), ((math.pi / 2) ** 0.5, 1.0)])
def test_the_account_of_the_variance_holds_for_real_filters_and_for_binary_ones_with_their_gain(
    binary_gain: float, variance: float
) -> None:
    torch.manual_seed(0)
    site = ConvSite(in_channels=256, out_channels=256, kernel=3)
    conv = BinaryConv2d(make_method("normalizer_free"), site, binary_gain)
    out = conv(torch.randn(32, 256, 5, 5))[:, :, 1:-1, 1:-1]
    assert float(out.detach().var()) == pytest.approx(variance, rel=0.03)


def test_the_expected_deviation_begins_again_where_maps_shrink() -> None:
    net = create("reactnet_a", 0, method="normalizer_free")
    found = [round(step.scale**-2, 6) for block in net.blocks for step in block]
    a = 0.04
    wanted = [1, 1 + a]  # 64 channels
    for steps in (4, 4, 12, 4):  # of each number of channels: the first reads what the stage before left
        wanted += [wanted[-1] + a, *[1 + a * i for i in range(1, steps)]]
    assert found == pytest.approx(wanted)
    assert {step.scale for block in create("reactnet_tiny", method="batch_norm").blocks for step in block} == {1.0}


def test_the_full_size_has_the_published_layers() -> None:
    """Multiply-adds of the binary layers: 4.82e9, Liu et al. 2020, table 1, from memory of it (BOPs)."""
    with torch.device("meta"):
        net = create("reactnet_a", 1000, method="batch_norm")
    px, total = 112, 0
    for block in net.blocks:
        for step in block:
            px //= step.stride
            total += sum(c.conv.weight.numel() for c in step.convs) * px**2
    assert total == pytest.approx(4.82e9, rel=0.005)


@pytest.mark.parametrize("method", ["batch_norm", "normalizer_free", "group_norm"])
def test_both_steps_train_and_the_second_takes_the_firsts_weights(method: str) -> None:
    torch.manual_seed(0)
    settings = {"skip_init": 1.0} if method == "normalizer_free" else {}
    first = create("reactnet_tiny", 4, method=method, **settings)
    second = create("reactnet_tiny", 4, method=method, binary_weights=True, **settings)
    second.load_state_dict(first.state_dict())
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for net in (first, second):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(net(x), y)
            optimiser.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in net.parameters())
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    binary = second.blocks[0][0].convs[0]
    assert len(binary.filters()[0].unique()) == 2


def test_it_is_one_graph_and_trains_in_half_precision() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = create("reactnet_tiny", 4, method="normalizer_free", skip_init=1.0, binary_weights=True).eval()
    x = torch.randn(2, 3, 16, 16)
    graph = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(x), net(x), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net.train()(x)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_a_binary_trunk_cannot_take_is_said() -> None:
    with pytest.raises(ValueError, match="preconditioning does more in a convolution than binary weights leave"):
        create("reactnet_tiny", method="preconditioning", binary_weights=True)
    with pytest.raises(ValueError, match="these branches have one"):
        create("reactnet_tiny", method="fixup")
    with pytest.raises(ValueError, match="vgg_tiny is no binary trunk and has no option binary_gain"):
        create("vgg_tiny", binary_gain=1.2)
