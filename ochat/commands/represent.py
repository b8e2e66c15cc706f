"""`ochat represent MODEL DATA --beside MODEL`: does a model tell the classes apart inside? A map and numbers.

ochat represent runs/sft data/train-held-out --beside runs/crlft --labels "only SFT" C-RLFT --output map.png map.svg
ochat represent bases/llama2 chats.jsonl --template openchat_v3.2 --beside models/mine --numbers map.json

A conversation is one point: the mean of the last layer's states over its tokens, written as the model's training wrote
it: with its class in the prefixes, where the model has classes. That is the paper's figure, and so the default; and it
shows less than it seems to, for a prefix can tell the class to any model. In the small laboratory (250 conversations of
each class) an untrained model's classes lie further apart (silhouette 0.48, a probe tells 100 %) than those of C-RLFT
(0.12, 100 %), and leaving the prefixes' own tokens out of the mean does not mend it (0.34 and 99.6 %, 0.01 and 75 %).
So see a model beside its base and one without classes, and read the numbers that are always given with it: of all
conversations under one prefix, where only the answers can tell, and of the answers' words, which take no model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console

from ochat.console import bar
from ochat.errors import ConfigError
from ochat.evaluate import intervals
from ochat.files import atomic
from ochat.model.device import find_device
from ochat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ochat.evaluate.represent.readers import Reader
    from ochat.evaluate.represent.sample import Sample

PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "umap": "umap-learn"}
ENDINGS = (".png", ".svg")
LEAST_PERMUTATIONS = 19  # with fewer, no p-value reaches 0.05


@dataclass(frozen=True)
class RepresentOptions:
    """Maps conversations by a model's last layer, and measures how far classes lie apart.

    Several models stand side by side, with the same conversations.
    """

    model: Path  # an exported folder, a run (its newest checkpoint), a checkpoint or a base
    data: Path  # a prepared data set, or a file or folder of conversations as `ochat prepare` reads them
    beside: tuple[Path, ...] = ()  # more models, each a column of the figure, such as one without classes, or the base
    output: tuple[Path, ...] = ()  # draw the map into these files, PNG or SVG by their ending
    numbers: Path | None = None  # write the numbers and the map's points to this JSON file
    labels: tuple[str, ...] = ()  # the models' names in figure and table, in order; left out: their folders' names
    per_class: int = 500  # conversations of each class; the smallest class may have fewer, then all have as few
    classes: tuple[str, ...] = ()  # left out: all classes of the data
    # what stands before each turn of a conversation on the map: its own class, as in training and the paper's figure,
    # where any model can read it; or one class for all, where only the answers tell. Numbers are given of both
    prefix: Literal["own", "one"] = "own"
    # the tokens whose states (of the last layer, after the final norm) make the mean on the map: all, as in the paper's
    # figure, prefixes and prompts too; or those of the answers, into which attention carries the class from the
    # prefixes as well. Numbers are given of both
    tokens: Literal["all", "answers"] = "all"
    one_prefix: str | None = None  # the class of the one prefix; left out: the one that the models answer as
    distance: Literal["cosine", "euclidean"] = "cosine"  # of states, for the silhouette and UMAP
    permutations: int = 200  # of labels, to test the probe's accuracy
    seed: int = 0  # decides the conversations, the folds, the permutations and UMAP
    template: str | None = None  # of models without openchat.json: a template's name or file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a card if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of checkpoints of adapters: where their base lies now; empty: where the run had it

    @property
    def models(self) -> tuple[Path, ...]:
        """All of them, in the order of the figure."""
        return self.model, *self.beside


def main(options: RepresentOptions) -> None:
    """The command `ochat represent`."""
    from ochat.evaluate.represent import table  # torch takes seconds to import; --help should not

    record = represent(options)
    Console(highlight=False).print(table.table(record))


def represent(options: RepresentOptions) -> dict[str, Any]:
    """What --numbers holds, after it and the figures are written: models (each with `views`: measure.numbers, and the
    `points` that are drawn), sample, and how it was all made.

    Raises: ConfigError, DataError and CheckpointError, for what can be known beforehand before a model is loaded.
    """
    _check(options)
    device = find_device(options.device)
    from ochat.evaluate import held_out
    from ochat.evaluate.represent import readers, sample

    labels = options.labels or [source.resolve().name for source in options.models]
    compared, tokenizer = readers.find(options.models, labels, options.template, options.data)
    conversations = held_out.read(options.data, compared[0].template, tokenizer)
    drawn = sample.draw(conversations, options.classes, options.per_class, options.seed)
    one = readers.one_prefix(options.one_prefix, compared, drawn.classes, tokenizer)
    record = _description(options, drawn, one)
    record["models"] = [_measure(reader, drawn, one, tokenizer, options, device) for reader in compared]
    if options.output:
        _draw(record, drawn, options.output)
    if options.numbers:
        atomic.write_json(options.numbers, record)
    return record


def _check(options: RepresentOptions) -> None:
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"ochat represent needs {', '.join(missing)}: pip install 'ochat[report]'")
    if options.labels and len(options.labels) != len(options.models):
        raise ConfigError(f"--labels: {len(options.labels)} for {len(options.models)} models; give one for each")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: 0 or more is needed")
    if options.permutations < LEAST_PERMUTATIONS:
        raise ConfigError(f"--permutations {options.permutations}: at least {LEAST_PERMUTATIONS} are needed")
    for path in options.output:
        if path.suffix.lower() not in ENDINGS:
            raise ConfigError(f"--output {path}: expected a name that ends in {' or '.join(ENDINGS)}")
    atomic.check_places(*options.output, options.numbers)


def _description(options: RepresentOptions, sample: Sample, one_prefix: str) -> dict[str, Any]:
    """How the numbers were made."""
    from ochat.evaluate.represent import probe

    return {
        "data": str(options.data),
        "sample": {
            "classes": list(sample.classes),
            "per_class": int((sample.labels == 0).sum()),
            "prompts": int(sample.prompts.max()) + 1,
        },
        "seed": options.seed,
        "dtype": options.dtype,
        "layer": "last, after the final norm",
        "view": f"{options.prefix}_{options.tokens}",
        "one_prefix": one_prefix,
        "distance": options.distance,
        "probe": {
            "method": "logistic regression on standardised states, cross-validated by prompt",
            "folds": probe.FOLDS,
            "penalty": probe.PENALTY,
            "permutations": options.permutations,
            "chance": 1 / len(sample.classes),
            "interval": {"level": intervals.LEVEL, "method": "Wilson's, of prompts"},
        },
    }


def _measure(
    reader: Reader, sample: Sample, one_prefix: str, tokenizer: Tokenizer, options: RepresentOptions, device: str
) -> dict[str, Any]:
    """One model's row; the model itself is gone before anything is computed of its states."""
    from ochat.evaluate.represent import measure, plane
    from ochat.export.open_model import open_model

    model = open_model(reader.source, dtype=options.dtype, device=device, base=options.base)
    with bar(f"{reader.label}: states", len(sample.labels) * (1 + reader.names_classes)) as advance:
        states = measure.views(model, reader, sample, one_prefix, tokenizer, advance)
    del model
    how = {"distance": options.distance, "num_permutations": options.permutations, "seed": options.seed}
    row: dict[str, Any] = {"label": reader.label, "source": str(reader.source), "template": reader.template.name}
    row |= {"names_classes": reader.names_classes, "views": {}}
    with bar(f"{reader.label}: probes and map", len(measure.VIEWS) + 1) as advance:
        for view in measure.VIEWS:
            row["views"][view] = measure.numbers(states[view], sample, **how)
            advance(1)
        drawn = states[f"{options.prefix}_{options.tokens}"]
        points = {"pca": plane.pca(drawn)[0], "umap": plane.umap(drawn, options.distance, options.seed)}
    row["silhouette_umap"] = plane.silhouette(points["umap"], sample.labels, "euclidean")
    return row | {"points": {name: found.tolist() for name, found in points.items()}}


def _draw(record: dict[str, Any], sample: Sample, paths: Sequence[Path]) -> None:
    from ochat.evaluate.represent import figure, table

    panels = [
        figure.Panel(
            row["label"],
            table.caption(record, row),
            np.array(row["points"]["pca"]),
            row["views"][record["view"]]["pca_explained"],
            np.array(row["points"]["umap"]),
            sample.labels,
        )
        for row in record["models"]
    ]
    for path in paths:  # drawn anew for each: a layout that is computed again moves a little
        figure.write(path, figure.draw(panels, sample.classes, table.title(record)))
