// Backward of the embedding: row v of the weight's gradient is the sum of dx over the tokens whose id is v, in order of
// the tokens. A workgroup sums one row, 256 columns, one slice of the tokens: it marks the tokens of v in a set of bits,
// 256 tokens at a time, and then walks the set.
//
// COLUMNS (width / 4): host constant. Workgroup id z: slice of the tokens.

#import shared/grid

struct Params {
    rows: u32, // T
    vocab: u32,
    slice: u32, // rows of one slice
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;                 // [T]
@group(0) @binding(1) var<storage, read> d_x: array<elem4>;               // [T, width]
@group(0) @binding(2) var<storage, read_write> partial: array<vec4<f32>>; // [slices, vocab, width]
@group(0) @binding(3) var<uniform> params: Params;

const WORKGROUP: u32 = 64u;
const BLOCKS: u32 = (COLUMNS + WORKGROUP - 1u) / WORKGROUP;
const CHUNK: u32 = 256u;

var<workgroup> tokens: array<atomic<u32>, CHUNK / 32u>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let unit = linear_workgroup(workgroup, workgroups);
    if (unit >= params.vocab * BLOCKS) {
        return;
    }
    let v = unit / BLOCKS;
    let column = unit % BLOCKS * WORKGROUP + invocation;
    let end = min((workgroup.z + 1u) * params.slice, params.rows);

    var sum = vec4<f32>(0.0);
    for (var first = workgroup.z * params.slice; first < end; first += CHUNK) {
        if (invocation < CHUNK / 32u) {
            atomicStore(&tokens[invocation], 0u);
        }
        workgroupBarrier();
        for (var i = invocation; i < CHUNK && first + i < end; i += WORKGROUP) {
            if (min(ids[first + i], params.vocab - 1u) == v) {
                atomicOr(&tokens[i / 32u], 1u << (i % 32u));
            }
        }
        workgroupBarrier();
        if (column < COLUMNS) {
            for (var word = 0u; word < CHUNK / 32u; word++) {
                var left = atomicLoad(&tokens[word]);
                while (left != 0u) {
                    let token = first + word * 32u + firstTrailingBit(left);
                    left &= left - 1u;
                    sum += unpack_elem(d_x[token * COLUMNS + column]);
                }
            }
        }
        workgroupBarrier();
    }
    if (column < COLUMNS) {
        partial[(workgroup.z * params.vocab + v) * COLUMNS + column] = sum;
    }
}
