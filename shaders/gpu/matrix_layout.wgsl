// Shows how a device holds cooperative matrices: the components of a MatrixC and of a MatrixA whose elements are their own
// numbers, row by row, and the matrices that become of these components plus one.
//
// Each of SUBGROUPS subgroups writes four times the elements of a matrix: the components of the result, lane by lane, those
// of the factor, the result's matrix and the factor's. More than one shows that lanes are invocations modulo SUBGROUP.

@group(0) @binding(0) var<storage, read_write> out: array<f32>;

const ELEMENTS: u32 = MATRIX * MATRIX;
const VECTORS: u32 = ELEMENTS / 4u;

var<workgroup> results: array<vec4<f32>, SUBGROUPS * VECTORS>;
var<workgroup> factors: array<elem4, SUBGROUPS * VECTORS>;

@compute @workgroup_size(SUBGROUPS * SUBGROUP)
fn main(@builtin(local_invocation_index) invocation: u32) {
    for (var i = invocation; i < SUBGROUPS * VECTORS; i += SUBGROUPS * SUBGROUP) {
        let numbers = vec4<f32>(vec4<u32>(i % VECTORS * 4u) + vec4<u32>(0u, 1u, 2u, 3u));
        results[i] = numbers;
        factors[i] = pack_elem(numbers);
    }
    workgroupBarrier();

    let subgroup = invocation / SUBGROUP;
    let lane = invocation % SUBGROUP;
    let first = subgroup * VECTORS;
    let at = subgroup * 4u * ELEMENTS;
    var of_result = components_of_result(coopLoadT<MatrixC>(&results[first], MATRIX / 4u));
    var of_factor = components_of_factor(coopLoadT<MatrixA>(&factors[first], MATRIX / 4u));
    for (var c = 0u; c < COMPONENTS; c++) {
        let component = lane * COMPONENTS + c;
        out[at + component] = of_result[c];
        out[at + ELEMENTS + component] = f32(of_factor[c]);
        of_result[c] += 1.0;
        of_factor[c] += 1.0;
    }

    workgroupBarrier();
    coopStoreT(result_of_components(of_result), &results[first], MATRIX / 4u);
    coopStoreT(factor_of_components(of_factor), &factors[first], MATRIX / 4u);
    workgroupBarrier();
    for (var c = 0u; c < COMPONENTS; c++) {
        let element = lane * COMPONENTS + c;
        out[at + 2u * ELEMENTS + element] = results[first + element / 4u][element % 4u];
        out[at + 3u * ELEMENTS + element] = unpack_elem(factors[first + element / 4u])[element % 4u];
    }
}
