"""The GPUs that a plan predicts for: memory, rates and links, each with its source.

gpus.GPUS["H200"].matmul_tflops;  gpus.lookup(torch.cuda.get_device_name())

Measured: on an H200, products of random bf16 matrices in a burst, 790 TFLOP/s, and a copy. Published: the maker's
data sheets, FlashAttention's own figures (forward + backward, causal, head dim 128, by document length; they count 7/6
of our FLOPs, the backward's second q k^T too). Everything else is assumed, by analogy. Rates are what is reached for
seconds on end, not what is nominal: a card at its power limit computes slower than in a burst. The small cards
stand for all of their memory size; nothing of their speed has been compared with a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

ATTENTION_LENGTHS = (1024, 2048, 4096, 8192)
FLASH_3_HOPPER = (212.0, 361.0, 491.0, 574.0)  # published, H100
FLASH_2_HOPPER = tuple(rate / 2 for rate in FLASH_3_HOPPER)  # published as "about half at length"
FLASH_2_AMPERE = (100.0, 140.0, 165.0, 180.0)  # assumed, from some 200 published for 16k
FLASH_3_BACKENDS = ("fa3", "fa4", "cudnn")  # of train.attention, whose kernels are made for Hopper
SUSTAINED_HOPPER = 735.0  # assumed: 720 to 750 at 700 W, of 790 in a burst
FP8_HOPPER = 1200.0  # assumed: it follows from NVIDIA's published 17,246 and 12,412 tokens/s of 8B in fp8 and in bf16
SLOPE_BELOW = 0.77  # of log rate over log length below 1024: the slope between 1024 and 2048 continues


@dataclass(frozen=True)
class GpuSpec:
    """One GPU and its links. TFLOP/s are bf16 where nothing else is said; bandwidths bytes/s in one direction."""

    name: str
    memory_gib: float  # what a process sees
    peak_tflops: float  # data sheet, dense: what MFU is taken of
    matmul_tflops: float  # sustained by large matrix products
    fp8_tflops: float  # sustained by those of e4m3 rows; 0: it has none
    attention_tflops: tuple[float, ...]  # of FlashAttention-2, at ATTENTION_LENGTHS
    flash_3_tflops: tuple[float, ...]  # of FLASH_3_BACKENDS, likewise
    copy_bandwidth: float  # bytes read + written a second
    node_bandwidth: float  # of a collective among the GPUs of a node, a GPU
    network_bandwidth: float  # of a GPU's network card


A100 = GpuSpec(
    "A100-80",
    memory_gib=79.1,  # assumed
    peak_tflops=312,  # data sheet
    matmul_tflops=0.85 * 312,  # assumed
    fp8_tflops=0,
    attention_tflops=FLASH_2_AMPERE,
    flash_3_tflops=FLASH_2_AMPERE,
    copy_bandwidth=0.9 * 2.0e12,  # data sheet, 90 % assumed
    node_bandwidth=230e9,  # assumed, of 300 on the data sheet
    network_bandwidth=0.8 * 25e9,  # assumed: 200 Gbit/s a GPU
)
H100 = GpuSpec(
    "H100",
    memory_gib=79.1,  # assumed
    peak_tflops=989,  # data sheet
    matmul_tflops=SUSTAINED_HOPPER,
    fp8_tflops=FP8_HOPPER,
    attention_tflops=FLASH_2_HOPPER,
    flash_3_tflops=FLASH_3_HOPPER,
    copy_bandwidth=0.9 * 3.35e12,  # data sheet, 90 % assumed
    node_bandwidth=360e9,  # assumed, of 450 on the data sheet
    network_bandwidth=0.8 * 50e9,  # assumed: 400 Gbit/s a GPU
)
H200 = replace(H100, name="H200", memory_gib=139.0, copy_bandwidth=4.3e12)  # the H100's processor; assumed, measured
RTX4090 = GpuSpec(
    "RTX4090",
    memory_gib=23.6,
    peak_tflops=165.2,  # data sheet, sums in fp32
    matmul_tflops=0.85 * 165.2,  # assumed
    fp8_tflops=0,  # it has products of fp8, but not those of rows with a scale each that train.linear = "fp8" needs
    attention_tflops=tuple(rate * 165 / 312 for rate in FLASH_2_AMPERE),  # assumed, by the peak
    flash_3_tflops=tuple(rate * 165 / 312 for rate in FLASH_2_AMPERE),
    copy_bandwidth=0.9 * 1.008e12,  # data sheet, 90 % assumed
    node_bandwidth=10e9,  # assumed: by PCIe 4 and host memory, as it has neither NVLink nor peer access
    network_bandwidth=0.8 * 12.5e9,  # assumed: 100 Gbit/s a GPU
)
RTX4080 = replace(
    RTX4090,
    name="RTX4080",
    memory_gib=15.6,
    peak_tflops=97.5,  # data sheet, likewise
    matmul_tflops=0.85 * 97.5,
    attention_tflops=tuple(rate * 97.5 / 312 for rate in FLASH_2_AMPERE),
    flash_3_tflops=tuple(rate * 97.5 / 312 for rate in FLASH_2_AMPERE),
    copy_bandwidth=0.9 * 717e9,
)
LARGE = (A100, H100, H200)
GPUS = {gpu.name: gpu for gpu in (*LARGE, RTX4090, RTX4080)}


def lookup(device: str) -> GpuSpec | None:
    """The GPU of any memory size that a CUDA device's name contains; None for another."""
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in device.replace(" ", "")), None)


def attention_rate(gpu: GpuSpec, lengths: NDArray, backend: str = "varlen") -> NDArray[np.float64]:
    """TFLOP/s in documents of these lengths: between the known ones by logarithms, beyond the longest as there. Of a
    `backend` without figures of its own, "auto" among them, FlashAttention-2's."""
    reached = gpu.flash_3_tflops if backend in FLASH_3_BACKENDS else gpu.attention_tflops
    logs = np.log(np.maximum(lengths, 1))
    known = np.log(ATTENTION_LENGTHS)
    inside = np.interp(logs, known, np.log(reached))
    return np.exp(inside + SLOPE_BELOW * np.minimum(logs - known[0], 0))
