#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use super::{FlashShape, Layout};
use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::{Real, axpy, dot};

impl FlashShape {
    /// The first element of a row of a tensor with so many heads.
    fn at(&self, heads: usize, (b, h): (usize, usize), token: usize) -> usize {
        let row = match self.layout {
            Layout::TokensHeads => (b * self.tokens + token) * heads + h,
            Layout::HeadsTokens => (b * heads + h) * self.tokens + token,
        };
        row * self.head_dim
    }

    /// One head's rows, [S, D].
    fn head<T: Real>(&self, x: &[T], heads: usize, head: (usize, usize)) -> Vec<T> {
        let rows = (0..self.tokens).flat_map(|t| &x[self.at(heads, head, t)..][..self.head_dim]);
        rows.copied().collect()
    }

    /// Puts one head's rows back.
    fn set_head<T: Real>(&self, x: &mut [T], heads: usize, head: (usize, usize), rows: &[T]) {
        for (t, row) in rows.chunks_exact(self.head_dim).enumerate() {
            x[self.at(heads, head, t)..][..self.head_dim].copy_from_slice(row);
        }
    }

    /// Every (batch entry, query head).
    fn all_heads(&self) -> Vec<(usize, usize)> {
        (0..self.batch * self.heads).map(|i| (i / self.heads, i % self.heads)).collect()
    }

    fn kv_head(&self, (b, h): (usize, usize)) -> (usize, usize) {
        (b, h / (self.heads / self.kv_heads))
    }
}

/// Row `t` of an [S, D] matrix.
fn row<T>(x: &[T], head_dim: usize, t: usize) -> &[T] {
    &x[t * head_dim..][..head_dim]
}

/// Row i: s_j = q_i k_j / sqrt(D) for j <= i, o_i = sum_j exp(s_j - max) v_j / sum_j exp(s_j - max).
pub(super) struct ForwardReference(pub FlashShape);

impl Reference for ForwardReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let shape = self.0;
        let (q, k, v) = (args.read("q")?, args.read("k")?, args.read("v")?);
        let (q, k, v): (&[T], &[T], &[T]) = (&q, &k, &v);
        let (mut o, mut lse) = (args.write("o")?, args.write("lse")?);
        let heads = shape.all_heads();
        let results: Vec<(Vec<T>, Vec<T>)> = heads.par_iter().map(|&head| forward(&shape, q, k, v, head)).collect();
        for ((&head, (rows, row_lse)), lse) in heads.iter().zip(&results).zip(lse.chunks_exact_mut(shape.tokens)) {
            shape.set_head(&mut o, shape.heads, head, rows);
            lse.copy_from_slice(row_lse);
        }
        Ok(())
    }
}

fn forward<T: Real>(shape: &FlashShape, q: &[T], k: &[T], v: &[T], head: (usize, usize)) -> (Vec<T>, Vec<T>) {
    let d = shape.head_dim;
    let kv_head = shape.kv_head(head);
    let (k, v) = (shape.head(k, shape.kv_heads, kv_head), shape.head(v, shape.kv_heads, kv_head));
    let mut o = vec![T::zero(); shape.tokens * d];
    let mut lse = Vec::with_capacity(shape.tokens);
    let mut p = vec![T::zero(); shape.tokens];
    for (i, o) in o.chunks_exact_mut(d).enumerate() {
        let q = &q[shape.at(shape.heads, head, i)..][..d];
        for (p, k) in p[..=i].iter_mut().zip(k.chunks_exact(d)) {
            *p = dot(q, k) * shape.scale();
        }
        let max = p[..=i].iter().copied().fold(T::neg_infinity(), T::max);
        let mut sum = T::zero();
        for (p, v) in p[..=i].iter_mut().zip(v.chunks_exact(d)) {
            *p = (*p - max).exp();
            sum += *p;
            axpy(o, *p, v);
        }
        o.iter_mut().for_each(|o| *o = *o / sum);
        lse.push(max + sum.ln());
    }
    (o, lse)
}

/// delta_i = o_i do_i, beside lse_i.
pub(super) struct DeltaReference(pub FlashShape);

impl Reference for DeltaReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let shape = self.0;
        let (o, d_o, lse) = (args.read("o")?, args.read("d_o")?, args.read("lse")?);
        let mut lse_delta = args.write("lse_delta")?;
        let heads = shape.all_heads().into_iter();
        let tokens = heads.flat_map(|head| (0..shape.tokens).map(move |t| shape.at(shape.heads, head, t)));
        for ((at, lse), row) in tokens.zip(&*lse).zip(lse_delta.chunks_exact_mut(2)) {
            row.copy_from_slice(&[*lse, dot(&o[at..][..shape.head_dim], &d_o[at..][..shape.head_dim])]);
        }
        Ok(())
    }
}

/// What a head's backward reads, [S, D].
struct Head<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    d_o: Vec<T>,
    /// [S, 2].
    lse_delta: Vec<T>,
}

