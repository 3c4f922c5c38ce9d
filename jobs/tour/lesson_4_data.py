"""Lesson 4: data.

A Dataset knows the samples. A DataLoader makes batches of them.
Run this from the project's root: python jobs/tour/lesson_4_data.py
"""

import os

import torch
from torch.utils.data import DataLoader, Dataset

from toolkit import ElasticDistributedSampler
from toolkit.datasets.digits import Digits


class Squares(Dataset):
    """A Dataset answers two questions: how many samples are there, and what is sample number `index`?"""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, index**2, os.getpid()  # an input, a target, and the process that has read them


def batches(loader):
    return [inputs.tolist() for inputs, _, _ in loader]


# Workers are processes that may import this file again. They must not start the lesson again: hence main().
def main():
    torch.manual_seed(0)  # the same random orders in each run
    data = Squares()
    print("1. len(data) and data[index] are all that a Dataset needs.")
    print("  ", len(data), data[3][:2])
    assert len(data) == 10
    assert data[3][:2] == (3, 9)

    print("2. batch_size=4 puts 4 samples into one tensor. The last batch has what is left.")
    print("  ", batches(DataLoader(data, batch_size=4)))
    assert batches(DataLoader(data, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    print("3. drop_last=True leaves the last batch out if it is not full.")
    print("  ", batches(DataLoader(data, batch_size=4, drop_last=True)))
    assert batches(DataLoader(data, batch_size=4, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    print("4. shuffle=True gives another order in each epoch. An epoch is one pass over all samples.")
    shuffled = DataLoader(data, batch_size=10, shuffle=True)
    (first,), (second,) = batches(shuffled), batches(shuffled)
    print("  ", first)
    print("  ", second)
    assert sorted(first) == sorted(second) == list(range(10))  # each sample once
    assert first != second

    print("5. num_workers=2 reads in two other processes, while this one computes. The batches are the same.")
    with_workers = DataLoader(data, batch_size=4, num_workers=2)
    readers = {pid for _, _, pids in with_workers for pid in pids.tolist()}
    print(f"   This is process {os.getpid()}; the readers were {sorted(readers)}")
    assert len(readers) == 2
    assert os.getpid() not in readers
    assert batches(with_workers) == batches(DataLoader(data, batch_size=4))

    print("6. toolkit's sampler fills every batch. What is missing in the last one comes from the next epoch.")
    digits = Digits()
    sampler = ElasticDistributedSampler(digits, global_batch_size=32)
    loader = DataLoader(digits, batch_size=32, sampler=sampler)
    sizes = [len(labels) for _, labels in loader]
    print(f"   {len(digits)} digits make {len(sizes)} batches of {min(sizes)} to {max(sizes)}")
    assert set(sizes) == {32}
    assert len(sizes) * 32 >= len(digits) > (len(sizes) - 1) * 32

    print("\nWith toolkit: sampler = ElasticDistributedSampler(digits, global_batch_size=32)")
    print("Read next: toolkit/datasets/loader.py")


if __name__ == "__main__":
    main()
