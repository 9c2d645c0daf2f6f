"""Reading the TPU compiler's dumps."""

import pytest

from benchmarks.tpu_schedule import analyse, block_starts, read_utilization

HEADER = "== CAPACITY:\nMXU, VALU, VLOAD:FILL, VSTORE:SPILL\n  4   4   3   1\n== UTILIZATION:\n"
IDLE, PLAIN, MASKED = "0 1 0 0", "2 4 1 0", "1 4 0 1"
BUNDLES = """= control target key start
LB: loop body
= control target key end
     0   :  { entry }
   0x1 LB: > { product }
   0x2   : > { product }
   0x3 PB: > { masked product }
   0x4   : > { masked product }
   0x5   : > { masked product ;;  %1 = sbr.rel (%p) target = $region }
   0x6   : > { masked product in the delay slot }
"""


def test_the_hot_region_is_the_shorter_block_with_the_products():
    rows = "\n".join([IDLE, PLAIN, PLAIN, MASKED, MASKED, MASKED, MASKED])
    found = analyse("fwd", HEADER + rows + "\n", BUNDLES, "x [shape = 'f32', space=vmem, size = 0x100000, scoped]")
    assert (found.bundles, found.hot_bundles, found.matrix_use) == (7, 2, 0.5)
    assert (found.fills, found.spills, found.vmem_mib) == (2, 0, 1.0)


def test_blocks_begin_at_labels_and_after_branches():
    assert block_starts(BUNDLES) == [0, 1, 3, 10]


def test_a_dump_of_another_form_is_refused():
    with pytest.raises(ValueError, match="rows of other lengths"):
        read_utilization(HEADER + "1 2\n")
