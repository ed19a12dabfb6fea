//! Golden vectors (spec section 10): a folder with `cases.toml` and a safetensors file per case. Inputs are made by a
//! formula, results were computed by the published implementation, or from the spec by `tests/peers/lighthouse.py`.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use lighthouse_attention::{Element, LighthouseConfig, Shape};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Why a golden folder cannot be used: the file and, where there is one, the tensor are named.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// A file that cannot be read.
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    /// `cases.toml` is no table of cases.
    #[error("{}:{line}: {problem}", path.display())]
    Cases { path: PathBuf, line: usize, problem: String },
    /// A case's parameters are out of range.
    #[error("{}: case `{file}`: {problem}", path.display())]
    Parameters { path: PathBuf, file: String, problem: String },
    /// A file that is no safetensors file.
    #[error("{}: not a safetensors file: {problem}", path.display())]
    Container { path: PathBuf, problem: String },
    /// A tensor is missing, has the wrong type or shape, or values that cannot be.
    #[error("{}: tensor `{tensor}` {problem}", path.display())]
    Tensor { path: PathBuf, tensor: &'static str, problem: String },
}

/// `cases.toml`. Unknown keys are refused: a misspelt `chunk` would change what is computed.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    case: Vec<Parameters>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    file: String,
    seed: u64,
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    levels: usize,
    pooling: usize,
    top_k: usize,
    #[serde(default = "default_chunk")]
    chunk: usize,
}

fn default_chunk() -> usize {
    LighthouseConfig::default().chunk
}

/// One case with its expected results.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file's name without its ending.
    pub name: String,
    pub seed: u64,
    pub shape: Shape,
    pub config: LighthouseConfig,
    /// `[B, H, S]`; `None` for dense attention, which selects nothing.
    pub indices: Option<Vec<u32>>,
    /// The tokens that the expected results hold; `None` for all.
    pub rows: Option<Vec<usize>>,
    /// `o`, `dq` `[B, N or rows, H, D]` and `dk`, `dv` `[B, N or rows, KV, D]`.
    pub results: [(&'static str, Vec<f32>); 4],
}

/// Reads `DIR/cases.toml` and the files that it names.
pub fn read(dir: &Path) -> Result<Vec<Case>, GoldenError> {
    let path = dir.join("cases.toml");
    let text = std::fs::read_to_string(&path).map_err(|error| GoldenError::Read { path: path.clone(), error })?;
    let cases: Cases = toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..start].iter().filter(|&&byte| byte == b'\n').count() + 1;
        let problem = error.message().lines().collect::<Vec<_>>().join("; ");
        GoldenError::Cases { path: path.clone(), line, problem }
    })?;
    if cases.case.is_empty() {
        return Err(GoldenError::Cases { path, line: 1, problem: "lists no case".into() });
    }
    cases.case.into_iter().map(|parameters| Case::read(dir, &path, parameters)).collect()
}

impl Case {
    fn read(dir: &Path, cases: &Path, parameters: Parameters) -> Result<Self, GoldenError> {
        let Parameters { file, seed, batch, tokens, heads, kv_heads, head_dim, levels, pooling, top_k, chunk } =
            parameters;
        let shape = Shape { batch, tokens, heads, kv_heads, head_dim, element: Element::F32 };
        let config = LighthouseConfig { levels, pooling, top_k, chunk };
        let refused = |problem: lighthouse_attention::Error| GoldenError::Parameters {
            path: cases.to_owned(),
            file: file.clone(),
            problem: problem.to_string(),
        };
        shape.check().map_err(refused)?;
        let pyramid = config.pyramid(tokens).map_err(refused)?;

        let path = dir.join(&file);
        let bytes = std::fs::read(&path).map_err(|error| GoldenError::Read { path: path.clone(), error })?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| GoldenError::Container { path: path.clone(), problem: error.to_string() })?;
        let file = File { path: &path, tensors };

