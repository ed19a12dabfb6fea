//! The golden vectors in `tests/golden` on the CPU and on every device, and what the reader says of broken ones.
//!
//! The published implementation made the files of the folder itself, and the formulas of the spec in numpy
//! (`tests/peers/lighthouse.py`) those of `peer`: GQA, MQA, larger heads, and tokens that divide nothing.

mod support;

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use support::checks::{Check, assert_all_pass};
use support::golden;

fn assert_golden(folder: &str, count: usize) {
    let cases = golden::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).expect("readable");
    assert_eq!(cases.len(), count);
    assert_all_pass(&cases.into_iter().map(Check::golden).collect::<Vec<_>>());
}

#[test]
fn golden_vectors_hold() {
    assert_golden("tests/golden", 3);
}

#[test]
fn golden_vectors_of_the_peer_hold() {
    assert_golden("tests/golden/peer", 5);
}

#[test]
fn inputs_are_the_documented_ones() {
    // Spec section 10.
    let q = support::data::tensor(1, 0, &[1, 1024, 1, 8]);
    assert_eq!(q[..4], [0.13780701, -0.14386487, -0.7751771, -0.1651876]);
}

/// A golden folder that is removed at the end of its test.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tensor of a file: name, type, shape and bytes.
type Entry = (&'static str, Dtype, Vec<usize>, Vec<u8>);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("golden-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("created");
        Self(dir)
    }

    fn cases(&self, text: &str) {
        std::fs::write(self.0.join("cases.toml"), text).expect("written");
    }

    fn tensors(&self, file: &str, entries: &[Entry]) {
        let views = entries.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape says"))
        });
        let bytes = safetensors::serialize(views, None).expect("serialized");
        std::fs::write(self.0.join(file), bytes).expect("written");
    }

    /// What the reader says, which is one line.
    fn error(&self) -> String {
        let message = golden::read(&self.0).expect_err("broken").to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    }
}

/// A case with 20 tokens, GQA, and a sub-sequence of 26 entries.
const CASE: &str = "[[case]]
file = \"x.safetensors\"
seed = 3
batch = 1
tokens = 20
heads = 4
kv_heads = 2
head_dim = 8
levels = 2
pooling = 2
top_k = 8
chunk = 4
";

