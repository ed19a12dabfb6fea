// The components of cooperative matrices: the elements that an invocation holds (`Kernel::components`).
//
// WGSL has no words for them. The host fills these functions in after it has translated the kernel to SPIR-V, which has
// (src/gpu/translate.rs): each function that begins with `components_of_` or ends with `_of_components`. The bodies here
// only have the right types, and say nothing of what the functions do.
//
// Lane l is the invocation whose index modulo the subgroup's size is l. Of a matrix, its component
// h * COMPONENT_COLUMNS + c, with h below COMPONENT_ROWS and c below COMPONENT_COLUMNS, is in row
// component_row(l) + h * ROW_STEP and in column component_column(l, c), in MatrixC and in MatrixA alike: so components of a
// product can be those of a factor.

const COMPONENTS: u32 = COMPONENT_ROWS * COMPONENT_COLUMNS;
// Lanes that share a row.
const ROW_LANES: u32 = MATRIX / COMPONENT_COLUMNS;

fn components_of_result(matrix: MatrixC) -> array<f32, COMPONENTS> {
    return array<f32, COMPONENTS>();
}

fn result_of_components(components: array<f32, COMPONENTS>) -> MatrixC {
    return MatrixC();
}

fn components_of_factor(matrix: MatrixA) -> array<factor, COMPONENTS> {
    return array<factor, COMPONENTS>();
}

fn factor_of_components(components: array<factor, COMPONENTS>) -> MatrixA {
    return MatrixA();
}

// From a lane's component of a row to that of its next row.
const ROW_STEP: u32 = MATRIX / COMPONENT_ROWS;

// The row of a lane's first components.
fn component_row(lane: u32) -> u32 {
    return lane / ROW_LANES;
}

// The column of component `c` of those that a lane has of a row.
fn component_column(lane: u32, c: u32) -> u32 {
    return lane % ROW_LANES * COMPONENT_RUN + c % COMPONENT_RUN + c / COMPONENT_RUN * ROW_LANES * COMPONENT_RUN;
}
