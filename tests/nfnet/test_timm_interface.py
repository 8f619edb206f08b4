"""The networks behave as users of torch and timm expect: compiled, exported, checkpointed, on the meta device, re-headed."""

import copy
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nfnet
from nfnet.analysis.activation_memory import activation_memory, saved_bytes
from nfnet.analysis.flops import multiply_adds
from nfnet.variants import Variant, get_variant

NAMES = ["nfnet_tiny", "nf_resnet50", "nf_regnet_b0"]
# A transition and a plain block: what the compiler meets in the whole network, it meets here.
SHORT = {name: replace(get_variant(name), depths=(1, 2), widths=(64, 96), strides=(1, 2)) for name in NAMES}
# NFNet-F0's shape (stem, strides, groups, widths that rise) at a size that runs in milliseconds.
LIKE_F0 = Variant(
    name="like F0",
    depths=(1, 2, 3, 1),
    widths=(32, 64, 192, 192),
    stem_widths=(4, 8, 12, 16),
    group_width=16,
    final_width=96,
)


def network(name: str, **options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    model = nfnet.create_model(name, num_classes=10, skip_init=1.0, **options)
    if isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.weight, std=0.5)  # a head of zeros would agree with anything
    return model


def like_f0(**options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.NFNet(LIKE_F0, 10, conventions=nfnet.block.Conventions(skip_init=1.0), **options)


def short(name: str, **options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    model = nfnet.NFNet(SHORT[name], 10, conventions=nfnet.block.Conventions(skip_init=1.0), **options)
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def gradients_of(model: nn.Module, images: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# --- compile, export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_compiling_meets_no_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = short(name, stochastic_depth=0.1, drop_rate=0.1)
    found = torch._dynamo.explain(model)(torch.randn(2, 3, 33, 33))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nfnet_f0", *NAMES])
def test_compiling_a_whole_network_meets_no_graph_break(name: str) -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(network(name, stochastic_depth=0.1).train())(torch.randn(1, 3, 64, 64))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_network_gives_the_same_gradients(checkpointing: bool) -> None:
    # "eager" runs the captured graph as it is: what is tested is the capture.
    torch._dynamo.reset()
    model, images = short("nfnet_tiny"), torch.randn(2, 3, 32, 32)
    plain = gradients_of(model, images)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for a, b in zip(gradients_of(compiled, images), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_generated_code_gives_the_same_gradients(checkpointing: bool) -> None:
    torch._dynamo.reset()
    model, images = network("nfnet_tiny"), torch.randn(2, 3, 32, 32)
    plain = gradients_of(model, images)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(gradients_of(compiled, images), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_network_is_the_network_at_any_batch(name: str) -> None:
    model = short(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_agrees_with_the_network(tmp_path: Path) -> None:
    onnx_agrees(short("nfnet_tiny"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_onnx_agrees_with_the_whole_network(name: str, tmp_path: Path) -> None:
    onnx_agrees(network(name), tmp_path)


def onnx_agrees(model: nn.Module, folder: Path) -> None:
    import onnxruntime

    images, path = torch.randn(2, 3, 64, 64), folder / "network.onnx"
    torch.onnx.export(model.eval(), (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        ours = model(images).numpy()
    assert np.abs(ours).max() > 0.1 and np.abs(theirs - ours).max() <= 1e-4


# --- memory -----------------------------------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients_bit_for_bit_and_keeps_less() -> None:
    model, images = network("nfnet_tiny", stochastic_depth=0.5, drop_rate=0.2).train(), torch.randn(4, 3, 32, 32)
    plain = gradients_of(model, images)
    with saved_bytes(model) as whole:
        output = model(images)
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model, images), plain, strict=True))
    with saved_bytes(model) as less:
        output = model(images)
    assert output.requires_grad and less.total < whole.total / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_foretold_is_memory_kept(precision: str, checkpointing: bool) -> None:
    model = network("nf_regnet_b0").train()
    expected = activation_memory(model, 48, batch=3, precision=precision)
    model.set_grad_checkpointing(checkpointing)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(3, 3, 48, 48).to(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", enabled=precision == "bf16"),
    ):
        output = model(images)
    assert output.requires_grad
    foretold = expected.checkpointed if checkpointing else expected.kept
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == foretold


def test_memory_grows_with_the_batch_but_for_the_standardised_weights() -> None:
    with torch.device("meta"):
        model = network("nfnet_tiny")
    one, two, three = (activation_memory(model, 32, batch=n).kept for n in (1, 2, 3))
    assert three - two == two - one > 0 and 2 * one > two


def test_the_largest_network_is_made_and_counted_without_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = nfnet.create_model("nfnet_f7_plus")
    assert round(multiply_adds(model, 224) / 1e9, 1) == 111.2
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert all(p.is_meta for p in model.parameters())
    assert grown < 0.5  # GiB; its weights alone are 3.1


def test_channels_last_in_is_channels_last_through() -> None:
    model = like_f0().eval()
    formats = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, i, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = model(images.to(memory_format=torch.channels_last))
        assert formats == [True] * 7
        torch.testing.assert_close(last, model(images), rtol=1e-4, atol=1e-5)


# --- heads, features, sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_heads_come_and_go(name: str) -> None:
    model, images = network(name), torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    features = model(images)
    assert features.shape == (2, model.num_features) and model.get_classifier() is model.head
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), features)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.num_classes == 7
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("nfnet_f0", "dm_nfnet_f0"), ("nf_resnet50", "nf_resnet50"), ("nf_regnet_b0", "nf_regnet_b0")]
)
def test_features_have_the_shapes_and_places_of_timms(ours: str, theirs: str) -> None:
    import timm

    options = {"width_divisor": 8} if ours == "nf_regnet_b0" else {}
    with torch.device("meta"):
        model, timm_model = nfnet.create_model(ours, **options), timm.create_model(theirs, features_only=True)
        images = torch.empty(2, 3, 96, 96)
        maps = model.forward_intermediates(images)
        assert [m.shape for m in maps] == [m.shape for m in timm_model(images)]
    assert [f.num_chs for f in model.feature_info] == timm_model.feature_info.channels() == [m.shape[1] for m in maps]
    assert [f.reduction for f in model.feature_info] == timm_model.feature_info.reduction()
    modules = dict(model.named_modules())
    assert all(f.module in modules for f in model.feature_info)


def test_chosen_features_are_those_of_the_whole_list() -> None:
    model, images = like_f0().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_intermediates(images)
        chosen = model.forward_intermediates(images, indices=(-1, 1))
        torch.testing.assert_close(maps[-1], model.forward_features(images))
    assert torch.equal(chosen[0], maps[-1]) and torch.equal(chosen[1], maps[1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_any_size_of_image_goes_through(channels_last: bool) -> None:
    model, deep = network("nfnet_tiny").eval(), like_f0().eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.no_grad():
        for px in range(1, 41):
            # ceil at each of the strides 2: TensorFlow's "same"
            assert model.forward_features(torch.randn(1, 3, px, px + 1).to(memory_format=layout)).shape[2] == -(
                -px // 8
            )
        for height, width in ((33, 97), (97, 33), (1, 1), (31, 2)):
            maps = deep.forward_intermediates(torch.randn(2, 3, height, width).to(memory_format=layout))
            expected = [(-(-height // r), -(-width // r)) for r in (2, 4, 8, 16, 32)]
            assert [tuple(m.shape[2:]) for m in maps] == expected
            assert all(bool(m.isfinite().all()) for m in maps)


def test_a_copy_and_a_state_dict_are_whole() -> None:
    model, images = network("nfnet_tiny").eval(), torch.randn(1, 3, 32, 32)
    other = nfnet.create_model("nfnet_tiny", num_classes=10).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), model(images))
        assert torch.equal(copy.deepcopy(model)(images), model(images))
