// AdamW where the model computes with a copy of the master weights in its own storage type.

#import shared/adamw

@group(0) @binding(8) var<storage, read_write> weights: array<elem4>; // [elements]

fn store(at: u32, weight: vec4<f32>) {
    weights[at] = pack_elem(weight);
}
