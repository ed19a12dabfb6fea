//! Lighthouse Attention, forward and backward, on the best adapter of this machine, or on the CPU if it has none.

use std::sync::Arc;

use lighthouse_attention::{Caps, Element, Gpu, LighthouseAttention, LighthouseConfig, Recording, Shape, executor};

fn main() -> lighthouse_attention::Result<()> {
    let shape = Shape { batch: 1, tokens: 8192, heads: 4, kv_heads: 2, head_dim: 64, element: Element::F32 };
    let config = LighthouseConfig { levels: 3, pooling: 4, top_k: 256, chunk: 128 };
    let layer = LighthouseAttention::new(config, shape)?;

    // Record once.
    let gpu = Gpu::open("all")?;
    let mut recording = Recording::new(&gpu.as_ref().map_or_else(Caps::cpu, |gpu| gpu.caps().clone()));
    let q = recording.external("q", shape.element, &shape.q())?;
    let k = recording.external("k", shape.element, &shape.kv())?;
    let v = recording.external("v", shape.element, &shape.kv())?;
    let d_o = recording.external("d_o", shape.element, &shape.q())?;
    let forward = layer.record_forward(&mut recording, [q, k, v])?;
    let gradients = layer.record_backward(&mut recording, &forward, d_o)?;
    recording.keep(forward.o)?;
    recording.keep(gradients.dq)?;

    // Replay as often as you like.
    let mut executor = executor(gpu.as_ref(), Arc::new(recording))?;
    for (tensor, frequency) in [(q, 0.11), (k, 0.13), (v, 0.17), (d_o, 0.19)] {
        let wave: Vec<f32> = (0..tensor.len()).map(|i| (i as f32 * frequency).sin()).collect();
        executor.write(tensor, &wave)?;
    }
    executor.run()?;
    println!("ran on {}", gpu.as_ref().map_or("the CPU", Gpu::name));
    println!("{} tokens attended through {} entries", shape.tokens, layer.pyramid().gathered);
    println!("o  begins {:?}", executor.read(forward.o)?.get(..4).unwrap_or_default());
    println!("dq begins {:?}", executor.read(gradients.dq)?.get(..4).unwrap_or_default());
    Ok(())
}
