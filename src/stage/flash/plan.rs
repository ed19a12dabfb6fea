//! Tile sizes of the attention kernels, and how their work is cut into dispatches. Pure functions: the one place to
//! tune them, tested without a GPU.

use super::{FlashShape, coop};
use crate::error::{Error, Result};
use crate::gpu::{Caps, ComponentLayout};
use crate::tensor::Element;

/// A kernel with its tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The kernel's file below `shaders/`.
    pub shader: &'static str,
    /// Queries of a tile, BLOCK_M.
    pub block_m: usize,
    /// Keys of a tile, BLOCK_N.
    pub block_n: usize,
    /// Rows and columns of the kernel's cooperative matrices, if it uses any.
    pub matrix: Option<usize>,
    /// How subgroups hold them, if the kernel takes their components.
    pub layout: Option<ComponentLayout>,
    /// The kernel's other constants.
    pub constants: Vec<(&'static str, usize)>,
    /// Invocations of a workgroup.
    pub invocations: usize,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: usize,
}

/// The tiles of the three kernels that stream over tiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TilePlan {
    /// The forward keeps a block of queries.
    pub forward: Tile,
    /// The backward for k and v keeps a block of keys.
    pub dkdv: Tile,
    /// The backward for q keeps a block of queries.
    pub dq: Tile,
}

/// The forward without matrices: it alone has maxima and sums of a group of invocations.
pub(super) const FORWARD: &str = "attention/flash_forward";
/// Bytes of four f32 in workgroup memory.
const VEC4: usize = 16;
/// Lanes whose streamed rows are staged at a time (`STAGED_LANES`), four rows each.
const STAGED_LANES: usize = 8;
/// Columns of four elements that fit beside the tile in 16 KiB.
const STAGED_COLUMNS: usize = 16;

/// Chooses the kernels for a device, a head_dim and a storage type. Where a shape does not fit the device's tier it gets
/// the kernels of the next one.
///
/// # Errors
/// [`Error::Limit`] if the device has less than WebGPU's default limits.
pub fn plan(caps: &Caps, head_dim: usize, element: Element) -> Result<TilePlan> {
    let (block_m, block_n) = (64, 32);
    let choose = |shader, coop: Option<Tile>, kept| match coop {
        Some(tile) => Ok(tile),
        None => {
            if caps.tier.matrix().is_some() {
                tracing::debug!(tier = %caps.tier, head_dim, %element, shader, "does not fit cooperative matrices");
            }
            simt(caps, shader, head_dim, block_m, block_n, kept)
        }
    };
    Ok(TilePlan {
        forward: choose(FORWARD, coop::forward(caps, head_dim, element), block_m)?,
        dkdv: choose("attention/flash_backward_dkdv", coop::dkdv(caps, head_dim, element, None), block_n)?,
        dq: choose("attention/flash_backward_dq", coop::dq(caps, head_dim, element), block_m)?,
    })
}

/// A tile of which the workgroup keeps one side, `kept` being `block_m` or `block_n`, and streams over the other.
fn simt(
    caps: &Caps,
    shader: &'static str,
    head_dim: usize,
    block_m: usize,
    block_n: usize,
    kept: usize,
) -> Result<Tile> {
    let columns = head_dim / 4;
    let streamed = block_m + block_n - kept;
    let lanes = streamed / 4;
    // At most 9 columns fit 16 KiB; the steps are made equal.
    let chunk = columns.div_ceil(columns.div_ceil(9));
    let stride = chunk | 1;
    let sums = columns.div_ceil(lanes);
    let strips = (STAGED_COLUMNS / lanes).min(sums);
    let rows_by_rows = (kept + streamed) * stride;
    let weighted_rows = kept * lanes + 4 * STAGED_LANES * strips * lanes;
    let stages = sums.div_ceil(strips);
    let tile = Tile {
        shader,
        block_m,
        block_n,
        matrix: None,
        layout: None,
        constants: vec![("CHUNK", chunk), ("STAGES", stages), ("STRIPS", strips), ("SUMS", stages * strips)],
        invocations: kept / 4 * lanes,
        workgroup_bytes: VEC4 * rows_by_rows.max(weighted_rows),
    };
    let limits = &caps.limits;
    for (what, needed, limit, available) in [
        (
            "workgroup memory",
            tile.workgroup_bytes,
            "max_compute_workgroup_storage_size",
            limits.max_compute_workgroup_storage_size,
        ),
        (
            "invocations",
            tile.invocations,
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup,
        ),
    ] {
        if needed as u64 > u64::from(available) {
            let what = format!("an attention tile of {block_m} queries by {block_n} keys, counted in {what},");
            return Err(Error::Limit { what, needed: needed as u64, limit, available: u64::from(available) });
        }
    }
    Ok(tile)
}

/// Invocations with matrices that a multiprocessor runs at a time, with what its registers hold.
const RESIDENT: usize = 256;
/// What all heads read between two workgroups of one head, from which on few heads at a time are faster.
const BETWEEN_BYTES: usize = 10 << 20;
/// Heads at a time are at least so many, and give each multiprocessor at least so many rounds of workgroups.
const LEAST_HEADS: usize = 2;
const LEAST_ROUNDS: f64 = 1.9;

