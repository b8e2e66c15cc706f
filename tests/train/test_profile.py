"""Where a step's time goes and what the host waits for, with a GPU and without: pytest tests/train/test_profile.py"""

import gzip
import json

import pytest
from rich.console import Console
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from ochat import config as configuration
from ochat.train import profile
from tests import tiny

MAIN, AUTOGRAD, STREAM = 1, 2, 3


def host(name, start, end, *, id=0, thread=MAIN, note=False):
    """An event of the host; seconds."""
    return FunctionEvent(id, name, thread, 1e6 * start, 1e6 * end, is_user_annotation=note)


def kernel(name, start, end, id):
    return FunctionEvent(id, name, STREAM, 1e6 * start, 1e6 * end, device_type=DeviceType.CUDA, use_device="cuda")


def nested(events):
    """The events, each with the innermost one on its thread that holds it as its parent, as torch links them."""
    for event in events:
        around = [
            e for e in events if e.thread == event.thread != STREAM and e is not event and profile.holds(e, event)
        ]
        if around:
            parent = min(around, key=lambda e: e.time_range.elapsed_us())
            event.set_cpu_parent(parent)
            parent.append_cpu_child(event)
    return events


def gpu_steps():
    """Two steps of 10 s each on a GPU whose kernels run after the calls that launched them."""
    return [
        host("ProfilerStep*", 0, 10, note=True),
        host("ProfilerStep*", 10, 20, note=True),
        host("aten::linear", 0.2, 0.6),
        host("aten::addmm", 0.3, 0.5),
        host("cudaLaunchKernel", 0.4, 0.45, id=1),
        kernel("nvjet_tst_128", 1, 4, 1),
        host("ochat_kernels::linear_cross_entropy", 0.7, 0.95),
        host("aten::mm", 0.75, 0.85),
        host("cudaLaunchKernel", 0.8, 0.82, id=2),
        kernel("nvjet_tst_256", 4, 6, 2),
        host("cuLaunchKernelEx", 0.9, 0.92, id=3),
        kernel("lce_stats_kernel", 6, 6.5, 3),
        host("FSDP::all_gather", 1, 1.2, note=True),
        host("cudaLaunchKernelExC", 1.1, 1.15, id=4),
        kernel("ncclDevKernel_AllGather", 3, 8, 4),  # 3.5 s of it overlap with computation
        host("autograd::engine::evaluate_function: MulBackward0", 1, 1.5, thread=AUTOGRAD),
        host("aten::mul", 1.1, 1.4, thread=AUTOGRAD),
        host("cudaLaunchKernel", 1.2, 1.3, id=5, thread=AUTOGRAD),
        kernel("vectorized_elementwise_kernel", 11, 12, 5),
        host("optimizer", 12, 13, note=True),
        host("cuLaunchKernel", 12.1, 12.2, id=6),
        kernel("adamw_kernel", 13, 15, 6),
        kernel("ncclDevKernel_ReduceScatter", 13.5, 14.5, 4),  # overlaps with the optimizer
        host("cudaMemcpyAsync", 15.1, 15.2, id=7),
        kernel("Memcpy DtoH (Device -> Pageable)", 15.5, 15.75, 7),
    ]


def waits():
    return [
        host("/somewhere/ochat/train/metrics.py(120): flush", 15.3, 17),
        host("<built-in method item of Tensor object at 0x7f>", 15.31, 16.9),
        host("aten::item", 15.32, 16.8),
        host("aten::_local_scalar_dense", 15.33, 16.7),
        host("cudaStreamSynchronize", 15.4, 16.6, id=8),
        host("autograd::engine::evaluate_function: IndexBackward0", 17, 18, thread=AUTOGRAD),
        host("aten::nonzero", 17.1, 17.9, thread=AUTOGRAD),
        host("cudaStreamSynchronize", 17.2, 17.3, id=9, thread=AUTOGRAD),
        host("ochat/train/trainer.py(140): step", 17.4, 18),
        host("cudaEventSynchronize", 17.5, 17.55, id=12, thread=9),  # outside any operator: of no known thread
        host("ochat/train/profile.py(140): _record", 18, 20),
        host("cudaDeviceSynchronize", 18.5, 19.5, id=10),
        host("cudaDeviceSynchronize", 21, 22, id=11),  # after the last step
    ]


