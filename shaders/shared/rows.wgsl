// How kernels that are bound by memory walk over rows of HEAD_DIM elements: LOADS invocations share a row, one load of 16
// bytes each, and a workgroup of 256 has ROWS rows at a time. Workgroup id y is b * H + h: no invocation divides by a
// number that is not a constant, which cost more than its 16 bytes' worth of bandwidth.

const LOADS: u32 = HEAD_DIM / (4u * WIDE);
const ROWS: u32 = 256u / LOADS;
