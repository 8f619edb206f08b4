"""Every variant has the sizes that the papers print (Brock et al. 2021, table 1 and A.3; the plus variants: A.5)."""

import pytest
import torch

import nfnet
from nfnet.analysis.flops import count_parameters, multiply_adds
from nfnet.variants import get_variant

# name: (parameters in millions, multiply-adds in billions at 224 px), to the digits that are printed. F0-F6 and F4+'s
# parameters are the paper's; the rest was computed by others from the published block. None: test_published.py has that
# variant's multiply-adds to the last digit.
SIZES = {
    "nfnet_f0": (71.5, 9.5),
    "nfnet_f1": (132.6, None),
    "nfnet_f2": (193.8, None),
    "nfnet_f3": (254.9, None),
    "nfnet_f4": (316.1, None),
    "nfnet_f5": (377.2, None),
    "nfnet_f6": (438.4, None),
    "nfnet_f7": (499.5, None),
    "nfnet_f0_plus": (119.2, None),
    "nfnet_f1_plus": (221.2, None),
    "nfnet_f2_plus": (323.1, 43.4),
    "nfnet_f3_plus": (425.1, None),
    "nfnet_f4_plus": (527.0, None),
    "nfnet_f5_plus": (629.0, 84.1),
    "nfnet_f6_plus": (730.9, 97.6),
    "nfnet_f7_plus": (832.9, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_equal_the_printed_ones(name: str) -> None:
    parameters, at_224 = SIZES[name]
    with torch.device("meta"):
        model = nfnet.create_model(name)
    assert round(count_parameters(model) / 1e6, 1) == parameters
    if at_224 is not None:
        assert round(multiply_adds(model, 224) / 1e9, 1) == at_224


def test_the_table_holds_every_nfnet() -> None:
    assert {*SIZES, "nfnet_tiny"} == {name for name in nfnet.list_models() if name.startswith("nfnet")}


@pytest.mark.parametrize("layers", [50, 101, 152])
def test_an_nf_resnet_is_a_resnet_with_one_more_gain_a_block(layers: int) -> None:
    # A convolution's gain and bias stand where torchvision's batch normalisation has weight and bias.
    from torchvision.models import get_model

    with torch.device("meta"):
        ours, theirs = nfnet.create_model(f"nf_resnet{layers}"), get_model(f"resnet{layers}")
    assert count_parameters(ours) == count_parameters(theirs) + len(ours.blocks)
    # They place the stride on the 3x3 convolution too, and so the multiply-adds are equal as well.
    assert multiply_adds(ours, 224) == multiply_adds(theirs, 224)


def test_the_released_families_are_whole() -> None:
    names = [*(f"nf_resnet{n}" for n in (50, 101, 152, 200, 288)), *(f"nf_regnet_b{n}" for n in range(9))]
    assert {*names, "nf_resnet_tiny", "nf_regnet_tiny"} == {
        name for name in nfnet.list_models() if name.startswith("nf_")
    }


def test_a_plus_sign_names_the_plus_variant() -> None:
    assert get_variant("nfnet_f4+") is get_variant("nfnet_f4_plus")


def test_counting_leaves_the_model_as_it_is() -> None:
    model = nfnet.create_model("nfnet_tiny", num_classes=10, in_chans=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert multiply_adds(model, 32) > 0 and model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