def test_kernels_count_for_what_launched_them_and_the_rest_is_idle():
    found = profile.part_seconds(nested(gpu_steps()))
    expected = {
        "matmul": 3, "head": 2.5, "communication": 1.5, "elementwise": 1, "optimizer": 2,
        "copies and casts": 0.25, "attention": 0, "idle": 20 - 10.25,
    }  # fmt: skip
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(20)


def test_waiting_for_the_device_is_reported_by_name_and_place():
    call, node = "1 x cudaStreamSynchronize", "autograd::engine::evaluate_function: IndexBackward0"
    assert profile.sync_points(nested(gpu_steps() + waits())) == [
        f"waited 1,200.00 ms in {call}, aten::item at ochat/train/metrics.py(120): flush",
        f"waited 100.00 ms in {call}, {node} at IndexBackward0",
        "waited 50.00 ms in 1 x cudaEventSynchronize,  at ochat/train/trainer.py(140): step",
    ]
    assert profile.sync_points(nested(gpu_steps())) == []


def test_without_a_gpu_each_operator_has_its_own_time():
    found = profile.part_seconds(nested([
        host("ProfilerStep*", 0, 10, note=True),
        host("aten::linear", 1, 5),
        host("aten::addmm", 2, 4),
        host("aten::copy_", 2.5, 3),  # a matmul's own
        host("_LinearCrossEntropyBackward", 5, 7),
        host("aten::mm", 5.5, 6),
        host("FSDP::all_gather", 7, 9, note=True),
        host("gloo:all_gather", 7, 9, note=True, thread=4),
        host("optimizer", 9, 10, note=True),
        host("aten::_fused_adamw_", 9.25, 9.75),
    ]))  # fmt: skip
    assert found == pytest.approx({
        "matmul": 2, "elementwise": 2, "head": 2, "communication": 2, "optimizer": 0.5, "idle": 1.5, "attention": 0,
        "copies and casts": 0,
    })  # fmt: skip


def test_a_profile_leaves_the_run_alone_and_its_parts_sum_to_the_steps(world):
    folder = world.folder / "to_profile"
    tiny.train(world, folder, "--data.max_steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file, *options = tiny.options(world, folder)
    table, *lines = profile.profile(configuration.load(file, options))
    assert {path: path.read_bytes() for path in before} == before
    with gzip.open(folder / "profile" / "rank0.json.gz", "rt") as trace:
        steps = [e for e in json.load(trace)["traceEvents"] if e.get("cat") == "user_annotation"]
    steps = [e["dur"] / 1e3 for e in steps if e["name"].startswith("ProfilerStep")]
    parts, times = (list(column.cells) for column in table.columns[:2])
    shown = dict(zip(parts, (float(text.replace(",", "")) for text in times), strict=True))
    assert parts == [*profile.PARTS, "step"] and len(steps) == profile.RECORDED
    assert shown["step"] == pytest.approx(sum(steps) / len(steps), rel=0.01)
    assert sum(shown[part] for part in profile.PARTS) == pytest.approx(shown["step"], abs=0.05)
    assert {part for part in profile.PARTS if shown[part] > 0} >= {"matmul", "head", "elementwise", "optimizer", "idle"}
    assert "never waited" in lines[1] and (folder / "profile" / "rank0-stacks.json.gz").is_file()


def test_the_table_has_a_line_a_part(capsys):
    seconds = dict.fromkeys(profile.PARTS, 0.0) | {"matmul": 1.5, "idle": 8.5}
    Console(width=150).print(*profile.report(seconds, {"matmul": 1.2}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["matmul", "1,500.00", "15.0%", "1,200.00", "1.25"]
