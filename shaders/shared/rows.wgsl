// How kernels that are bound by memory walk over rows of HEAD_DIM elements: LOADS invocations share a row, one load of 16
// bytes each, and a workgroup of 256 has ROWS rows at a time. Workgroup id x is b * H + h, so that no invocation divides by
// a number that is not a constant, and so that the heads of a token, which are neighbours in [B, N, H, D], are written at
// the same time.

const LOADS: u32 = HEAD_DIM / (4u * WIDE);
const ROWS: u32 = 256u / LOADS;
