// q, k and v of the model's rows by one GEMM. The heads of q and k get their rotary position embedding: elements i and
// i + D/2 of a head's row are a point in the plane that is turned by the angle of its token, position * theta^(-2i/D).
//
// HEADS, KV_HEADS, TOKENS: host constants; HALF = D/2.

@group(0) @binding(3) var<storage, read> angles: array<vec4<f32>>; // [N, (cosines: D/2 | sines: D/2)]
@group(0) @binding(4) var<storage, read_write> q: array<wide>;     // [T, H, D]
@group(0) @binding(5) var<storage, read_write> k: array<wide>;     // [T, KV, D]
@group(0) @binding(6) var<storage, read_write> v: array<wide>;     // [T, KV, D]

struct Fetched {
    cosine: array<vec4<f32>, WIDE>,
    sine: array<vec4<f32>, WIDE>,
}

fn fetch(row: u32, column: u32) -> Fetched {
    let at = (row % TOKENS * 2u * HALF + column % (2u * HALF)) / 4u;
    var fetched: Fetched;
    #for w in 0..WIDE
    fetched.cosine[$w] = angles[at + $wu];
    fetched.sine[$w] = angles[at + $wu + HALF / 4u];
    #end
    return fetched;
}

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    let x = sums[0];
    let y = sums[HALVES - 1u];
    let head = column / (2u * HALF);
    let i = column % (2u * HALF);
    if (head >= HEADS + KV_HEADS) {
        let at = ((row * KV_HEADS + head - HEADS - KV_HEADS) * 2u * HALF + i) / COLUMNS;
        v[at] = pack_wide(x);
        v[at + HALF / COLUMNS] = pack_wide(y);
        return;
    }
    var turned_x: array<vec4<f32>, WIDE>;
    var turned_y: array<vec4<f32>, WIDE>;
    #for w in 0..WIDE
    turned_x[$w] = x[$w] * fetched.cosine[$w] - y[$w] * fetched.sine[$w];
    turned_y[$w] = y[$w] * fetched.cosine[$w] + x[$w] * fetched.sine[$w];
    #end
    if (head < HEADS) {
        let at = ((row * HEADS + head) * 2u * HALF + i) / COLUMNS;
        q[at] = pack_wide(turned_x);
        q[at + HALF / COLUMNS] = pack_wide(turned_y);
    } else {
        let at = ((row * KV_HEADS + head - HEADS) * 2u * HALF + i) / COLUMNS;
        k[at] = pack_wide(turned_x);
        k[at + HALF / COLUMNS] = pack_wide(turned_y);
    }
}
