//! The table of parameters: one flat tensor each for master weights, gradients and moments, and a view per parameter.

use rayon::prelude::*;

use crate::error::Result;
use crate::recording::Recording;
use crate::tensor::{Element, Tensor};
use crate::train::splitmix64;

/// How a parameter begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All ones: norms.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
}

/// One parameter of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Such as `layers.3.attention.wq`.
    pub name: String,
    /// `[out, in]` for a linear map, `[vocabulary, width]` for the embedding, `[width]` for a norm.
    pub shape: Vec<usize>,
    /// How it begins.
    pub init: Init,
    /// Element of the flat tensors that it begins at.
    pub start: usize,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Weight decay is for matrices, not for norms.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// Elements that a parameter's start is a multiple of: 256 bytes, which every device can bind from, in f16.
pub const ALIGNMENT: usize = 128;

/// All parameters in the order of their use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParameterTable {
    parameters: Vec<Parameter>,
    len: usize,
}

impl ParameterTable {
    /// Appends a parameter and gives its number.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> usize {
        let parameter = Parameter { name: name.into(), shape: shape.to_vec(), init, start: self.len };
        self.len += parameter.len().next_multiple_of(ALIGNMENT);
        self.parameters.push(parameter);
        self.parameters.len() - 1
    }

    /// The parameters.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of a flat tensor, the gaps between parameters included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first parameter.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Trained numbers.
    pub fn count(&self) -> usize {
        self.parameters.iter().map(Parameter::len).sum()
    }

    /// Initial values of the flat tensor; the gaps are zeros.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for (number, parameter) in self.parameters.iter().enumerate() {
            let to = values.get_mut(parameter.start..parameter.start + parameter.len()).unwrap_or_default();
            match parameter.init {
                Init::Ones => to.fill(1.0),
                Init::Normal(deviation) => {
                    let stream = splitmix64(splitmix64(seed) ^ number as u64);
                    to.par_iter_mut().enumerate().for_each(|(i, x)| *x = (normal(stream, i as u64) * deviation) as f32);
                }
            }
        }
        values
    }

    /// A view of a flat tensor for each parameter.
    ///
    /// # Errors
    /// As [`Recording::view`].
    pub fn views(&self, recording: &mut Recording, prefix: &str, flat: Tensor) -> Result<Vec<Tensor>> {
        self.parameters.iter().map(|p| recording.view(format!("{prefix}{}", p.name), flat, p.start, &p.shape)).collect()
    }

    /// The flat external tensor of this table's length.
    ///
    /// # Errors
    /// As [`Recording::external`].
    pub fn flat(&self, recording: &mut Recording, name: &str, element: Element) -> Result<Tensor> {
        recording.external(name, element, &[self.len])
    }
}

/// Number `i` of a stream of normal numbers (Box and Muller).
fn normal(stream: u64, i: u64) -> f64 {
    let unit = |j: u64| (splitmix64(stream.wrapping_add(j)) >> 11) as f64 / (1u64 << 53) as f64;
    let (a, b) = (unit(2 * i), unit(2 * i + 1));
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_have_their_deviation() {
        let mut table = ParameterTable::default();
        table.add("norm", &[24], Init::Ones);
        table.add("matrix", &[100, 100], Init::Normal(0.5));
        let values = table.initial(1);
        assert!(values[..24].iter().all(|&x| x == 1.0) && values[24..128].iter().all(|&x| x == 0.0));
        let matrix = &values[128..128 + 10_000];
        let mean = matrix.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e4;
        let square = matrix.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / 1e4;
        // Five standard errors.
        assert!(mean.abs() < 5.0 * 0.5 / 100.0 && (square.sqrt() - 0.5).abs() < 5.0 * 0.5 / 141.0, "{mean} {square}");
    }
}
