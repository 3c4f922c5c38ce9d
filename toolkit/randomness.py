"""Random numbers as functions of what they are for, such as (seed, step, rank): nothing to save, nothing to restore."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: SplitMix64's increment
_MASK = 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit of the value."""
    value = (value + GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive(*values: int) -> int:
    """One 64-bit seed from several integers; another order of them gives another seed."""
    seed = 0
    for value in values:
        seed = mix(seed ^ value)
    return seed


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Set the global generators of Python, NumPy, torch and the device, for code that draws from them."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 80
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is seeded or drawn on the CPU in here, the global generators are afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
