"""What a signal that has ended a process means, in words, and what to do about it."""

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


def killed(number: int | None, evidence: str | None) -> tuple[str, str, str]:
    """(kind, cause, remedy) of a process that a signal has ended; `evidence` that it was for want of memory."""
    if number is None:
        return "death", "was killed or crashed, and torchrun does not say how", "see its log, below"
    name = signal.Signals(number).name
    if number == signal.SIGKILL and evidence:
        return "out of memory", f"was killed by the kernel: out of memory ({evidence})", OUT_OF_MEMORY
    meaning, remedy = SIGNALS.get(signal.Signals(number), ("see `man 7 signal`", "see its log, below"))
    return name, f"was killed by {name}: {meaning}", remedy
