//! Inputs: made by a formula, so that any machine and any language gets the same.

/// The mixing function of the golden vectors (spec section 10).
pub fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Element `i` of input tensor `tensor` (0 = q, 1 = k, 2 = v, 3 = do), in [-1, 1).
pub fn uniform(seed: u64, tensor: u64, i: u64) -> f32 {
    let h = splitmix64((seed.wrapping_mul(4).wrapping_add(tensor) << 32).wrapping_add(i));
    (h >> 40) as f32 / (1 << 24) as f32 * 2.0 - 1.0
}

/// A whole tensor of such elements.
pub fn tensor(seed: u64, tensor: u64, shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product::<usize>() as u64).map(|i| uniform(seed, tensor, i)).collect()
}

/// The same, rounded to multiples of 1/16: squared norms are then exact in f32, in whatever order they are summed, so
/// that every device must choose the same entries; and equal norms, whose order is the tie rule's, are common.
pub fn exact(seed: u64, tensor: u64, shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product::<usize>() as u64).map(|i| (uniform(seed, tensor, i) * 16.0).round() / 16.0).collect()
}
