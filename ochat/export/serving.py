"""What a server needs in addition to the weights: tokenizer, chat template, generation settings, openchat.json.

They are written and checked when a run starts, so that a faulty export stops it there and not at its end; every
checkpoint carries a copy, so that it can be exported without the base.
"""

from __future__ import annotations

from pathlib import Path

from ochat.errors import CheckpointError
from ochat.files import atomic, bounded_json
from ochat.text import chat_template
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import OPENCHAT, template_as
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


def write(folder: Path, template: Template, tokenizer: Tokenizer, classes: tuple[str, ...]) -> None:
    """Writes the files into an empty or missing `folder`, after checking that they give training's ids.

    Raises: ConfigError where the tokenizer lacks one of the template's tokens, CheckpointError where ids would differ.
    """
    rendered = chat_template.render(template, tokenizer)
    tokenizer.save(folder, chat_template=rendered, eos_token=template.eot)
    chat_template.verify(folder, template, tokenizer)
    settings = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special_tokens[template.eot],
        "do_sample": False,
    }
    atomic.write_json(folder / "generation_config.json", settings)
    # model_type is the name that OpenChat's server looks up; the rest is what `ochat generate` goes by
    described = {"model_type": template.name, "template": template.to_dict(), "classes": list(classes)}
    atomic.write_json(folder / OPENCHAT, described)


def set_default_condition(folder: Path, condition: str) -> None:
    """Makes `condition` the class that the chat template and `ochat generate` take where none is named.

    Raises: ConfigError where no prefix can carry it, CheckpointError where the ids would differ from training's.
    """
    described = bounded_json.read_object(folder / OPENCHAT, CheckpointError, "export the run again")
    tokenizer = tokenizers.load(folder)
    template = template_as(folder, None, condition, tokenizer)
    config = bounded_json.read_object(folder / "tokenizer_config.json", CheckpointError, "export the run again")
    rendered = chat_template.render(template, tokenizer)
    atomic.write_json(folder / "tokenizer_config.json", config | {"chat_template": rendered})
    chat_template.verify(folder, template, tokenizer)
    atomic.write_json(folder / OPENCHAT, described | {"template": template.to_dict()})
