"""torch's allocator of a card's memory is set up before its first use, and the user's own setting stays."""

import os

import pytest
import torch

from ochat.distributed import processes


@pytest.mark.parametrize("given", [None, *processes.ALLOCATOR])
def test_segments_grow_unless_the_environment_says_otherwise(monkeypatch, given):
    at_first_use = {}
    for name in processes.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: at_first_use.update(os.environ))
    try:
        assert processes.select_device("cuda") == torch.device("cuda", 0)
    finally:
        os.environ.pop(processes.ALLOCATOR[0], None)
    seen = {name: at_first_use[name] for name in processes.ALLOCATOR if name in at_first_use}
    assert seen == ({given: "max_split_size_mb:64"} if given else {processes.ALLOCATOR[0]: "expandable_segments:True"})
