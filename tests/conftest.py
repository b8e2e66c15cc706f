"""Set up all tests: one thread (faster for tiny models), Triton's interpreter without a GPU, and the small world."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

from ochat.console import configure_logging  # noqa: E402
from ochat.export.hf_folder import export  # noqa: E402
from tests import tiny  # noqa: E402 (after the variable is set)

torch.set_num_threads(1)
configure_logging()


@pytest.fixture(autouse=True)
def notes_on_stdout():
    """Undo what a command of an earlier test configured."""
    configure_logging()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tokenizer, a random model and a prepared data set."""
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def alone(world):
    """The metrics of a run of two epochs on one process, a checkpoint every 5 steps, all kept; its folder is
    world.folder / "alone"."""
    options = ["--data.epochs=2", "--checkpoint.every=5", "--checkpoint.keep=0", f"--data.eval_path={world.data}"]
    return tiny.train(
        world, world.folder / "alone", *options, '--samples.prompts=["1+1"]', "--samples.max_new_tokens=3"
    )


@pytest.fixture(scope="session")
def exported(world, alone):
    """That run's newest checkpoint, without rounding."""
    export(world.folder / "alone", world.folder / "mine", dtype="float32")
    return world.folder / "mine"
