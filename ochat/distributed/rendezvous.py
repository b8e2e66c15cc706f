"""Where the processes of one start of a run meet: a store of their own.

    store = meet()   (under torchrun; every rank calls it)
torchrun keeps one store for all its restarts, in which the addresses and NCCL ids of processes that are gone still
stand. So the first rank hands a new name to each process that is there now, and all they write goes under that name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ochat.errors import RanksError

POLL_S = 0.05
START_S = 600.0  # machines of one job may start far apart


def meet() -> Store:
    """A store that the processes of this start share, and nobody before or after them.

    Raises: RanksError naming who has not come after START_S.
    """
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
    name = _invite(store, world) if rank == 0 else _accept(store, rank)
    return PrefixStore(f"ochat/{name}", store)


def _invite(store: Store, world: int) -> str:
    """The first rank's part: answers every call with the name, until each rank has said that it heard."""
    name, missing = uuid.uuid4().hex, set(range(1, world))
    deadline = time.monotonic() + START_S
    while missing:
        if time.monotonic() > deadline:
            raise RanksError(_absent(sorted(missing)))
        for rank in sorted(missing):
            if store.check([_heard(name, rank)]):
                missing.discard(rank)
            elif store.check([_call(rank)]):  # perhaps that of a process which is gone: nobody reads the answer
                store.set(_answer(store.get(_call(rank)).decode()), name)
        time.sleep(POLL_S)
    return name


def _accept(store: Store, rank: int) -> str:
    """The other ranks' part: calls with a word of its own, and takes the answer to that word alone."""
    word = uuid.uuid4().hex
    store.set(_call(rank), word)
    try:
        name = store.get(_answer(word)).decode()
    except RuntimeError:  # of the store: the time is up
        raise RanksError(_absent([0])) from None
    store.set(_heard(name, rank), "")
    return name


def _call(rank: int) -> str:
    return f"ochat/call/{rank}"


def _answer(word: str) -> str:
    return f"ochat/answer/{word}"


def _heard(name: str, rank: int) -> str:
    return f"ochat/heard/{name}/{rank}"


def _absent(ranks: list[int]) -> str:
    return (
        f"waited {START_S:.0f} s for rank {', '.join(map(str, ranks[:16]))}"
        f"{' ...' * (len(ranks) > 16)} to start; look for an error in what those processes or their machines say"
    )