/// Of how many heads at a time a kernel that streams over keys takes its units.
///
/// Workgroups of one head that began one after the other are `tokens` / (multiprocessors / heads at a time) keys apart, and
/// the later one finds keys and values in the cache if it holds what all heads read in between. Where it may not, as few
/// heads go at a time as keep all multiprocessors busy to the end. Forward on an H200 in milliseconds, all heads at a time
/// / the number here: head_dim 128, 8 heads of 49,152 tokens 16.8 / 16.5, 98,304 69.8 / 67.3, 131,072 128.5 / 121.9; 32 of
/// 4,096 0.553 / 0.543, of 18,432 9.65 / 9.50; 128 of 1,024 0.219 / 0.202, of 2,048 0.670 / 0.605. (One head at a time:
/// 17.5, 70.6 and 117.0 with 8 heads. Of 32,768 and fewer tokens 8 heads gain nothing.)
fn heads_at_once(caps: &Caps, shape: &FlashShape, tile: &Tile) -> usize {
    let FlashShape { tokens, heads, head_dim, element, .. } = *shape;
    let blocks = tokens.div_ceil(tile.block_m);
    let of_token = 2 * head_dim * element.bytes() as usize;
    if tile.matrix.is_none() || heads * heads * tokens / caps.processors.get() * of_token < BETWEEN_BYTES {
        return heads;
    }
    let rounds =
        |at_once: usize| (at_once * blocks * tile.invocations) as f64 / (caps.processors.get() * RESIDENT) as f64;
    let fewest = (LEAST_HEADS..heads).find(|&at_once| heads.is_multiple_of(at_once) && rounds(at_once) >= LEAST_ROUNDS);
    fewest.unwrap_or(heads)
}

/// Keys and values of the heads at a time that are read at full rate in any order (an H200, whose cache has 50 MB).
const CACHED_BYTES: usize = 64 << 20;

/// The units of a kernel that has a workgroup for each block of queries of each head.
///
/// The workgroups of a round, as many as the GPU runs at a time, begin with the longest. The one that ends first takes the
/// longest of the next round, so after two rounds all end together. Where the cache does not hold the keys and values that
/// they read, they are fast only while they read them together, and lose step after some rounds: then a dispatch has two
/// rounds, and all begin anew. Forward on an H200, head_dim 128, 2 heads at a time, one dispatch / two rounds in each: 8 heads
/// of 98,304 tokens 64.6 / 60.9 ms, of 131,072 123.0 / 107.8.
pub(super) fn query_units(caps: &Caps, shape: &FlashShape, tile: &Tile, batch: usize) -> Units {
    let FlashShape { tokens, heads, kv_heads, head_dim, element, .. } = *shape;
    let at_once = heads_at_once(caps, shape, tile);
    let kv_at_once = (at_once * kv_heads / heads).max(1);
    let in_step = tile.matrix.is_some()
        && caps.processors_known
        && kv_at_once >= LEAST_HEADS
        && kv_at_once * tokens * 2 * head_dim * element.bytes() as usize > CACHED_BYTES;
    let round = caps.processors.get() * (RESIDENT / tile.invocations).max(1);
    Units {
        times: batch * heads / at_once,
        blocks: tokens.div_ceil(tile.block_m),
        heads: at_once,
        most: in_step.then_some(2 * round),
    }
}

/// The units of a kernel, in order: so many times, blocks, of each of so many heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    pub times: usize,
    pub blocks: usize,
    pub heads: usize,
    /// Most of them in a dispatch, which then has those of one time only.
    pub most: Option<usize>,
}

impl Units {
    pub fn new(times: usize, blocks: usize, heads: usize) -> Self {
        Self { times, blocks, heads, most: None }
    }
}

/// One dispatch's part of a kernel's units. A unit is a workgroup's work: a block of one head of one batch entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub first_unit: u32,
    pub units: u32,
    /// Floating-point operations.
    pub work: u64,
}

