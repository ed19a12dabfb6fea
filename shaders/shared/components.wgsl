// The components of cooperative matrices: the elements that an invocation holds (`Kernel::components`).
//
// WGSL has no words for them. The host fills these functions in after it has translated the kernel to SPIR-V, which has
// (src/gpu/components.rs): each function that begins with `components_of_` or ends with `_of_components`. The bodies here
// only have the right types, and say nothing of what the functions do.
//
// Lane l is the invocation whose index modulo the subgroup's size is l. Of a matrix, its component
// h * COMPONENT_COLUMNS + c, with h below COMPONENT_ROWS and c below COMPONENT_COLUMNS, is in row
//     h * (MATRIX / COMPONENT_ROWS) + l / ROW_LANES
// and in column
//     l % ROW_LANES * COMPONENT_RUN + c % COMPONENT_RUN + c / COMPONENT_RUN * ROW_LANES * COMPONENT_RUN
// in MatrixC and in MatrixA alike: so components of a product can be those of a factor.

const COMPONENTS: u32 = COMPONENT_ROWS * COMPONENT_COLUMNS;
// Lanes that share a row.
const ROW_LANES: u32 = MATRIX / COMPONENT_COLUMNS;

fn components_of_result(matrix: MatrixC) -> array<f32, COMPONENTS> {
    return array<f32, COMPONENTS>();
}

fn result_of_components(components: array<f32, COMPONENTS>) -> MatrixC {
    return MatrixC();
}

fn factor_of_components(components: array<factor, COMPONENTS>) -> MatrixA {
    return MatrixA();
}
