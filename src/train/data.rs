//! Byte-level text: where it comes from, its held-out part, and sequences drawn from it.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Text of which one part trains and another is held out.
#[derive(Clone, Debug)]
pub struct Corpus {
    bytes: Vec<u8>,
    /// Bytes that one sample takes: a sequence and the byte after it.
    sample: usize,
    train: Vec<Range<usize>>,
    held_out: Vec<Range<usize>>,
}

/// A sequence and what is to be predicted from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The id that follows each.
    pub targets: Vec<u32>,
}

/// What errors call text that is in memory.
const TEXT: &str = "in memory";
/// Every this many-th block is held out.
const HELD_OUT_EVERY: usize = 16;
/// Bytes of a block, where sequences are not longer.
const BLOCK: usize = 64 * 1024;

impl Corpus {
    /// Reads a file, or all files below a folder in the order of their paths, for sequences of `tokens` bytes.
    ///
    /// # Errors
    /// [`Error::Data`] if the path does not exist, cannot be read, or holds fewer bytes than two sequences (one to train
    /// on, one held out).
    pub fn read(path: &Path, tokens: usize) -> Result<Self> {
        let error = |problem: String| Error::Data { path: path.display().to_string(), problem };
        let metadata = fs::metadata(path).map_err(|e| error(e.to_string()))?;
        let files = if metadata.is_dir() { files_below(path, |_| true) } else { vec![path.to_owned()] };
        Self::from_files(&files, usize::MAX, tokens).map_err(|problem| match problem {
            Error::Data { path, problem } if path == TEXT => error(problem),
            other => other,
        })
    }

    /// Concatenates files, at most `limit` bytes of them.
    ///
    /// # Errors
    /// [`Error::Data`] if one cannot be read or there are fewer bytes than two sequences.
    pub fn from_files(files: &[PathBuf], limit: usize, tokens: usize) -> Result<Self> {
        let mut bytes = Vec::new();
        for file in files {
            if bytes.len() >= limit {
                break;
            }
            let read =
                fs::read(file).map_err(|e| Error::Data { path: file.display().to_string(), problem: e.to_string() })?;
            bytes.extend_from_slice(&read);
        }
        bytes.truncate(limit);
        Self::new(bytes, tokens)
    }

    /// Splits text. Of every sixteen blocks one is held out; of a text with fewer blocks, the end.
    ///
    /// # Errors
    /// [`Error::Data`] if it holds fewer bytes than two sequences.
    pub fn new(bytes: Vec<u8>, tokens: usize) -> Result<Self> {
        let sample = tokens + 1;
        let len = bytes.len();
        if len < 2 * sample {
            return Err(Error::Data {
                path: TEXT.into(),
                problem: format!(
                    "holds {len} bytes; sequences of {tokens} tokens need at least {} (one to train on, one held out, \
                     each with the byte that follows it)",
                    2 * sample
                ),
            });
        }
        let block = BLOCK.max(4 * sample);
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        if len / block >= HELD_OUT_EVERY {
            for (i, start) in (0..len).step_by(block).enumerate() {
                let range = start..(start + block).min(len);
                if range.len() >= sample {
                    if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 { held_out.push(range) } else { train.push(range) }
                }
            }
        } else {
            let cut = len - (len / HELD_OUT_EVERY).max(sample);
            train.push(0..cut);
            held_out.push(cut..len);
        }
        Ok(Self { bytes, sample, train, held_out })
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never true: a corpus holds at least two sequences.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Entropy of single bytes in nats: the loss of a model that knows their frequencies and nothing else.
    pub fn byte_entropy(&self) -> f64 {
        let mut counts = [0u64; 256];
        for &byte in &self.bytes {
            if let Some(count) = counts.get_mut(usize::from(byte)) {
                *count += 1;
            }
        }
        let total = self.bytes.len() as f64;
        counts.iter().filter(|&&count| count > 0).map(|&count| count as f64 / total).map(|p| -p * p.ln()).sum()
    }

    /// The number-th training sample of a seed.
    pub fn sample(&self, seed: u64, number: u64) -> Sample {
        let starts = |range: &Range<usize>| range.len() + 1 - self.sample;
        let total: usize = self.train.iter().map(starts).sum();
        let mut at = (splitmix64(splitmix64(seed) ^ number) % total.max(1) as u64) as usize;
        for range in &self.train {
            if at < starts(range) {
                return self.cut(range.start + at);
            }
            at -= starts(range);
        }
        self.cut(0)
    }

    /// Up to `count` held-out samples, evenly spread and without overlap.
    pub fn held_out(&self, count: usize) -> Vec<Sample> {
        let starts: Vec<usize> = self
            .held_out
            .iter()
            .flat_map(|range| (range.start..=range.end - self.sample).step_by(self.sample))
            .collect();
        let count = count.clamp(1, starts.len().max(1));
        (0..count).filter_map(|i| starts.get(i * starts.len() / count)).map(|&start| self.cut(start)).collect()
    }

    fn cut(&self, start: usize) -> Sample {
        let bytes = self.bytes.get(start..start + self.sample).unwrap_or_default();
        let ids = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).collect();
        Sample {
            ids: bytes.split_last().map_or(Vec::new(), |(_, bytes)| ids(bytes)),
            targets: bytes.split_first().map_or(Vec::new(), |(_, bytes)| ids(bytes)),
        }
    }
}

