//! The stages of Lighthouse Attention, one module each: host code in `mod.rs`, the formula in `reference.rs`, the
//! shader of the same name below `shaders/`.

pub mod flash;
pub mod gather;
pub mod pool_score;
pub mod scatter;
pub mod select;
