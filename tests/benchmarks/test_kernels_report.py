"""The report of what kernels cost: how machine code is counted, and what it says of a change."""

import pytest

from benchmarks import kernels_report, sass
from benchmarks.compiled import CompiledKernel

LISTING = """
.text.a_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/               @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   FADD R4, R4, 1 ;
        /*0080*/              @!P2 STG.E.U16 desc[UR4][R2.64+0x4000], R4 ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
"""


def test_loops_of_machine_code():
    code, loops = sass.read(LISTING)
    assert len(code) == 12 and code[-1] == "EXIT"
    assert loops == [(3, 5), (2, 6), (6, 10)]
    assert sass.innermost(loops) == [(3, 5), (6, 10)]
    assert [sass.access_bytes(line) for line in code] == [0, 4, 16, 0, 0, 0, 16, 0, 2, 0, 8, 0]


@pytest.mark.parametrize(
    ("configuration", "warps", "expected"),
    [
        ({"BLOCK_V": "16384", "LANE": "8", "logits": "bf16"}, 32, 16),
        ({"ROWS": "2", "BLOCK_H": "2048"}, 8, 16),
        ({"HALF": "64", "BLOCK_T": "2", "BLOCK_H": "8", "BLOCK_I": "64", "BLOCK_R": "2", "BLOCK_D": "128"}, 4, 16),
        ({"BLOCKS": "8", "BLOCK": "1024"}, 4, 8),
    ],
)
def test_elements_of_a_thread(configuration, warps, expected):
    assert kernels_report.elements(CompiledKernel("a_kernel", configuration, "", 90, warps)) == expected


def row(**changes):
    values = {"kernel": "a_kernel", "model": "Llama-3-8B", "constants": "", "warps": "8", "registers": "40"}
    values |= {"warps_at_once": "48 of 64", "instructions": "8.25 + 7.31", "bytes": "2.00 + 4.00", "triton": "3.9.0"}
    return values | changes


@pytest.mark.parametrize(
    ("changes", "costs"),
    [
        ({"registers": "48"}, False),
        ({"instructions": "8.40 + 7.31"}, False),  # 1 %
        ({"instructions": "8.25 + 8.31"}, True),
        ({"instructions": "7.00 + 7.31"}, False),
        ({"bytes": "2.00 + 4.50"}, True),
        ({"registers": "72", "warps_at_once": "24 of 64"}, True),
    ],
)
def test_a_change_is_seen_and_growth_fails(changes, costs):
    changed, found = kernels_report.compare([row()], [row(**changes)])
    assert (
        len(changed) == 1 and f"{next(iter(changes))} " in changed[0] and changed[0].startswith("a_kernel (Llama-3-8B)")
    )
    assert found == changed * costs


def test_rows_that_come_and_go(tmp_path):
    file = tmp_path / "kernels.csv"
    assert kernels_report.update(file, [row()]) == (["a_kernel (Llama-3-8B): new"], [])
    assert kernels_report.update(file, [row()]) == ([], [])
    changed, _ = kernels_report.update(file, [row(kernel="another")])
    assert changed == ["another (Llama-3-8B): new", "a_kernel (Llama-3-8B): gone"]
    assert "a_kernel" not in file.read_text()