/// The mixing function of the golden vectors (spec section 10).
pub(crate) fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Files below a folder that `wanted` takes, in the order of their paths. Folders that cannot be read are passed over,
/// as are links (they could lead in a circle).
fn files_below(folder: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
    entries.sort();
    let mut files = Vec::new();
    for path in entries {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => files.extend(files_below(&path, wanted)),
            Ok(metadata) if metadata.is_file() && wanted(&path) => files.push(path),
            _ => {}
        }
    }
    files
}

/// Real text that is on any machine that built the crate: its own sources, then those of the packages in its lock file
/// from cargo's registry, by name.
///
/// `manifest` is the folder of the crate's `Cargo.toml`.
///
/// # Errors
/// [`Error::Data`] if there is no lock file.
pub fn crate_sources(manifest: &Path) -> Result<Vec<PathBuf>> {
    let source = |path: &Path| path.extension().is_some_and(|e| e == "rs" || e == "wgsl");
    let mut files = Vec::new();
    for folder in ["src", "shaders", "tests", "examples"] {
        files.extend(files_below(&manifest.join(folder), source));
    }
    let lock = manifest.join("Cargo.lock");
    let lock = fs::read_to_string(&lock)
        .map_err(|e| Error::Data { path: lock.display().to_string(), problem: e.to_string() })?;
    let value =
        |line: &str, key: &str| line.strip_prefix(key).and_then(|rest| rest.strip_suffix('"')).map(str::to_owned);
    let mut packages: Vec<String> = Vec::new();
    let mut name = None;
    for line in lock.lines() {
        if let Some(found) = value(line, "name = \"") {
            name = Some(found);
        } else if let (Some(version), Some(name)) = (value(line, "version = \""), name.take()) {
            packages.push(format!("{name}-{version}"));
        }
    }
    packages.sort();
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .unwrap_or_default();
    let registries: Vec<PathBuf> = fs::read_dir(home.join("registry/src"))
        .map(|r| r.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    for package in packages {
        if let Some(folder) = registries.iter().map(|registry| registry.join(&package)).find(|folder| folder.is_dir()) {
            files.extend(files_below(&folder, source));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| (splitmix64(i as u64) % 64) as u8).collect()
    }

    #[test]
    fn training_and_held_out_text_do_not_meet() -> Result<()> {
        for (len, tokens) in [(2_000_000, 100), (2_000_000, 100_000), (300, 100), (202, 100)] {
            let corpus = Corpus::new(text(len), tokens)?;
            for train in &corpus.train {
                assert!(corpus.held_out.iter().all(|held| held.end <= train.start || train.end <= held.start));
            }
            for number in 0..50 {
                let Sample { ids, targets } = corpus.sample(3, number);
                assert_eq!((ids.len(), targets.len()), (tokens, tokens));
                assert_eq!(ids[1..], targets[..tokens - 1]);
            }
            assert!(!corpus.held_out(8).is_empty());
        }
        Ok(())
    }

    #[test]
    fn too_little_text_is_refused() {
        let message = Corpus::new(text(201), 100).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("201 bytes") && message.contains("202"), "{message}");
        let message = Corpus::read(Path::new("no/such/path"), 10).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("no/such/path"), "{message}");
    }

    #[test]
    fn entropy_of_equal_bytes_is_their_logarithm() -> Result<()> {
        let corpus = Corpus::new((0..4096).map(|i| (i % 16) as u8).collect(), 8)?;
        assert!((corpus.byte_entropy() - 16f64.ln()).abs() < 1e-12);
        Ok(())
    }
}
