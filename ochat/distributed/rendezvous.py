"""Give each launch its own key prefix in torchrun's store, which outlives restarts.

    store = launch_store()   (under torchrun; every rank calls it)
The store still holds addresses and NCCL ids of processes of earlier launches. So rank 0 gives a fresh launch id to each
process that is alive now, and all keys of this launch carry that prefix.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ochat.errors import RanksError

KEYS = "ochat"
POLL_S = 0.05
START_S = 600.0  # machines of one job may start far apart


def launch_store() -> Store:
    """A store that only the processes of this launch share.

    Raises: RanksError naming the ranks that have not arrived after START_S.
    """
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
    launch_id = _hand_out_id(store, world) if rank == 0 else _request_id(store, rank)
    return PrefixStore(f"{KEYS}/{launch_id}", store)


def _hand_out_id(store: Store, world: int) -> str:
    """Rank 0: answers every request with the launch id until each rank has confirmed it."""
    launch_id, missing = uuid.uuid4().hex, set(range(1, world))
    deadline = time.monotonic() + START_S
    while missing:
        if time.monotonic() > deadline:
            raise RanksError(_absent(sorted(missing)))
        for rank in sorted(missing):
            if store.check([f"{KEYS}/confirmed/{launch_id}/{rank}"]):
                missing.discard(rank)
            elif store.check([request := f"{KEYS}/request/{rank}"]):
                # may be that of a process which is gone: nothing reads the reply
                store.set(f"{KEYS}/reply/{store.get(request).decode()}", launch_id)
        time.sleep(POLL_S)
    return launch_id


def _request_id(store: Store, rank: int) -> str:
    """Other ranks: requests with a nonce, and accepts the reply to that nonce only."""
    nonce = uuid.uuid4().hex
    store.set(f"{KEYS}/request/{rank}", nonce)
    try:
        launch_id = store.get(f"{KEYS}/reply/{nonce}").decode()
    except RuntimeError:  # the store's time-out
        raise RanksError(_absent([0])) from None
    store.set(f"{KEYS}/confirmed/{launch_id}/{rank}", "")
    return launch_id


def _absent(ranks: list[int]) -> str:
    return (
        f"waited {START_S:.0f} s for rank {', '.join(map(str, ranks[:16]))}"
        f"{' ...' * (len(ranks) > 16)} to start; look for an error in the output of those processes or their machines"
    )
