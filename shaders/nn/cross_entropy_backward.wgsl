// Cross-entropy of each row, and its gradient in the same pass.

#import shared/cross_entropy

@group(0) @binding(4) var<storage, read_write> d_logits: array<elem4>; // [T, vocab]

fn store(at: u32, gradient: vec4<f32>) {
    d_logits[at] = pack_elem(gradient);
}
