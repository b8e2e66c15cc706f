"""What guidance does to the answers of the small laboratory's models (small.py), which must have been trained before.

    PYTHONPATH=.:kernels python -m examples.ablation.guidance --out docs/evidence/small_guidance.json

Each model answers its 500 held-out questions greedily, with logits between and beyond those of the two classes. An
answer counts if it is the expert's to the letter, or the sub-optimal class's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from examples.ablation import small
from ochat.export.open_model import open_model, stop_ids
from ochat.files import atomic
from ochat.infer.generate import complete
from ochat.run import layout
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import load_template

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
VARIANTS = ("c-rlft", "no-reward")
MOST = 8  # tokens; an answer has 6


def main() -> None:
    """Measure the models of all seeds that have all VARIANTS, and write the shares."""
    parser = argparse.ArgumentParser(prog="python -m examples.ablation.guidance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, default=small.WORK, help="the laboratory's folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = parser.parse_args()
    runs = options.work / "ablation" / "runs"
    names = [path.parent.name for path in runs.glob(f"*-seed*/{layout.EXPORT}")]
    seeds = [seed for seed in range(len(names)) if all(f"{variant}-seed{seed}" in names for variant in VARIANTS)]
    rows = []
    for variant in VARIANTS:
        found = [shares(runs / f"{variant}-seed{seed}" / layout.EXPORT, options.work, seed) for seed in seeds]
        for number, scale in enumerate(SCALES):
            expert, suboptimal = zip(*(each[number] for each in found), strict=True)
            rows.append({"variant": variant, "guidance": scale, "expert": expert, "suboptimal": suboptimal})
    atomic.write_json(options.out, {"seeds": seeds, "rows": rows})


def shares(folder: Path, work: Path, seed: int) -> list[tuple[float, float]]:
    """For each of SCALES the shares of answers that are the expert's and the sub-optimal class's."""
    lines = (work / f"held_out-{seed}.jsonl").read_text("utf-8").splitlines()
    texts = [[item["content"] for item in json.loads(line)["items"]] for line in lines]
    asked = [question for question, _ in texts[::2]]
    answers = [[answer for _, answer in texts[first::2]] for first in (0, 1)]
    tokenizer = tokenizers.load(folder)
    template, model = load_template(folder, None, tokenizer), open_model(folder, dtype="float32", device="cpu")
    ends = stop_ids(folder, template, tokenizer)
    wanted, others = (
        [template.encode_prompt(Conversation((Message("user", text),), name), tokenizer) for text in asked]
        for name in (small.EXPERT, small.SUBOPTIMAL)
    )
    found = []
    for scale in SCALES:
        said = complete(model, wanted, tokenizer, ends, MOST, guidance=scale, against=others)
        equal = [[text.strip() == answer for (text, _), answer in zip(said, side, strict=True)] for side in answers]
        found.append((statistics.fmean(equal[0]), statistics.fmean(equal[1])))
    return found


if __name__ == "__main__":
    main()
