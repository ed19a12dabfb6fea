// q, k and v of the model's rows by one GEMM. The heads of q and k get their rotary position embedding: elements i and
// i + D/2 of a head's row are a point in the plane that is turned by the angle of its token, position * theta^(-2i/D).
//
// HEADS, KV_HEADS, TOKENS: host constants; HALF = D/2.

@group(0) @binding(3) var<storage, read> angles: array<vec4<f32>>; // [N, (cosines: D/2 | sines: D/2)]
@group(0) @binding(4) var<storage, read_write> q: array<c4>;       // [T, H, D]
@group(0) @binding(5) var<storage, read_write> k: array<c4>;       // [T, KV, D]
@group(0) @binding(6) var<storage, read_write> v: array<c4>;       // [T, KV, D]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    let x = sums[0];
    let y = sums[HALVES - 1u];
    let head = column / (2u * HALF);
    let i = column % (2u * HALF);
    if (head >= HEADS + KV_HEADS) {
        let at = ((row * KV_HEADS + head - HEADS - KV_HEADS) * 2u * HALF + i) / 4u;
        v[at] = pack_c(x);
        v[at + HALF / 4u] = pack_c(y);
        return;
    }
    let angle = (row % TOKENS * 2u * HALF + i) / 4u;
    let cosine = angles[angle];
    let sine = angles[angle + HALF / 4u];
    let turned_x = pack_c(x * cosine - y * sine);
    let turned_y = pack_c(y * cosine + x * sine);
    if (head < HEADS) {
        let at = ((row * HEADS + head) * 2u * HALF + i) / 4u;
        q[at] = turned_x;
        q[at + HALF / 4u] = turned_y;
    } else {
        let at = ((row * KV_HEADS + head - HEADS) * 2u * HALF + i) / 4u;
        k[at] = turned_x;
        k[at + HALF / 4u] = turned_y;
    }
}
