"""Train a model of any family: MDM-Prime-v2, MDM-Prime, MDM, ARM, uniform-state or interpolating diffusion.

    accelerate launch train.py                                              # CPU: configs/tiny.yaml, a small real run
    accelerate launch train.py --config configs/owt.yaml                    # one GPU
    accelerate launch --num_processes 8 train.py --config configs/slimpajama_1b.yaml    # eight GPUs

Options: those of transformers.TrainingArguments and of RunOptions in prime_v2.training.options; `--config
FILE.yaml` holds any of them, flags go on top. `--family` chooses the family, `--model key=value ...` sets fields of
its configuration. The same command again continues a stopped run.
"""

import sys

from prime_v2.commands.process import bound_spinning, quiet_interrupt

if __name__ == "__main__":
    bound_spinning()  # read by OpenMP when torch is loaded
    with quiet_interrupt():
        from prime_v2.training.run import main

    sys.exit(main(description=__doc__))
