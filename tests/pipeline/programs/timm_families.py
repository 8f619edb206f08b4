"""Run by test_timm_families.py: a network of each family of timm's takes three steps, is resumed, and is handed back to timm.

A line of JSON a family: name, pixels, options, and what went wrong, or nothing.
"""

import json
import sys
import time
from typing import Any

import torch
from torch import nn

from pipeline.distributed import World, join
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.models import timm_models
from pipeline.supervision.process_exit import end

FAMILIES = """
beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121
dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout maxvit_pico_rw_256
poolformerv2_s12 gmlp_ti16_224 lcnet_035 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap
nest_tiny nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9
res2net50_14w_8s resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41
xcit_nano_12_p16_224 nasnetalarge pnasnet5large
""".split()  # noqa: SIM905
CLASSES, BATCH = 5, 2


def fitting(name: str) -> tuple[int, dict[str, Any]]:
    """Pixels and options that the network takes: 64 where it does, else 64 as its own size, else its own size."""
    with torch.device("meta"):
        own = timm_models._create(f"timm:{name}", num_classes=0).pretrained_cfg["input_size"][-1]  # type: ignore[index]
    last = RuntimeError("")
    for px, options in ((64, {}), (64, {"img_size": 64}), (own, {})):
        try:
            with torch.device("meta"):
                timm_models.make(f"timm:{name}", CLASSES, options).eval()(torch.zeros(1, 3, px, px))
            return px, options
        except Exception as error:  # whatever its code meets
            last = RuntimeError(str(error))
    raise last


def step(engine: Engine, number: int, px: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(BATCH, 3, px, px, generator=generator)
    torch.manual_seed(number)
    engine.forward_backward(images, torch.randint(CLASSES, (BATCH,), generator=generator), is_last=True)
    if not engine.update(0.01).applied:
        raise RuntimeError("an update was not finite")


def check(me: World, name: str, px: int, options: dict[str, Any]) -> None:
    def start() -> tuple[nn.Module, Engine]:
        torch.manual_seed(0)
        network = timm_models.make(f"timm:{name}", CLASSES, options)
        optim = OptimConfig(learning_rate=0.01)
        config = EngineConfig(parity_check=False)
        return network, Engine(network, optim=optim, config=config, world=me, micro_batch=BATCH, accumulation=1)

    _, engine = start()
    step(engine, 0, px)
    step(engine, 1, px)
    saved = {key: tensor.clone() for key, tensor in engine.local_fragments().items()}
    step(engine, 2, px)
    after = {key: tensor.clone() for key, tensor in engine.local_fragments().items()}
    engine.close()
    other, again = start()
    again.restore(
        ("weights", "momentum"),
        lambda pieces: [p.values.copy_(saved[f"{p.kind}/{p.name}@0"].view_as(p.values)) for p in pieces] and None,
        2,
    )
    step(again, 2, px)
    different = [k for k, t in again.local_fragments().items() if not torch.equal(t, after[k])]
    again.close()
    if different:
        raise RuntimeError(f"resumed otherwise: {different[0]} and {len(different) - 1} more")
    whole, _ = timm_models.as_timm(f"timm:{name}", other, options)
    images = torch.randn(1, 3, px, px)
    with torch.no_grad():
        expected, found = other.eval()(images), whole(images)
    if not torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7):
        raise RuntimeError(f"timm's logits differ by {float((found - expected).abs().max()):.1e}")


def main() -> None:
    torch.set_num_threads(1)
    me = join()
    with open(sys.argv[1], "a") as out:
        for name in sys.argv[2:] or FAMILIES:
            begin_s = time.process_time()
            row: dict[str, Any] = {"name": name, "problem": ""}
            try:
                px, options = fitting(name)
                row |= {"px": px, "options": options}
                check(me, name, px, options)
            except Exception as error:
                row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(json.dumps({**row, "cpu_s": round(time.process_time() - begin_s, 1)}), file=out, flush=True)


if __name__ == "__main__":
    main()
    end(0)