impl<T: Real> Head<T> {
    fn read(shape: &FlashShape, args: &[&[T]; 5], head: (usize, usize)) -> Self {
        let [q, k, v, d_o, lse_delta] = args;
        let kv_head = shape.kv_head(head);
        let rows = (head.0 * shape.heads + head.1) * shape.tokens;
        Self {
            q: shape.head(q, shape.heads, head),
            k: shape.head(k, shape.kv_heads, kv_head),
            v: shape.head(v, shape.kv_heads, kv_head),
            d_o: shape.head(d_o, shape.heads, head),
            lse_delta: lse_delta[2 * rows..][..2 * shape.tokens].to_vec(),
        }
    }

    /// p_ij = exp(q_i k_j / sqrt(D) - lse_i) and ds_ij = p_ij (do_i v_j - delta_i).
    fn weights(&self, shape: &FlashShape, i: usize, j: usize) -> (T, T) {
        let d = shape.head_dim;
        let (lse, delta) = (self.lse_delta[2 * i], self.lse_delta[2 * i + 1]);
        let p = (dot(row(&self.q, d, i), row(&self.k, d, j)) * shape.scale() - lse).exp();
        (p, p * (dot(row(&self.d_o, d, i), row(&self.v, d, j)) - delta))
    }
}

const BACKWARD_ARGS: [&str; 5] = ["q", "k", "v", "d_o", "lse_delta"];

/// dq_i = sum_j ds_ij k_j / sqrt(D).
pub(super) struct DqReference(pub FlashShape);

impl Reference for DqReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let shape = self.0;
        let read = BACKWARD_ARGS.map(|name| args.read(name));
        let [q, k, v, d_o, lse_delta] = read;
        let (q, k, v, d_o, lse_delta) = (q?, k?, v?, d_o?, lse_delta?);
        let args_read: [&[T]; 5] = [&q, &k, &v, &d_o, &lse_delta];
        let heads = shape.all_heads();
        let results: Vec<Vec<T>> = heads
            .par_iter()
            .map(|&head| {
                let head = Head::read(&shape, &args_read, head);
                let mut dq = vec![T::zero(); shape.tokens * shape.head_dim];
                for (i, dq) in dq.chunks_exact_mut(shape.head_dim).enumerate() {
                    for j in 0..=i {
                        let (_, ds) = head.weights(&shape, i, j);
                        axpy(dq, ds * shape.scale(), row(&head.k, shape.head_dim, j));
                    }
                }
                dq
            })
            .collect();
        let mut dq = args.write("dq")?;
        for (&head, rows) in heads.iter().zip(&results) {
            shape.set_head(&mut dq, shape.heads, head, rows);
        }
        Ok(())
    }
}

/// dk_j = sum_i ds_ij q_i / sqrt(D) and dv_j = sum_i p_ij do_i, also over the query heads of a group.
pub(super) struct DkdvReference(pub FlashShape);

impl Reference for DkdvReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let shape = self.0;
        let read = BACKWARD_ARGS.map(|name| args.read(name));
        let [q, k, v, d_o, lse_delta] = read;
        let (q, k, v, d_o, lse_delta) = (q?, k?, v?, d_o?, lse_delta?);
        let args_read: [&[T]; 5] = [&q, &k, &v, &d_o, &lse_delta];
        let heads = shape.all_heads();
        let results: Vec<(Vec<T>, Vec<T>)> = heads
            .par_iter()
            .map(|&head| {
                let d = shape.head_dim;
                let head = Head::read(&shape, &args_read, head);
                let (mut dk, mut dv) = (vec![T::zero(); shape.tokens * d], vec![T::zero(); shape.tokens * d]);
                for (j, (dk, dv)) in dk.chunks_exact_mut(d).zip(dv.chunks_exact_mut(d)).enumerate() {
                    for i in j..shape.tokens {
                        let (p, ds) = head.weights(&shape, i, j);
                        axpy(dk, ds * shape.scale(), row(&head.q, d, i));
                        axpy(dv, p, row(&head.d_o, d, i));
                    }
                }
                (dk, dv)
            })
            .collect();
        let (mut dk, mut dv) = (args.write("dk")?, args.write("dv")?);
        let group = shape.heads / shape.kv_heads;
        for (group_heads, results) in heads.chunks_exact(group).zip(results.chunks_exact(group)) {
            let (mut sum_dk, mut sum_dv) = results[0].clone();
            for (dk, dv) in &results[1..] {
                axpy(&mut sum_dk, T::one(), dk);
                axpy(&mut sum_dv, T::one(), dv);
            }
            let kv_head = shape.kv_head(group_heads[0]);
            shape.set_head(&mut dk, shape.kv_heads, kv_head, &sum_dk);
            shape.set_head(&mut dv, shape.kv_heads, kv_head, &sum_dv);
        }
        Ok(())
    }
}

/// dq, dk and dv.
pub(super) struct BackwardReference(pub FlashShape);

impl Reference for BackwardReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        DkdvReference(self.0).run(args)?;
        DqReference(self.0).run(args)
    }
}
