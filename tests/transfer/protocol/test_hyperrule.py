"""BiT-HyperRule: the numbers that google-research/big_transfer's bit_hyperrule.py prints, and where the paper differs."""

import pytest

from nfnet.optim.schedule import step_rate
from transfer.protocol.method_settings import HyperruleSettings
from transfer.protocol.recipes.bit_hyperrule import HyperRule, hyperrule

# Rates of the published get_lr(step, dataset_size) around every boundary, as it returned them.
SMALL = {0: 0.0, 1: 3e-5, 99: 0.00297, 100: 0.003, 199: 0.003, 200: 0.003, 201: 3e-4, 300: 3e-4, 301: 3e-5, 400: 3e-5}
SMALL |= {401: 3e-6, 499: 3e-6}
MIDDLE = {0: 0.0, 1: 6e-6, 499: 0.002994, 500: 0.003, 2999: 0.003, 3000: 0.003, 3001: 3e-4, 6000: 3e-4, 6001: 3e-5}
MIDDLE |= {9000: 3e-5, 9001: 3e-6, 9999: 3e-6}
LARGE = {0: 0.0, 499: 0.002994, 500: 0.003, 6000: 0.003, 6001: 3e-4, 12_000: 3e-4, 12_001: 3e-5, 18_000: 3e-5}
LARGE |= {18_001: 3e-6, 19_999: 3e-6}


def rate_of(rule: HyperRule, step: int) -> float:
    return step_rate(step, warmup_steps=rule.warmup_steps, peak=rule.learning_rate, decay_steps=rule.decay_steps)


@pytest.mark.parametrize(
    ("num_examples", "steps", "rates"),
    [
        (1, 500, SMALL),
        (19_999, 500, SMALL),
        (20_000, 10_000, MIDDLE),
        (499_999, 10_000, MIDDLE),
        (500_000, 20_000, LARGE),
        (1_281_167, 20_000, LARGE),
    ],
)
def test_the_code_variant_equals_the_published_code_at_every_boundary(num_examples, steps, rates) -> None:
    rule = hyperrule(num_examples, 224 * 224, variant="code")
    assert rule.steps == steps and max(rates) == steps - 1
    for step, rate in rates.items():
        assert rate_of(rule, step) == pytest.approx(rate, rel=1e-12), step


def test_the_paper_variant_falls_at_30_60_and_90_percent() -> None:
    for num_examples, steps in ((19_999, 500), (20_000, 10_000), (500_000, 20_000)):
        rule = hyperrule(num_examples, 224 * 224, variant="paper")
        assert rule.decay_steps == tuple(round(steps * share) for share in (0.3, 0.6, 0.9))
        assert rate_of(rule, rule.decay_steps[0]) == 0.003 and rate_of(rule, rule.decay_steps[2] + 1) == pytest.approx(
            3e-6
        )


def test_the_variants_differ_in_small_schedules_and_large_images_only() -> None:
    different = {}
    for num in (19_999, 20_000, 500_000):
        for area in (96 * 96 - 1, 96 * 96):
            paper, code = (vars(hyperrule(num, area, variant=v)) for v in ("paper", "code"))
            different[num, area] = {k for k in paper if paper[k] != code[k]}
    px = {"resize_px", "crop_px"}
    assert different == {
        (19_999, 9215): {"decay_steps"},
        (19_999, 9216): {"decay_steps"} | px,
        (20_000, 9215): set(),
        (20_000, 9216): px,
        (500_000, 9215): set(),
        (500_000, 9216): px,
    }


def test_sizes_mixup_and_what_is_the_same_for_all() -> None:
    cifar, pets = hyperrule(50_000, 32 * 32, variant="code"), hyperrule(3680, 350 * 500, variant="paper")
    assert (cifar.resize_px, cifar.crop_px, cifar.mixup_alpha) == (160, 128, 0.1)
    assert (pets.resize_px, pets.crop_px, pets.mixup_alpha) == (448, 384, 0.0)
    assert hyperrule(3680, 350 * 500, variant="code").crop_px == 480
    for rule in (cifar, pets):
        assert (rule.learning_rate, rule.momentum, rule.weight_decay) == (0.003, 0.9, 0.0)
    assert HyperruleSettings(split="full").batch == 512


def test_nonsense_is_refused() -> None:
    for num, area, variant in ((0, 1, "code"), (1, 0, "code"), (1, 1, "tf2")):
        with pytest.raises(ValueError, match="no recipe"):
            hyperrule(num, area, variant=variant)
