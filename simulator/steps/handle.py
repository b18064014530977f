"""The whole state behind one small array of addresses.

Handing twenty arrays to a compiled function takes 4 us, more than most of them compute; handing over their addresses takes 0.3 us.
Whoever holds a handle holds the arrays, too: `simulator.engines.Engines` makes a new one whenever an array is replaced.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from simulator.steps.records import ENGINE, ENTRY, REQUEST, SAID, Fleet

MOST_AXES = 4


def handle_of(fleet: Fleet) -> NDArray[np.int64]:
    """[arrays, 1 + axes]: the address and the shape of each, in the order of the fields."""
    handle = np.zeros((len(fleet), 1 + MOST_AXES), np.int64)
    for row, array in zip(handle, fleet, strict=True):
        assert array.flags.c_contiguous, "compiled code takes arrays without gaps"
        row[0] = array.ctypes.data
        row[1 : 1 + array.ndim] = array.shape
    return handle


@intrinsic
def _pointer(context: object, address: types.Type) -> object:
    def generate(context: object, builder: ir.IRBuilder, signature: object, arguments: list[ir.Value]) -> ir.Value:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(cache=True)
def opened(handle: NDArray[np.int64]) -> Fleet:
    """The arrays again."""
    at, one, two = handle[:, 0], handle[:, 1], handle[:, 2]
    return Fleet(
        carray(_pointer(at[0]), one[0], ENGINE),
        carray(_pointer(at[1]), one[1], REQUEST),
        carray(_pointer(at[2]), (one[2], two[2]), np.int32),
        carray(_pointer(at[3]), (one[3], two[3]), np.int64),
        carray(_pointer(at[4]), (one[4], two[4]), np.int64),
        carray(_pointer(at[5]), (one[5], two[5]), np.int64),
        carray(_pointer(at[6]), (one[6], two[6]), np.int64),
        carray(_pointer(at[7]), (one[7], two[7]), np.int32),
        carray(_pointer(at[8]), (one[8], two[8]), np.int32),
        carray(_pointer(at[9]), one[9], np.int32),
        carray(_pointer(at[10]), one[10], ENTRY),
        carray(_pointer(at[11]), one[11], np.int32),
        carray(_pointer(at[12]), one[12], np.uint64),
        carray(_pointer(at[13]), one[13], np.int32),
        carray(_pointer(at[14]), one[14], SAID),
        carray(_pointer(at[15]), one[15], np.uint64),
        carray(_pointer(at[16]), (one[16], two[16]), np.float64),
        carray(_pointer(at[17]), (one[17], two[17], handle[17, 3], handle[17, 4]), np.float64),
        carray(_pointer(at[18]), (one[18], two[18]), np.int32),
        carray(_pointer(at[19]), one[19], np.int64),
        carray(_pointer(at[20]), one[20], np.float64),
        carray(_pointer(at[21]), (one[21], two[21], handle[21, 3]), np.int64),
        carray(_pointer(at[22]), (one[22], two[22]), np.float64),
        carray(_pointer(at[23]), (one[23], two[23]), np.int64),
    )