        let rows = match file.tensors.tensor("rows") {
            Err(_) => None,
            Ok(view) => Some(file.rows(&view, tokens)?),
        };
        let count = rows.as_ref().map_or(tokens, Vec::len);
        let of_heads = |name, heads| Ok((name, file.floats(name, &[batch, count, heads, head_dim])?));
        let results =
            [of_heads("o", heads)?, of_heads("dq", heads)?, of_heads("dk", kv_heads)?, of_heads("dv", kv_heads)?];
        let entries = pyramid.padded_tokens + pyramid.entries;
        let indices = match file.tensors.tensor("indices") {
            // Dense attention has no selection, and a file need not say so.
            Err(_) if levels == 1 => None,
            _ => Some(file.indices(&[batch, heads, pyramid.gathered], entries)?),
        };
        if levels == 1 && indices.iter().flatten().enumerate().any(|(at, &index)| index as usize != at % tokens) {
            return Err(file.error("indices", "is not 0, 1, .. tokens - 1 in every head, as levels = 1 has it"));
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, seed, shape, config, indices: indices.filter(|_| levels > 1), rows, results })
    }

    /// Keeps the tokens that the case has results for: `values` is `[B, N, heads, D]`.
    pub fn pick(&self, values: Vec<f32>) -> Vec<f32> {
        let Some(rows) = &self.rows else { return values };
        let row = values.len() / (self.shape.batch * self.shape.tokens);
        let batches = values.chunks_exact(self.shape.tokens * row);
        batches.flat_map(|of_batch| rows.iter().flat_map(|&token| &of_batch[token * row..][..row])).copied().collect()
    }
}

struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl File<'_> {
    fn error(&self, tensor: &'static str, problem: impl Display) -> GoldenError {
        GoldenError::Tensor { path: self.path.to_owned(), tensor, problem: problem.to_string() }
    }

    fn typed(&self, tensor: &'static str, view: &TensorView<'_>, dtype: Dtype) -> Result<(), GoldenError> {
        if view.dtype() != dtype {
            return Err(self.error(tensor, format!("has type {:?}, not {dtype:?}", view.dtype())));
        }
        Ok(())
    }

    /// A tensor's bytes, after a check of its type and shape.
    fn bytes(&self, tensor: &'static str, dtype: Dtype, shape: &[usize]) -> Result<Vec<[u8; 4]>, GoldenError> {
        let view = self.tensors.tensor(tensor).map_err(|_| {
            let mut names = self.tensors.names();
            names.sort_unstable();
            self.error(tensor, format!("is missing; the file holds: {}", names.join(", ")))
        })?;
        self.typed(tensor, &view, dtype)?;
        if view.shape() != shape {
            return Err(self.error(tensor, format!("has shape {:?}, not {shape:?}", view.shape())));
        }
        Ok(words(&view))
    }

    fn floats(&self, tensor: &'static str, shape: &[usize]) -> Result<Vec<f32>, GoldenError> {
        let values: Vec<f32> = self.bytes(tensor, Dtype::F32, shape)?.into_iter().map(f32::from_le_bytes).collect();
        match values.iter().position(|x| !x.is_finite()) {
            Some(at) => Err(self.error(tensor, format!("holds {} at element {at}", values[at]))),
            None => Ok(values),
        }
    }

    fn indices(&self, shape: &[usize], entries: usize) -> Result<Vec<u32>, GoldenError> {
        let within = |word| match i32::from_le_bytes(word) {
            index if (0..entries as i64).contains(&i64::from(index)) => Ok(index as u32),
            index => Err(self.error("indices", format!("holds {index}; entries are 0 to {}", entries - 1))),
        };
        self.bytes("indices", Dtype::I32, shape)?.into_iter().map(within).collect()
    }

    fn rows(&self, view: &TensorView<'_>, tokens: usize) -> Result<Vec<usize>, GoldenError> {
        self.typed("rows", view, Dtype::I32)?;
        if view.shape().len() != 1 || view.shape() == [0] {
            return Err(self.error("rows", format!("has shape {:?}, not one axis of tokens", view.shape())));
        }
        let within = |word| match i32::from_le_bytes(word) {
            row if (0..tokens as i64).contains(&i64::from(row)) => Ok(row as usize),
            row => Err(self.error("rows", format!("holds {row}; tokens are 0 to {}", tokens - 1))),
        };
        words(view).into_iter().map(within).collect()
    }
}

/// A tensor's elements of four bytes; the file need not align them.
fn words(view: &TensorView<'_>) -> Vec<[u8; 4]> {
    view.data().chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]).collect()
}
