"""Trunks as networks of a run: options with types, refusals in one sentence."""

import pytest

from nfnet.normalizers.registry import list_methods
from pipeline.errors import UserError
from pipeline.models import trunks
from pipeline.models.backbone import ModelConfig, build_model


def test_options_have_the_types_of_trunk_and_method() -> None:
    config = ModelConfig(
        name="trunk:resnet_v2_tiny",
        options={"method": "group_norm", "groups": "4", "widths": "[8, 8, 16]", "drop_rate": "0.1"},
    )
    assert config.options == {"method": "group_norm", "groups": 4, "widths": (8, 8, 16), "drop_rate": 0.1}
    network, _ = build_model(config, 3, seed=0)
    assert network.head.out_features == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("method", list_methods())
def test_every_setting_of_every_method_has_a_type(method: str) -> None:
    from dataclasses import asdict

    from nfnet.normalizers.registry import make_method

    settings = asdict(make_method(method))
    assert trunks.typed_options({"method": method, **{k: str(v) for k, v in settings.items()}}) == {
        "method": method,
        **settings,
    }


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("trunk:resnet", {}, "no trunk 'resnet'; the nearest names are"),
        ("trunk:vgg_tiny", {"method": "fixup"}, "fixup changes residual branches, and this trunk has none"),
        ("trunk:resnet_v2_tiny", {"method": "group_norm", "groups": "5"}, "5 groups do not divide 32 channels"),
        ("trunk:resnet_v2_tiny", {"method": "group_norms"}, "model.options.method"),
        (
            "trunk:resnet_v2_tiny",
            {"method": "layer_norm", "stat_group": "2"},
            "no 'stat_group' with the method layer_norm",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_model(ModelConfig(name=name, options=options), 4, seed=0)


def test_a_batch_of_one_is_refused_for_batch_statistics() -> None:
    network = trunks.make("trunk:resnet_v2_tiny", 2, {"method": "batch_norm"})
    with pytest.raises(UserError, match="batch_norm: statistics over one sample say nothing"):
        trunks.check_batch(network, 1)
    trunks.check_batch(network, 2)