/// Cuts units 0.. into dispatches of at most `limit` work, in order; a unit of more work is a dispatch by itself. A
/// unit's number is `(time * blocks + block) * heads + head`, and `work` gives the work of a block.
pub(super) fn cut(units: Units, work: impl Fn(usize) -> u64, limit: u64) -> Vec<Part> {
    let Units { times, blocks, heads, most } = units;
    let mut parts = Vec::new();
    let mut part = Part { first_unit: 0, units: 0, work: 0 };
    for unit in 0..times * blocks * heads {
        let work = work(unit / heads % blocks);
        let is_full = most.is_some_and(|most| part.units as usize == most || unit.is_multiple_of(blocks * heads));
        if part.units > 0 && (is_full || part.work.saturating_add(work) > limit) {
            parts.push(part);
            part = Part { first_unit: unit as u32, units: 0, work: 0 };
        }
        part.units += 1;
        part.work = part.work.saturating_add(work);
    }
    parts.push(part);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_HEAD_DIM;

    #[test]
    fn every_head_dim_fits_the_default_limits() -> Result<()> {
        let caps = Caps::default();
        for head_dim in (8..=MAX_HEAD_DIM).step_by(8) {
            let plan = plan(&caps, head_dim, Element::F32)?;
            let (block_m, block_n) = (plan.forward.block_m, plan.forward.block_n);
            for (tile, kept) in [(plan.forward, block_m), (plan.dkdv, block_n), (plan.dq, block_m)] {
                assert!(tile.workgroup_bytes <= 16 << 10, "{head_dim}: {tile:?}");
                assert!(tile.invocations <= 256, "{head_dim}: {tile:?}");
                let lanes = (block_m + block_n - kept) / 4;
                let sums = tile.constants.iter().find(|(name, _)| *name == "SUMS").map_or(0, |(_, sums)| *sums);
                assert!(4 * sums * lanes >= head_dim, "{head_dim}: {tile:?}");
                assert!(lanes.is_multiple_of(STAGED_LANES), "{head_dim}: {tile:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn too_little_workgroup_memory_is_named() {
        let mut caps = Caps::default();
        caps.limits.max_compute_workgroup_storage_size = 8 << 10;
        let message = plan(&caps, 128, Element::F32).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("max_compute_workgroup_storage_size is 8192"), "{message}");
    }

    #[test]
    fn long_sequences_take_few_heads_at_a_time() {
        let caps = coop::tests::caps();
        let of = |tokens: usize, heads, element| {
            let tile = plan(&caps, 128, element).expect("fits").forward;
            let shape = FlashShape { heads, ..coop::tests::shape(tokens, heads, element) };
            heads_at_once(&caps, &shape, &tile)
        };
        assert_eq!(of(32_768, 8, Element::F16), 8);
        assert_eq!(of(49_152, 8, Element::F16), 2);
        assert_eq!(of(262_144, 8, Element::F16), 2);
        assert_eq!(of(262_144, 1, Element::F16), 1);
        assert_eq!(of(4_096, 32, Element::F16), 8);
        assert_eq!(of(18_432, 32, Element::F16), 2);
        assert_eq!(of(1_024, 128, Element::F16), 32);
        assert_eq!(of(98_304, 8, Element::F32), 8);
    }

    #[test]
    fn cuts_cover_all_units_within_the_limit() {
        let (times, blocks, heads) = (2, 5, 3);
        let work = |block: usize| 10 * (blocks - block) as u64;
        for limit in [1, 55, 100, 1 << 38] {
            let parts = cut(Units::new(times, blocks, heads), work, limit);
            let mut next = 0;
            for part in &parts {
                assert_eq!(part.first_unit, next);
                assert!(part.units == 1 || part.work <= limit, "{part:?}");
                next += part.units;
            }
            assert_eq!(next as usize, times * blocks * heads);
            assert_eq!(parts.iter().map(|part| part.work).sum::<u64>(), 2 * 3 * 10 * (1 + 2 + 3 + 4 + 5));
        }
        let units = Units::new(times, blocks, heads);
        assert_eq!(cut(units, work, 1 << 38).len(), 1);
        let parts = |most| cut(Units { most: Some(most), ..units }, work, 1 << 38);
        let cuts = |most| parts(most).iter().map(|part| part.units).collect::<Vec<_>>();
        assert_eq!((cuts(6), cuts(15), cuts(100)), (vec![6, 6, 3, 6, 6, 3], vec![15, 15], vec![15, 15]));
        assert_eq!(parts(6).iter().map(|part| part.first_unit).collect::<Vec<_>>(), [0, 6, 12, 15, 21, 27]);
        assert_eq!(parts(6).iter().map(|part| part.work).sum::<u64>(), 2 * 3 * 10 * (1 + 2 + 3 + 4 + 5));
    }

    #[test]
    fn long_sequences_are_read_in_step() {
        let known = Caps { processors_known: true, ..coop::tests::caps() };
        let of = |caps: &Caps, tokens, heads, kv_heads, element| {
            let tile = plan(caps, 128, element).expect("fits").forward;
            let shape = FlashShape { heads, kv_heads, ..coop::tests::shape(tokens, heads, element) };
            (query_units(caps, &shape, &tile, 1), 2 * 132 * (RESIDENT / tile.invocations))
        };
        for (tokens, heads, kv_heads) in [(98_304, 8, 8), (98_304, 2, 2), (131_072, 32, 32)] {
            let (units, two_rounds) = of(&known, tokens, heads, kv_heads, Element::F16);
            assert_eq!(units, Units { times: heads / 2, blocks: tokens / 128, heads: 2, most: Some(two_rounds) });
        }
        for (tokens, heads, kv_heads) in [(65_536, 8, 8), (98_304, 1, 1), (98_304, 8, 1), (98_304, 32, 16)] {
            assert_eq!(of(&known, tokens, heads, kv_heads, Element::F16).0.most, None);
        }
        assert_eq!(of(&Caps { processors_known: false, ..known.clone() }, 98_304, 8, 8, Element::F16).0.most, None);
        assert_eq!(of(&known, 98_304, 8, 8, Element::F32).0.most, None);
    }
}