fn floats(name: &'static str, shape: &[usize]) -> Entry {
    (name, Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
}

fn ints(name: &'static str, shape: &[usize], values: impl IntoIterator<Item = i32>) -> Entry {
    (name, Dtype::I32, shape.to_vec(), values.into_iter().flat_map(i32::to_le_bytes).collect())
}

/// Tensors that fit [`CASE`], for so many rows.
fn tensors(rows: usize) -> Vec<Entry> {
    vec![
        floats("o", &[1, rows, 4, 8]),
        floats("dq", &[1, rows, 4, 8]),
        floats("dk", &[1, rows, 2, 8]),
        floats("dv", &[1, rows, 2, 8]),
        ints("indices", &[1, 4, 26], [0; 104]),
    ]
}

#[test]
fn a_case_is_read_with_gqa_chunk_and_rows() {
    let folder = Folder::new("good");
    folder.cases(CASE);
    folder.tensors("x.safetensors", &tensors(20));
    let case = &golden::read(&folder.0).expect("readable")[0];
    assert_eq!((case.shape.kv_heads, case.config.chunk, case.seed), (2, 4, 3));
    assert_eq!(case.pick(vec![1.0; 20 * 32]).len(), 20 * 32);

    let mut of_rows = tensors(3);
    of_rows.push(ints("rows", &[3], [19, 0, 7]));
    folder.tensors("x.safetensors", &of_rows);
    let case = &golden::read(&folder.0).expect("readable")[0];
    let numbered = |heads: usize| (0..20 * heads * 8).map(|i| (i / (heads * 8)) as f32).collect::<Vec<_>>();
    for heads in [4, 2] {
        let picked = case.pick(numbered(heads));
        let expected: Vec<f32> = [19.0, 0.0, 7.0].iter().flat_map(|&token| vec![token; heads * 8]).collect();
        assert_eq!(picked, expected);
    }
}

#[test]
fn chunk_has_a_default_and_one_level_needs_no_indices() {
    let folder = Folder::new("dense");
    folder.cases(&CASE.replace("levels = 2", "levels = 1").replace("chunk = 4\n", "").replace("= 8\n", "= 128\n"));
    let wide = |name, heads| floats(name, &[1, 20, heads, 128]);
    let mut entries = vec![wide("o", 4), wide("dq", 4), wide("dk", 2), wide("dv", 2)];
    folder.tensors("x.safetensors", &entries);
    let case = &golden::read(&folder.0).expect("readable")[0];
    assert_eq!((case.config.chunk, case.indices.as_deref()), (128, None));

    entries.push(ints("indices", &[1, 4, 20], (0..4).flat_map(|_| 0..20)));
    folder.tensors("x.safetensors", &entries);
    assert!(golden::read(&folder.0).expect("the identity is allowed")[0].indices.is_none());

    entries[4] = ints("indices", &[1, 4, 20], (0..4).flat_map(|_| (0..20).rev()));
    folder.tensors("x.safetensors", &entries);
    assert!(folder.error().contains("`indices` is not 0, 1, .."), "{}", folder.error());
}

#[test]
fn broken_lists_of_cases_are_named() {
    let folder = Folder::new("cases");
    assert!(folder.error().contains("cases.toml: No such file"), "{}", folder.error());
    for (text, named) in [
        ("", "cases.toml:1: missing field `case`"),
        ("case = []", "lists no case"),
        ("[[case]\n", "cases.toml:1:"),
        (&CASE.replace("chunk", "chnk"), "cases.toml:12: unknown field `chnk`"),
        (&CASE.replace("kv_heads = 2\n", ""), "cases.toml:1: missing field `kv_heads`"),
        (&CASE.replace("tokens = 20", "tokens = -1"), "cases.toml:5: invalid value: integer `-1`"),
        (&CASE.replace("seed = 3", "seed = \"3\""), "cases.toml:3: invalid type: string \"3\""),
        (&CASE.replace("pooling = 2", "pooling = 3"), "case `x.safetensors`: pooling = 3 is not allowed"),
        (&CASE.replace("kv_heads = 2", "kv_heads = 3"), "kv_heads = 3 is not allowed"),
        (CASE, "x.safetensors: No such file"),
    ] {
        folder.cases(text);
        assert!(folder.error().contains(named), "{named:?} is not in {:?}", folder.error());
    }
}

#[test]
fn broken_tensors_are_named() {
    let folder = Folder::new("tensors");
    folder.cases(CASE);
    std::fs::write(folder.0.join("x.safetensors"), b"no header").expect("written");
    assert!(folder.error().contains("x.safetensors: not a safetensors file"), "{}", folder.error());

    let with = |at: usize, entry: Entry| {
        let mut entries = tensors(20);
        entries[at] = entry;
        entries
    };
    let and = |entry: Entry| tensors(20).into_iter().chain([entry]).collect::<Vec<_>>();
    let mut holed = floats("dq", &[1, 20, 4, 8]);
    holed.3[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut short = tensors(3);
    short.push(ints("rows", &[2], [1, 2]));
    for (entries, named) in [
        (tensors(20)[..4].to_vec(), "tensor `indices` is missing; the file holds: dk, dq, dv, o"),
        (tensors(20)[1..].to_vec(), "tensor `o` is missing"),
        (with(2, floats("dk", &[1, 20, 4, 8])), "tensor `dk` has shape [1, 20, 4, 8], not [1, 20, 2, 8]"),
        (with(3, ints("dv", &[1, 20, 2, 8], [0; 320])), "tensor `dv` has type I32, not F32"),
        (with(4, floats("indices", &[1, 4, 26])), "tensor `indices` has type F32, not I32"),
        (with(4, ints("indices", &[1, 4, 25], [0; 100])), "tensor `indices` has shape [1, 4, 25], not [1, 4, 26]"),
        (with(4, ints("indices", &[1, 4, 26], [30; 104])), "tensor `indices` holds 30; entries are 0 to 29"),
        (with(4, ints("indices", &[1, 4, 26], [-1; 104])), "tensor `indices` holds -1"),
        (with(1, holed), "tensor `dq` holds NaN at element 100"),
        (and(ints("rows", &[2], [0, 20])), "tensor `rows` holds 20; tokens are 0 to 19"),
        (and(ints("rows", &[2], [0, -3])), "tensor `rows` holds -3"),
        (and(ints("rows", &[1, 2], [0, 1])), "tensor `rows` has shape [1, 2]"),
        (and(floats("rows", &[2])), "tensor `rows` has type F32, not I32"),
        (short, "tensor `o` has shape [1, 3, 4, 8], not [1, 2, 4, 8]"),
    ] {
        folder.tensors("x.safetensors", &entries);
        let message = folder.error();
        assert!(message.contains("x.safetensors: ") && message.contains(named), "{named:?} is not in {message:?}");
    }
}
