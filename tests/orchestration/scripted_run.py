"""A run without a network to train: the real readers (console, spool, uploader) are given STEPS records.

python scripted_run.py OUT URI FIRST LAST PAUSE_S: 10 points a step; steps after FIRST, so FIRST > 0 is a resumed run.
"""

import sys
import time

from orchestration.run.record_readers import Readers
from pipeline.configuration import to_dict
from pipeline.recipes import get
from pipeline.records import Finished, Started, Step


def main(out: str, uri: str, first: int, last: int, pause_s: float) -> None:
    run = get("nfnet_tiny_glyphs")
    readers = Readers(run, out, uri)
    readers.read(
        Started(
            step=first,
            run_name="scripted",
            run_dir=out,
            total_steps=last,
            total_samples=last * 64,
            samples_per_epoch=640,
            steps_per_epoch=10.0,
            dropped_samples=0,
            global_batch=64,
            micro_batch=64,
            accumulation=1,
            num_ranks=1,
            num_parameters=1000,
            device="cpu",
            zero_stage=0,
            precision="fp32",
            resumed_from=None,
            config=to_dict(run),
            config_digest="c0ffee",
            dataset_digest="da7a",
        )
    )
    for number in range(first + 1, last + 1):
        readers.read(
            Step(
                step=number,
                num_updates=1,
                samples=number * 64,
                epoch=number / 10,
                loss=1000.0 / number,
                accuracy=0.5,
                learning_rate=0.1,
                clipped_share=0.2,
                gradient_norm=1.5,
                images_per_s=100.0,
                flops_share=0.4,
                data_wait_s=0.0,
                step_s=0.6,
                remaining_s=1.0,
            )
        )
        time.sleep(pause_s)
    readers.read(Finished(step=last, checkpoint=None, samples=last * 64, seconds_s=1.0, evaluation={"top1": 0.5}))
    readers.close(failed=None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
