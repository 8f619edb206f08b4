"""What every method of the registry keeps, on a site of its own and in a small trunk. A new file is tested here unasked."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nfnet.normalizers.method import METHODS, ConvSite, Method, NormSite
from nfnet.normalizers.registry import get_method, list_methods, make_method, page
from nfnet.optim.param_groups import assign
from nfnet.trunks.networks import create

ROOT = Path(__file__).parents[3]
NAMES = list_methods()
PARTS = ["Idea", "Formula", "Training and evaluation", "When", "Source", "Uncertainty"]
SMALL = {"depths": (1, 1, 1), "widths": (8, 8, 16)}


def made(name: str) -> Method:
    """With groups of 4 samples where it has groups."""
    return make_method(name, **({"stat_group": 4} if hasattr(get_method(name), "stat_group") else {}))


def layers(name: str, channels: int = 8) -> tuple[nn.Sequential, Method]:
    """conv, norm-act, conv, norm-act: the second one's statistics can be predicted."""
    torch.manual_seed(0)
    method = made(name)
    first = method.conv(ConvSite(in_channels=channels, out_channels=channels, kernel=3))
    one = method.norm_act(NormSite(channels=channels, activation="silu", after=(first,)))
    second = method.conv(ConvSite(in_channels=channels, out_channels=channels, kernel=1, reads=one))
    two = method.norm_act(NormSite(channels=channels, activation="silu", after=(second,)))
    return nn.Sequential(first, one, second, two, method.branch_end()), method


def images(num: int = 8, channels: int = 8, px: int = 4) -> torch.Tensor:
    return torch.randn(num, channels, px, px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_type_stay(name: str) -> None:
    net, _ = layers(name)
    for dtype in (torch.float32, torch.bfloat16):
        assert net.to(dtype)(images().to(dtype)).shape == (8, 8, 4, 4)
        assert net(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near(name: str) -> None:
    net, _ = layers(name)
    torch.manual_seed(2)
    exact = net(images())
    net, _ = layers(name)
    torch.manual_seed(2)  # the same dropout
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = net(images()).float()
    assert float((near - exact).detach().abs().mean()) <= 0.02 * float(exact.detach().abs().mean()) + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    net, method = layers(name, channels=4)
    net = net.double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    x = images(4, 4, 3).double().requires_grad_()

    def loss(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        state = {**{k: v.clone() for k, v in before.items()}, **dict(zip(parameters, weights, strict=True))}
        return torch.func.functional_call(net, state, (x,)).pow(3).mean()

    weights = list(parameters.values())
    if not method.exact_gradients:  # of the images they are exact all the same
        assert torch.autograd.gradcheck(lambda x: loss(x, *parameters.values()), (x,), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(loss, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_knows_its_neighbours_only_where_the_method_says_so(name: str) -> None:
    net, method = layers(name)
    x = images()
    torch.manual_seed(0)
    together = net(x)[:4]
    x = torch.cat([x[:2], 3 * x[4:] + 1, x[6:]])  # others in the same group of four
    torch.manual_seed(0)
    apart = net(x)[:2]
    same = torch.equal(together[:2], apart) or torch.allclose(together[:2], apart, atol=1e-6)
    assert same == (method.batch_free or name == "last_layer_norm")


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_computes_what_training_does_where_the_method_says_so(name: str) -> None:
    net, method = layers(name)
    head = method.before_head(8)
    torch.manual_seed(0)
    train = head(net(images()).mean((2, 3)))
    evaluated = head.eval()(net.eval()(images()).mean((2, 3)))
    assert torch.allclose(train, evaluated, atol=1e-6) == method.eval_is_train


@pytest.mark.parametrize("name", NAMES)
def test_a_trunk_trains_and_every_parameter_has_one_rule(name: str) -> None:
    torch.manual_seed(0)
    net = create("resnet_v2_tiny", 4, method=made(name), **SMALL)
    rules = assign(net.named_parameters())
    assert all(rule.is_head == n.startswith("head.") for n, rule in rules.items())
    assert all(v.dim() for v in net.state_dict().values()), "DeepSpeed cannot view zero dimensions"
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    x, y = images(16, 3, 16), torch.arange(16) % 4
    losses = []
    for step in range(12):
        loss = nn.functional.cross_entropy(net(x), y)
        net.zero_grad()
        loss.backward()
        if step == 3:
            idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert idle == []
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_on_the_meta_device_and_a_copy_are_had(name: str) -> None:
    import copy

    with torch.device("meta"):
        create("resnet_v2_tiny", 4, method=made(name), **SMALL)
    net = create("resnet_v2_tiny", 4, method=made(name), **SMALL)
    net(images(8, 3, 16))
    other = copy.deepcopy(net).eval()
    torch.testing.assert_close(other(images(8, 3, 16)), net.eval()(images(8, 3, 16)))


@pytest.mark.parametrize("name", NAMES)
def test_its_layers_are_one_graph(name: str) -> None:
    """Without a break, forwards and backwards; the trunk as a whole is compiled by the next test, which is slow."""
    torch._dynamo.reset()
    net, _ = layers(name, channels=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(0)
    plain = net(images(channels=4))
    net.load_state_dict(before)
    torch.manual_seed(0)
    graph = torch.compile(net, fullgraph=True, backend="eager")(images(channels=4))
    torch.testing.assert_close(graph, plain, atol=1e-5, rtol=1e-4)
    graph.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    net = create("resnet_v2_tiny", 4, method=made(name), **SMALL)
    torch.manual_seed(0)
    plain = net(images(8, 3, 16))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled(images(8, 3, 16)).sum().backward()
    if not getattr(made(name), "drop_rate", 0) and name != "batch_renorm":  # its limits have moved on by a step
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(images(8, 3, 16)), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_its_page_has_every_part(name: str) -> None:
    assert re.findall(r"^([A-Z][a-z ]+):", page(name).split("\n\n", 1)[1], re.M) == PARTS


KNOW_NO_METHOD = (
    *("nfnet/normalizers", "nfnet/trunks", "pipeline/models", "transfer/lab", "transfer/measurement", "transfer/sweep"),
    "orchestration/commands",
)
DEFAULTS = {"none", "batch_norm"}
"""The default of trunks, and a word of its own."""


def test_no_other_file_names_a_method() -> None:
    """A stranger adds one file: what is registered in it is written nowhere else, and nobody imports it."""
    words: dict[Path, set[str]] = {}
    for path in (p for folder in KNOW_NO_METHOD for p in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        words[path] = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        words[path] |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    for path in ROOT.glob("nfnet/normalizers/*/*.py"):
        own = set(re.findall(r'@method\("(\w+)"\)', path.read_text()))
        if own:
            own |= {".".join(path.relative_to(ROOT).with_suffix("").parts)}
            assert {
                str(p): found & own - DEFAULTS for p, found in words.items() if p != path and found & own - DEFAULTS
            } == {}


def test_unknown_names_and_settings_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no method 'bach_norm'; the nearest names are batch_norm"):
        make_method("bach_norm")
    with pytest.raises(ValueError, match="no setting 'stat_groups'; it has stat_group"):
        make_method("batch_norm", stat_groups=2)
    assert set(METHODS) == set(NAMES)
