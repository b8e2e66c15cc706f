"""What one model makes of the conversations: its states in each view, and how far apart the classes lie there.

states = views(model, reader, sample, "GPT4", tokenizer, advance)
{view: numbers(states[view], sample, distance="cosine", num_permutations=200, seed=0) for view in VIEWS}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.evaluate.represent import plane, states
from ochat.evaluate.represent.plane import Distance
from ochat.evaluate.represent.probe import probe
from ochat.evaluate.represent.readers import Reader
from ochat.evaluate.represent.sample import Sample
from ochat.model.transformer import Transformer
from ochat.text.tokenizer import Tokenizer

# under which prefixes a conversation is read, and which of its tokens the mean is over
VIEWS = ("own_all", "own_answers", "one_all", "one_answers", "words")
Floats = NDArray[np.float32]


def views(
    model: Transformer,
    reader: Reader,
    sample: Sample,
    one_prefix: str,
    tokenizer: Tokenizer,
    advance: Callable[[int], object] = lambda num_conversations: None,
) -> dict[str, Floats]:
    """The sample's states (n, H) in each of VIEWS. Costs: a forward pass of all conversations under their own prefixes,
    and one under the one prefix; without the second where prefixes name no class."""
    own, one = sample.written(one_prefix, reader.template, tokenizer)
    of_own = states.pooled(model, own, advance)
    of_one = states.pooled(model, one, advance) if reader.names_classes else of_own
    found = {f"own_{tokens}": of_own[tokens] for tokens in states.TOKENS}
    found |= {f"one_{tokens}": of_one[tokens] for tokens in states.TOKENS}
    return found | {"words": states.words(model, own)}


def numbers(found: Floats, sample: Sample, *, distance: Distance, num_permutations: int, seed: int) -> dict[str, Any]:
    """Silhouette of the states and of their PCA, the PCA's shares of the variance, and the probe: plain data."""
    points, explained = plane.pca(found)
    probed = probe(found, sample.labels, sample.prompts, num_permutations=num_permutations, seed=seed)
    return {
        "silhouette": plane.silhouette(found, sample.labels, distance),
        "silhouette_pca": plane.silhouette(points, sample.labels, "euclidean"),
        "pca_explained": explained,
        "probe": asdict(probed) | {"interval": list(probed.interval)},
    }
