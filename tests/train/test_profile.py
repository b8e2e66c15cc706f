"""A trace says where a step's time went and what waited, with a card and without: pytest tests/train/test_profile.py"""

import gzip
import json

import pytest
from rich.console import Console

from ochat.train import profile, trace
from ochat.train.trace import Event
from tests import tiny

MAIN, AUTOGRAD = "main", "autograd"


def host(kind, name, start, end, correlation=None, thread=MAIN):
    return Event(kind, name, start, end, thread, correlation)


def kernel(name, start, end, correlation, kind="kernel"):
    return Event(kind, name, start, end, "stream", correlation)


# Two steps of 10 s each on a card whose kernels run after the calls that launched them.
CARD = [
    host("user_annotation", "ProfilerStep#1", 0, 10),
    host("user_annotation", "ProfilerStep#2", 10, 20),
    host("python_function", "ochat/train/trainer.py(120): step", 0.1, 9.9),
    host("cpu_op", "aten::linear", 0.2, 0.6),
    host("cpu_op", "aten::addmm", 0.3, 0.5),
    host("cuda_runtime", "cudaLaunchKernel", 0.4, 0.45, 1),
    kernel("nvjet_tst_128", 1, 4, 1),
    host("cpu_op", "ochat_kernels::linear_cross_entropy", 0.7, 0.95),
    host("cpu_op", "aten::mm", 0.75, 0.85),
    host("cuda_runtime", "cudaLaunchKernel", 0.8, 0.82, 2),
    kernel("nvjet_tst_256", 4, 6, 2),
    host("cuda_driver", "cuLaunchKernelEx", 0.9, 0.92, 3),
    kernel("lce_stats_kernel", 6, 6.5, 3),
    host("cpu_op", "FSDP::all_gather", 1, 1.2),
    host("cuda_runtime", "cudaLaunchKernelExC", 1.1, 1.15, 4),
    kernel("ncclDevKernel_AllGather", 3, 8, 4),  # 1.5 s of it hide behind products
    host("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 1, 1.5, thread=AUTOGRAD),
    host("cpu_op", "aten::mul", 1.1, 1.4, thread=AUTOGRAD),
    host("cuda_runtime", "cudaLaunchKernel", 1.2, 1.3, 5, thread=AUTOGRAD),
    kernel("vectorized_elementwise_kernel", 11, 12, 5),
    host("user_annotation", "optimizer", 12, 13),
    host("cuda_runtime", "cuLaunchKernel", 12.1, 12.2, 6),
    kernel("adamw_kernel", 13, 15, 6),
    kernel("ncclDevKernel_ReduceScatter", 13.5, 14.5, 4),  # hides behind the optimizer
    host("cuda_runtime", "cudaMemcpyAsync", 15.1, 15.2, 7),
    kernel("Memcpy DtoH (Device -> Pageable)", 15.5, 15.75, 7, kind="gpu_memcpy"),
]
WAITS = [
    host("python_function", "/somewhere/ochat/train/metrics.py(120): flush", 15, 17),
    host("python_function", "<built-in method item of Tensor object at 0x7f>", 15.1, 16.9),
    host("cpu_op", "aten::item", 15.2, 16.8),
    host("cpu_op", "aten::_local_scalar_dense", 15.3, 16.7),
    host("cuda_runtime", "cudaStreamSynchronize", 15.4, 16.6, 8),
    host("cpu_op", "autograd::engine::evaluate_function: IndexBackward0", 17, 18, thread=AUTOGRAD),
    host("cpu_op", "aten::nonzero", 17.1, 17.9, thread=AUTOGRAD),
    host("cuda_runtime", "cudaStreamSynchronize", 17.2, 17.3, 9, thread=AUTOGRAD),
    host("python_function", "ochat/train/profile.py(140): _record", 18, 20),
    host("cuda_runtime", "cudaDeviceSynchronize", 18.5, 19.5, 10),
    host("cuda_runtime", "cudaDeviceSynchronize", 21, 22, 11),  # after the last step
]


def test_kernels_count_for_what_launched_them_and_the_rest_is_idle():
    found = trace.breakdown(CARD)
    expected = {
        "matrix products": 3, "head": 2.5, "communication": 1.5, "elementwise": 1, "optimizer": 2,
        "copies and casts": 0.25, "attention": 0, "idle": 20 - 10.25,
    }  # fmt: skip
    assert found.steps == 2 and found.seconds == pytest.approx(expected)
    assert sum(found.seconds.values()) == pytest.approx(20)


def test_waiting_for_the_device_is_reported_by_name_and_place():
    first, second = trace.waits(CARD + WAITS)
    assert (first.call, first.operator) == ("cudaStreamSynchronize", "aten::item")
    assert first.place == "ochat/train/metrics.py(120): flush"
    assert (first.count, first.seconds) == (1, pytest.approx(1.2))
    assert second.place == "IndexBackward0" and second.seconds == pytest.approx(0.1)
    assert trace.waits(CARD) == []


def test_without_a_card_each_moment_is_the_innermost_operators():
    events = [
        host("user_annotation", "ProfilerStep#1", 0, 10),
        host("cpu_op", "aten::linear", 1, 5),
        host("cpu_op", "aten::addmm", 2, 4),
        host("cpu_op", "aten::copy_", 2.5, 3),  # a product's own
        host("cpu_op", "_LinearCrossEntropyBackward", 5, 7),
        host("cpu_op", "aten::mm", 5.5, 6),
        host("user_annotation", "FSDP::all_gather", 7, 9),
        host("user_annotation", "gloo:all_gather", 7, 9, thread="another"),
        host("user_annotation", "optimizer", 9, 10),
        host("cpu_op", "aten::_fused_adamw_", 9.25, 9.75),
    ]
    seconds = trace.breakdown(events).seconds
    assert seconds["matrix products"] == 2 and seconds["elementwise"] == 2 and seconds["head"] == 2
    assert seconds["communication"] == 2 and seconds["optimizer"] == 0.5 and seconds["idle"] == 1.5


@pytest.fixture(scope="module")
def profiled(world):
    """The lines that a profile of the tiny world prints, and its folder, within a run that was there before."""
    from ochat import config as configuration

    folder = world.folder / "to_profile"
    tiny.train(world, folder, "--data.max_steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file, *options = tiny.options(world, folder)
    profile.profile(configuration.load(file, options))
    assert {path: path.read_bytes() for path in before} == before
    return folder


def test_the_parts_of_a_profiled_step_sum_to_it(profiled):
    found = trace.breakdown(trace.read(profiled / "profile" / "rank0.json.gz"))
    assert found.steps == profile.RECORDED
    with gzip.open(profiled / "profile" / "rank0.json.gz", "rt") as file:
        steps = [e for e in json.load(file)["traceEvents"] if e.get("cat") == "user_annotation"]
    steps = [e["dur"] / 1e6 for e in steps if e["name"].startswith("ProfilerStep")]
    assert sum(found.seconds.values()) == pytest.approx(sum(steps), rel=0.01)
    busy = {part for part, seconds in found.seconds.items() if seconds > 0}
    assert busy == set(trace.PARTS) - {"communication"}


def test_the_table_has_a_line_a_part_and_the_waits(profiled, capsys):
    found = trace.breakdown(CARD)
    profile.show(found, {"matrix products": 1.2}, trace.waits(CARD + WAITS), Console(width=150))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:11]] == [*trace.PARTS, "step"]
    assert lines[3].split() == ["matrix", "products", "1,500.00", "15.0%", "1,200.00", "1.25"]
    assert lines[-2] == (
        "waited 1,200.00 ms in 1 x cudaStreamSynchronize, aten::item at ochat/train/metrics.py(120): flush"
    )
