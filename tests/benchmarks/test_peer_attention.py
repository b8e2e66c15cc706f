"""The attention of the peers is the first FlashAttention that works, whatever can be imported."""

import pytest
import torch

from benchmarks import peer_attention

CARD = torch.device("cuda")


def choose(monkeypatch, there, works):
    monkeypatch.setattr(peer_attention, "_is_there", lambda name: name in there)
    monkeypatch.setattr(peer_attention, "_works", lambda name, device: name in works)
    return peer_attention.choose(CARD, otherwise="flex_attention")


@pytest.mark.parametrize(
    ("there", "works", "chosen"),
    [
        ("234", "234", "flash_attention_3"),
        ("24", "24", "flash_attention_2"),
        ("24", "4", "flash_attention_4"),
        ("4", "", "flex_attention"),
        ("", "234", "flex_attention"),
    ],
)
def test_the_first_that_is_there_and_works(monkeypatch, there, works, chosen):
    assert choose(monkeypatch, *({f"flash_attention_{n}" for n in each} for each in (there, works))) == chosen


def test_a_cpu_has_one():
    assert peer_attention.choose(torch.device("cpu"), otherwise="flex_attention") == "sdpa"


def test_what_is_not_installed_is_not_there_and_a_failure_is_an_answer(capsys):
    """No FlashAttention is installed beside the tests; one that is asked for all the same fails, which is printed."""
    pytest.importorskip("transformers")
    assert not any(peer_attention._is_there(name) for name in peer_attention.FLASH)
    assert not peer_attention._works("flash_attention_2", torch.device("cpu"))
    assert "transformers' flash_attention_2 does not work here: ImportError" in capsys.readouterr().out
    assert peer_attention._works("sdpa", torch.device("cpu"))
