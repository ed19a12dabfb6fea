// AdamW where the model computes with the master weights themselves.

#import shared/adamw

fn store(at: u32, weight: vec4<f32>) {}
