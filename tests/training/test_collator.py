"""The samples of a step and their noise."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from prime_v2.data.packing import TrainingOrder
from prime_v2.training.trainer import Collator


def batches_of_steps(workers: int, micro: int, processes: int) -> list[dict[int, tuple]]:
    """For each step of 8 samples, what each sample number comes with."""
    order = TrainingOrder(torch.arange(33 * 5).view(33, 5).numpy(), 6 * 8, seed=3)
    collator = Collator(8, 3, 0.5, traced=True)
    steps: list[dict[int, tuple]] = [{} for _ in range(6)]
    for process in range(processes):
        loader = DataLoader(order, batch_size=micro, num_workers=workers, collate_fn=collator)
        if processes > 1:
            loader = prepare_data_loader(loader, num_processes=processes, process_index=process)
        for number, batch in enumerate(loader):
            names = ("input_ids", "labels", "noise_keys", "noise_levels")
            step = steps[number * micro * processes // 8]
            for i, sample in enumerate(batch["sample_number"].tolist()):
                assert sample not in step
                step[sample] = tuple(batch[name][i].tolist() for name in names)
    return steps


@pytest.mark.parametrize(("workers", "micro", "processes"), [(2, 8, 1), (0, 2, 1), (0, 4, 2), (2, 1, 2)])
def test_samples_and_noise_of_a_step_do_not_depend_on_workers_split_or_processes(workers, micro, processes):
    expected = batches_of_steps(0, 8, 1)
    assert [sorted(step) for step in expected] == [list(range(8 * i, 8 * i + 8)) for i in range(6)]
    assert batches_of_steps(workers, micro, processes) == expected
