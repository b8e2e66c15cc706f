"""What a compiled kernel does for each element, counted in its machine code.

    parts = count(cubin, elements=16)   # of what a thread holds at a time
    "8.3 + 7.3" == " + ".join(f"{part.instructions:.1f}" for part in parts)
A part is an innermost loop that reads global memory, as often as the code has one (a kernel that passes over its rows
twice has two); without such a loop it is the whole kernel. Its instructions are those between the loop's label and its
branch back, whether predicated or not. Its bytes are the widths of its accesses to global memory: from caches, too.
Both are four times as many in a loop that the assembler unrolled four times, as the second of glu_fp8_fwd_kernel.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__path__[0]) / "backends/nvidia/bin"
ACCESS = re.compile(r"(?:@!?U?P\w+ +)?(?:LDG|STG)\.\S+|(?:@!?U?P\w+ +)?(?:LDG|STG) ")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of an access; 4 without one of these


class Part(NamedTuple):
    """For each element."""

    instructions: float
    num_bytes: float


def count(cubin: Path, elements: float) -> list[Part]:
    """The parts of the one kernel in a binary, in their order; a thread takes `elements` of it at a time."""
    command = [str(TOOLS / "nvdisasm"), "-c", str(cubin)]
    code, loops = read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    reading = [code[start:end] for start, end in innermost(loops) if any("LDG" in line for line in code[start:end])]
    return [Part(len(part) / elements, sum(map(access_bytes, part)) / elements) for part in reading or [code]]


def read(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions up to the last exit, and the loops among them as (first, behind the last)."""
    code, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?) ?;", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    exits = [i for i, instruction in enumerate(code) if re.search(r"\bEXIT\b", instruction)]
    return code[: exits[-1] + 1], loops


def innermost(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that contain no other."""
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def access_bytes(instruction: str) -> int:
    """Of global memory that a thread reads or writes by it."""
    found = ACCESS.match(instruction)
    return next((WIDTHS[word] for word in found[0].split(".") if word in WIDTHS), 4) if found else 0
