"""What each of two processes runs in test_resume.py: a stream unbroken, stopped and continued, and a loss of NaN.

torchrun --nproc_per_node 2 tests/two_process_stream.py TEXT TOKENIZER FOLDER
"""

import sys
from pathlib import Path

import torch
from tiny_runs import MODEL, TINY

from prime_v2.data import preparation as prepare
from prime_v2.data.documents import read_documents
from prime_v2.tokenization import plain_text
from prime_v2.training import run as training

STOP_AT, NAN_AT = 5, 3


def main(text: str, tokenizer: str, folder: Path) -> None:
    prepare.read_documents = lambda source, *, streaming, **options: read_documents(text)
    plain_text.TEXTS_PER_BATCH = 2
    options = ["--data", "a_hub_set", "--streaming", "--tokenizer", tokenizer, *TINY.split()]

    def run(name: str) -> int:
        return training.main([*options, "--output_dir", str(folder / name), *MODEL, "attention_dropout=0.1"])

    assert run("unbroken") == 0
    trainer = training.DiffusionTrainer
    step, loss = trainer.training_step, trainer.compute_loss

    def stopping(self, *arguments, **kwargs):
        if self.state.global_step >= STOP_AT:
            raise KeyboardInterrupt
        return step(self, *arguments, **kwargs)

    trainer.training_step = stopping
    assert run("stopped") == 130
    trainer.training_step = step
    assert run("stopped") == 0

    def broken(self, *arguments, **kwargs):
        bad = self.args.process_index == 1 and self.state.global_step == NAN_AT
        return loss(self, *arguments, **kwargs) * (torch.nan if bad else 1)

    trainer.compute_loss = broken
    assert run("nan") == 2


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
