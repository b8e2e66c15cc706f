"""`ochat represent MODEL DATA --compare MODEL`: does a model tell the classes apart inside? A map and numbers.

ochat represent runs/sft data/train-held-out --compare runs/crlft --labels "only SFT" C-RLFT --output map.png map.svg
ochat represent bases/llama2 chats.jsonl --template openchat_v3.2 --compare models/mine --numbers map.json

A conversation is one point: the mean of the last layer's states over its tokens, written as in the model's training,
with its class in the prefixes if the model has classes. This is the paper's figure, and so the default. It shows less
than it seems to: a prefix can tell the class to any model. In the small ablation study (250 conversations of each
class) the classes of an untrained model are further apart (silhouette 0.48, probe accuracy 100 %) than those of C-RLFT
(0.12, 100 %), and leaving the prefixes' own tokens out of the mean does not change that (0.34 and 99.6 %, 0.01 and
75 %). So compare a model with its base and with one without classes, and read the numbers that are always given too: of
all conversations under one prefix, where only the answers differ, and of the answers' words, which need no model.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ochat.console import next_command
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.overrides import at_least

PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "umap": "umap-learn"}
ENDINGS = (".png", ".svg")
LEAST_PERMUTATIONS = 19  # with fewer, no p-value reaches 0.05


@dataclass(frozen=True)
class RepresentOptions:
    """Maps conversations by a model's last layer, and measures how far classes lie apart.

    Several models are compared on the same conversations.
    """

    model: Path  # an exported folder, a run (its newest checkpoint), a checkpoint or a base
    data: Path  # a prepared data set, or a file or folder of conversations as `ochat prepare` reads them
    compare: tuple[Path, ...] = ()  # more models, each a column of the figure: one without classes, or the base
    output: tuple[Path, ...] = ()  # draw the map into these files, PNG or SVG by their ending
    numbers: Path | None = None  # write the numbers and the map's points to this JSON file
    labels: tuple[str, ...] = ()  # the models' names in figure and table, in order; left out: their folders' names
    per_class: int = 500  # conversations of each class; the smallest class may have fewer, then all have as few
    classes: tuple[str, ...] = ()  # left out: all classes of the data
    # the class in the prefixes of a conversation on the map: its own, as in training and the paper's figure; or one
    # class for all, so that only the answers tell classes apart. Numbers are given of both
    prefix: Literal["own", "one"] = "own"
    # the tokens whose states (of the last layer, after the final norm) are averaged on the map: all, as in the paper's
    # figure; or those of the answers, into which attention carries the class from the prefixes as well. Numbers are
    # given of both
    tokens: Literal["all", "answers"] = "all"
    one_prefix: str | None = None  # the class of the one prefix; left out: the one that the models answer as
    distance: Literal["cosine", "euclidean"] = "cosine"  # of states, for the silhouette and UMAP
    permutations: int = 200  # of labels, to test the probe's accuracy
    seed: int = 0  # decides the conversations, the folds, the permutations and UMAP
    template: str | None = None  # of models without openchat.json: a template's name or file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of checkpoints of adapters: where their base is now; empty: where the run had it


def main(options: RepresentOptions) -> None:
    """The command `ochat represent`."""
    record = represent(options)
    from ochat.evaluate.represent import show  # torch takes seconds to import; --help does without

    Console(highlight=False).print(show.represent_table(record))
    next_command("ochat eval", options.model, options.data)


def represent(options: RepresentOptions) -> dict[str, Any]:
    """The content of --numbers, after it and the figures are written: how the numbers are made, the sample, and
    `models` (measure.measure).

    Raises: ConfigError, DataError and CheckpointError; before a model is loaded for all that can be known by then.
    """
    _check(options)
    from ochat.evaluate import held_out, intervals
    from ochat.evaluate.represent import compared, probe, show
    from ochat.evaluate.represent.measure import measure
    from ochat.export.open_model import open_model
    from ochat.model.device import find_device

    device, models = find_device(options.device), (options.model, *options.compare)
    labels = options.labels or [source.resolve().name for source in models]
    found, tokenizer = compared.find_models(models, labels, options.template, options.data)
    at_least(options, per_class=compared.LEAST_PER_CLASS)
    conversations = held_out.read_held_out(options.data, found[0].template, tokenizer)
    drawn = compared.draw(conversations, options.classes, options.per_class, options.seed)
    one_prefix = compared.one_prefix(options.one_prefix, found, drawn.classes, tokenizer)
    per_class, view = int((drawn.labels == 0).sum()), f"{options.prefix}_{options.tokens}"
    how = {"view": view, "distance": options.distance, "num_permutations": options.permutations, "seed": options.seed}
    opened = partial(open_model, dtype=options.dtype, device=device, base=options.base)
    record = {
        "data": str(options.data),
        "sample": {"classes": list(drawn.classes), "per_class": per_class, "prompts": int(drawn.prompts.max()) + 1},
        "seed": options.seed,
        "dtype": options.dtype,
        "layer": "last, after the final norm",
        "view": view,
        "one_prefix": one_prefix,
        "distance": options.distance,
        "probe": {
            "method": "logistic regression on standardised states, cross-validated by prompt",
            "folds": probe.FOLDS,
            "penalty": probe.PENALTY,
            "permutations": options.permutations,
            "chance": 1 / len(drawn.classes),
            "interval": {"level": intervals.LEVEL, "method": "Wilson's, of prompts"},
        },
        "models": [measure(partial(opened, each.source), each, drawn, one_prefix, tokenizer, **how) for each in found],
    }
    for path in options.output:  # drawn again for each: a second layout of the same figure moves a little
        show.write_figure(path, record, drawn.labels)
    if options.numbers:
        atomic.write_json(options.numbers, record)
    return record


def _check(options: RepresentOptions) -> None:
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"ochat represent needs {', '.join(missing)}: pip install 'ochat-crlft[report]'")
    num_models = 1 + len(options.compare)
    if options.labels and len(options.labels) != num_models:
        raise ConfigError(f"--labels: {len(options.labels)} for {num_models} models; give one for each")
    at_least(options, seed=0, permutations=LEAST_PERMUTATIONS)
    for path in options.output:
        if path.suffix.lower() not in ENDINGS:
            raise ConfigError(f"--output {path}: expected a name that ends in {' or '.join(ENDINGS)}")
    atomic.check_writable(*options.output, options.numbers)
