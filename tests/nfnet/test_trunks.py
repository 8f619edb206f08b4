"""The trunks: sizes that were published, and the NFNet as one of them."""

import pytest
import torch

import nfnet
from nfnet.trunks.networks import create, list_trunks


def num_parameters(name: str, **options: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **options).parameters())


@pytest.mark.parametrize(
    ("name", "method", "published"),
    [
        ("resnet50_v2", "batch_norm", 25_549_352),  # timm's resnetv2_50
        ("vgg_a", "none", 132_863_336),  # torchvision's vgg11
        ("inception_v2", "batch_norm", 11.19e6),  # 11.2 million, tensorflow/models
        ("nfnet_f0", "normalizer_free", 71.5e6),  # Brock et al. 2021b, table 1
        ("nfnet_f0", "batch_norm", 71.5e6),
    ],
)
def test_full_sizes_have_the_published_numbers_of_parameters(name: str, method: str, published: float) -> None:
    exact = isinstance(published, int)
    assert num_parameters(name, method=method) == (published if exact else pytest.approx(published, rel=2e-3))


@pytest.mark.slow
def test_the_first_network_is_timms_too() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = sum(p.numel() for p in timm.create_model("resnetv2_50").parameters())
    assert num_parameters("resnet50_v2") == theirs


def test_normaliser_free_trunk_of_nfnets_shape_is_the_nfnet() -> None:
    """Same weights, same logits and gradients: one network behind two builders."""
    torch.manual_seed(0)
    ours = create("nfnet_tiny", 10, method="normalizer_free", skip_init=0.5)
    theirs = nfnet.create_model("nfnet_tiny", 10)
    with torch.no_grad():
        for a, b in zip(_ordered(ours), _ordered(theirs), strict=True):
            assert a.shape == b.shape
            b.copy_(a)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for net in (ours, theirs):
        net(x).square().sum().backward()
    for a, b in zip(_ordered(ours), _ordered(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def _ordered(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Stem, blocks (branch, shortcut, squeeze-excite, gain), end, head: one order for both."""

    def block(b: torch.nn.Module) -> list[torch.nn.Parameter]:
        convs = getattr(b, "convs", None) or [b.conv0, b.conv1, b.conv1b, b.conv2]
        end = b.branch_end.skip_gain if hasattr(b, "branch_end") else b.skip_gain
        parts = [*convs, *([b.conv_shortcut] if b.conv_shortcut is not None else []), b.squeeze_excite]
        return [*(p for part in parts for p in part.parameters()), end]

    last = net.final if hasattr(net, "final") else net.final_conv
    blocks = [p for b in net.blocks for p in block(b)]
    return [*net.stem.parameters(), *blocks, *last.parameters(), *net.head.parameters()]


def test_the_path_from_se_resnext_d_to_nfnet_is_two_options() -> None:
    default = {"widths": (256, 512, 1024, 2048), "second_3x3": False}
    assert num_parameters("nfnet_f0", **default) == num_parameters("se_resnext_d")
    both = {"widths": (256, 512, 1536, 1536), "second_3x3": True}
    assert num_parameters("se_resnext_d", **both) == num_parameters("nfnet_f0")


def test_ours_take_the_same_two_options() -> None:
    with torch.device("meta"):
        plain = nfnet.create_model("nfnet_f0", widths=(256, 512, 1024, 2048), second_3x3=False)
    assert sum(p.numel() for p in plain.parameters()) == num_parameters("se_resnext_d", method="normalizer_free")
    with pytest.raises(ValueError, match=r"widths has 3 entries; nfnet_f0 has 4 stages"):
        nfnet.create_model("nfnet_f0", widths=(1, 2, 3))


@pytest.mark.parametrize("name", [n for n in list_trunks() if n.endswith("tiny")])
def test_tiny_trunks_take_images_of_32_and_64_px(name: str) -> None:
    net = create(name, 5, method="group_norm")
    for px in (32, 64):
        x = torch.randn(2, 3, px, px)
        assert net(x).shape == (2, 5)
        assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, net.num_features)


def test_a_chain_refuses_what_changes_branches() -> None:
    for trunk in ("vgg_tiny", "inception_tiny"):
        with pytest.raises(ValueError, match="skip_init changes residual branches, and this trunk has none"):
            create(trunk, method="skip_init")
    with pytest.raises(ValueError, match="no residual trunk and has no option depths"):
        create("vgg_tiny", depths=(1, 1))
    with pytest.raises(ValueError, match="no trunk 'resnet50'; the nearest names are resnet50_v2"):
        create("resnet50")


def test_checkpointing_is_refused_where_statistics_would_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="takes statistics in the forward pass"):
        create("resnet_v2_tiny", method="batch_norm").set_grad_checkpointing()
    net = create("resnet_v2_tiny", 4, method="group_norm")
    x = torch.randn(2, 3, 16, 16)
    plain = net(x)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net(x), plain)


def test_stochastic_depth_drops_branches_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    net = create("resnet_v2_tiny", 4, method="none", stochastic_depth=0.5)
    block, x = net.blocks[-1], torch.randn(2000, 64, 4, 4)
    assert block.drop_path.rate == pytest.approx(0.5 * 2 / 3)
    with torch.no_grad():
        branch = block.train()(x) - block.conv_shortcut(block.norm_act0(x))
        whole = block.eval()(x) - block.conv_shortcut(block.norm_act0(x))
    dropped = (branch.abs().sum((1, 2, 3)) < 1e-3).float().mean()
    assert float(dropped) == pytest.approx(1 / 3, abs=0.05)
    kept = branch[branch.abs().sum((1, 2, 3)) > 1e-3]
    assert float(kept.abs().mean() / whole.abs().mean()) == pytest.approx(1.5, rel=0.05)
