"""What has ended a process: what a signal means, and what to do about it; which errors come of the machine."""

import re
import signal

# What a signal that nobody has caught means, and what to do.
SIGNALS = {
    signal.SIGKILL: (
        "somebody killed it, or the machine had no memory left; no record of the latter can be read here",
        "if nobody did, have it take less memory: a smaller train.micro_batch_size or data.workers; dmesg may say more",
    ),
    signal.SIGSEGV: (
        "native code read or wrote memory that is not its own",
        "the stack in its log shows which; suspect extensions of torch, the driver, and the machine's memory",
    ),
    signal.SIGBUS: (
        "a file that it had in memory has shrunk, or there was no room for a page of one: often /dev/shm is too small",
        "give the container more shared memory (--ipc=host or --shm-size), or set data.workers=0",
    ),
    signal.SIGABRT: ("native code gave up", "the last lines of its log say why"),
    signal.SIGILL: ("an instruction this processor does not have", "install packages that were built for it"),
    signal.SIGFPE: ("an arithmetic error in native code", "the stack in its log shows where"),
    signal.SIGTERM: ("somebody asked it to end before it could listen", "start it again: the same command goes on"),
}
OUT_OF_MEMORY = (
    "take less memory: a smaller train.micro_batch_size, data.workers or data.global_batch_size; or ask for more; "
    "train.strategy=fsdp shares weights and optimizer among ranks"
)

# As CUDA, NCCL, NVIDIA's driver and we say it. A device-side assert is not among it: that is an index of the user's.
_OF_THE_MACHINE = re.compile(
    r"uncorrectable (ECC|NVLink) error|hardware (stack )?error|unspecified launch failure|GPU is lost|\bXid\b"
    r"|fallen off the bus|CUDA error: (unknown|initialization) error|CUDA error: system not yet initialized"
    r"|CUDA-capable device|CUDA unknown error|error from cudaGetDeviceCount|nccl(UnhandledCuda|System|Remote|Internal)"
    r"Error|local rank \d+ has no GPU|train\.device is cuda, but this machine|^node \S+ does not see "
)


def of_the_machine(message: str) -> bool:
    """Whether an error is one that hardware, its driver or its mounts make, so that another node might be spared it."""
    return bool(_OF_THE_MACHINE.search(message))


def killed(number: int | None, evidence: str | None) -> tuple[str, str, str]:
    """(kind, cause, remedy) of a process that a signal has ended; `evidence` that it was for want of memory."""
    if number is None:
        return "death", "was killed or crashed, and torchrun does not say how", "see its log, below"
    name = signal.Signals(number).name
    if number == signal.SIGKILL and evidence:
        return "out of memory", f"was killed by the kernel: out of memory ({evidence})", OUT_OF_MEMORY
    meaning, remedy = SIGNALS.get(signal.Signals(number), ("see `man 7 signal`", "see its log, below"))
    return name, f"was killed by {name}: {meaning}", remedy
