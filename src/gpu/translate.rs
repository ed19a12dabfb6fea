//! Kernels with components of cooperative matrices, from WGSL to SPIR-V.
//!
//! They declare functions between a matrix and an array of its components (`shaders/shared/components.wgsl`), which WGSL has
//! no words for. A kernel is translated as wgpu does, these functions get their bodies, and it goes to the driver past wgpu.

use std::collections::HashMap;

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{Barrier, Statement};
use spirv::Op;

use crate::error::{Error, Result};

/// Translates a kernel, and fills in its functions between matrices and their components.
pub(super) fn to_spirv(mut module: naga::Module, shader: &str) -> Result<Vec<u32>> {
    order_workgroup_memory(&mut module);
    fill(&translate(&module, shader)?).map_err(|message| shader_error(shader, format!("SPIR-V: {message}")))
}

/// Makes the barriers of a subgroup order workgroup memory on Vulkan, for which the kernels have them. naga's name a kind of
/// memory that Vulkan does not know, and no other (VUID-StandaloneSpirv-MemorySemantics-10866).
pub(super) fn order_workgroup_memory(module: &mut naga::Module) {
    let functions = module.functions.iter_mut().map(|(_, function)| function);
    for function in functions.chain(module.entry_points.iter_mut().map(|entry| &mut entry.function)) {
        order_in_block(&mut function.body);
    }
}

fn order_in_block(block: &mut naga::Block) {
    for statement in block.iter_mut() {
        match statement {
            Statement::ControlBarrier(memory) if memory.contains(Barrier::SUB_GROUP) => *memory |= Barrier::WORK_GROUP,
            Statement::Block(block) => order_in_block(block),
            Statement::If { accept, reject, .. } => {
                order_in_block(accept);
                order_in_block(reject);
            }
            Statement::Loop { body, continuing, .. } => {
                order_in_block(body);
                order_in_block(continuing);
            }
            Statement::Switch { cases, .. } => {
                cases.iter_mut().for_each(|case| order_in_block(&mut case.body));
            }
            _ => {}
        }
    }
}

fn shader_error(shader: &str, message: String) -> Error {
    Error::Shader { shader: format!("shaders/{shader}.wgsl"), message }
}

/// Translates a kernel as wgpu does.
fn translate(module: &naga::Module, shader: &str) -> Result<Vec<u32>> {
    let error = |message| shader_error(shader, message);
    let capabilities = Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::SUBGROUP
        | Capabilities::SUBGROUP_BARRIER;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(module)
        .map_err(|e| error(e.emit_to_string("")))?;
    // wgpu numbers the bindings of a group in their order, without gaps.
    let mut bindings: Vec<_> = module.global_variables.iter().filter_map(|(_, variable)| variable.binding).collect();
    bindings.sort_unstable();
    let info_of = |(number, binding): (usize, naga::ResourceBinding)| {
        let number = number as u32;
        (binding, spv::BindingInfo { descriptor_set: binding.group, binding: number, binding_array_size: None })
    };
    // As `shader_module` does.
    let checks = cfg!(debug_assertions);
    let bounds = if checks { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    let options = spv::Options {
        // That of Vulkan 1.3, which is older than cooperative matrices.
        lang_version: (1, 6),
        // The names of functions.
        flags: spv::WriterFlags::DEBUG,
        binding_map: bindings.into_iter().enumerate().map(info_of).collect(),
        bounds_check_policies: BoundsCheckPolicies {
            index: bounds,
            buffer: bounds,
            image_load: bounds,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        force_loop_bounding: checks,
        emit_int_div_checks: checks,
        // Not every device has it, and no kernel uses it.
        use_storage_input_output_16: false,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        ..spv::Options::default()
    };
    let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    spv::write_vec(module, &info, &options, Some(&entry)).map_err(|e| error(e.to_string()))
}

/// What a function does.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// From a matrix to its components.
    Apart,
    /// From components to their matrix.
    Together,
}

impl Way {
    /// What a function does, by the words of its name.
    fn of_name(words: &[u32]) -> Option<Self> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|byte| *byte != 0).collect();
        if bytes.starts_with(b"components_of_") {
            Some(Self::Apart)
        } else {
            bytes.ends_with(b"_of_components").then_some(Self::Together)
        }
    }
}

/// A function that gets a body.
struct Function {
    way: Way,
    result_type: u32,
    /// Its type and itself.
    parameter: Option<(u32, u32)>,
}

/// SPIR-V in the making.
struct Writer {
    words: Vec<u32>,
    /// The next id.
    bound: u32,
}

impl Writer {
    fn push(&mut self, op: Op, operands: &[u32]) {
        self.words.push((operands.len() as u32 + 1) << 16 | op as u32);
        self.words.extend_from_slice(operands);
    }

    fn id(&mut self) -> u32 {
        self.bound += 1;
        self.bound - 1
    }

    /// An instruction with a result.
    fn value(&mut self, op: Op, result_type: u32, operands: &[u32]) -> u32 {
        let id = self.id();
        self.push(op, &[&[result_type, id], operands].concat());
        id
    }
}

/// An instruction's opcode, its operands, and all its words.
type Instruction<'a> = (Option<Op>, &'a [u32], &'a [u32]);

/// The instructions of a module's words after the header.
fn instructions(mut words: &[u32]) -> impl Iterator<Item = Result<Instruction<'_>, &'static str>> {
    std::iter::from_fn(move || {
        let first = *words.first()?;
        let split = words.split_at_checked((first >> 16) as usize);
        let Some((instruction @ [_, operands @ ..], rest)) = split else {
            words = &[];
            return Some(Err("an instruction with a wrong length"));
        };
        words = rest;
        Some(Ok((Op::from_u32(first & 0xffff), operands, instruction)))
    })
}

/// Gives the functions named `components_of_..` and `.._of_components` their bodies, and leaves the rest as it is.
fn fill(words: &[u32]) -> Result<Vec<u32>, &'static str> {
    let [magic, version, generator, bound, schema, code @ ..] = words else { return Err("no header") };
    let mut writer = Writer { words: Vec::with_capacity(words.len()), bound: *bound };
    let mut ways = HashMap::new();
    let mut constants = HashMap::new();
    // By their own ids: the type of a matrix's components, and that of an array's with the id of its length.
    let mut matrices = HashMap::new();
    let mut arrays = HashMap::new();
    let mut current: Option<Function> = None;
    for instruction in instructions(code) {
        let (op, operands, whole) = instruction?;
        match (op, operands) {
            (Some(Op::Name), [id, name @ ..]) => ways.extend(Way::of_name(name).map(|way| (*id, way))),
            (Some(Op::Constant), [_, id, value]) => drop(constants.insert(*id, *value)),
            (Some(Op::TypeCooperativeMatrixKHR), [id, component, ..]) => drop(matrices.insert(*id, *component)),
            (Some(Op::TypeArray), [id, component, length]) => drop(arrays.insert(*id, (*component, *length))),
            (Some(Op::Function), [result_type, id, ..]) => {
                let function = |way: &Way| Function { way: *way, result_type: *result_type, parameter: None };
                current = ways.get(id).map(function);
            }
            (Some(Op::FunctionParameter), [of_type, id]) => {
                if let Some(function) = &mut current
                    && function.parameter.replace((*of_type, *id)).is_some()
                {
                    return Err("a function of components with a second argument");
                }
            }
            (Some(Op::FunctionEnd), _) => {
                if let Some(Function { way, result_type, parameter }) = current.take() {
                    let (of_type, parameter) = parameter.ok_or("a function of components without an argument")?;
                    let (matrix, array) = match way {
                        Way::Apart => (of_type, result_type),
                        Way::Together => (result_type, of_type),
                    };
                    let component = matrices.get(&matrix).ok_or("components of what is no cooperative matrix")?;
                    let (_, length) = arrays
                        .get(&array)
                        .filter(|(of_array, _)| of_array == component)
                        .ok_or("components that are no array of the matrix's type")?;
                    let count = constants.get(length).ok_or("an array whose length is no constant")?;
                    body(&mut writer, way, result_type, parameter, *component, *count)?;
                }
            }
            // A body of its own would be lost.
            (Some(Op::Label | Op::Branch | Op::ReturnValue), _) if current.is_some() => continue,
            _ if current.is_some() => return Err("a function of components with a body"),
            _ => {}
        }
        writer.words.extend_from_slice(whole);
    }
    if current.is_some() {
        return Err("a function of components without an end");
    }
    let header = [*magic, *version, *generator, writer.bound, *schema];
    Ok(header.into_iter().chain(writer.words).collect())
}

fn body(
    writer: &mut Writer,
    way: Way,
    result_type: u32,
    parameter: u32,
    component: u32,
    count: u32,
) -> Result<(), &'static str> {
    let label = writer.id();
    writer.push(Op::Label, &[label]);
    let components: Vec<u32> =
        (0..count).map(|n| writer.value(Op::CompositeExtract, component, &[parameter, n])).collect();
    let result = match way {
        Way::Apart => writer.value(Op::CompositeConstruct, result_type, &components),
        Way::Together => {
            let (first, others) = components.split_first().ok_or("an array without elements")?;
            // A matrix is constructed with one value in all its elements.
            let mut matrix = writer.value(Op::CompositeConstruct, result_type, &[*first]);
            for (&other, n) in others.iter().zip(1..) {
                matrix = writer.value(Op::CompositeInsert, result_type, &[other, matrix, n]);
            }
            matrix
        }
    };
    writer.push(Op::ReturnValue, &[result]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn module(functions: &str) -> naga::Module {
        let source = format!(
            "enable wgpu_cooperative_matrix;
            alias Matrix = coop_mat16x16<f32, C>;
            @group(0) @binding(3) var<storage, read_write> b: array<f32>;
            @group(0) @binding(1) var<storage, read_write> a: array<f32>;
            {functions}
            @compute @workgroup_size(32) fn main() {{
                let matrix = coopLoad<Matrix>(&a[0], 16u);
                coopStore(matrix_of_components(components_of_matrix(matrix)), &b[0], 16u);
            }}"
        );
        naga::front::wgsl::parse_str(&source).expect("valid")
    }

    const APART: &str = "fn components_of_matrix(matrix: Matrix) -> array<f32, 8> { return array<f32, 8>(); }";
    const TOGETHER: &str = "fn matrix_of_components(components: array<f32, 8>) -> Matrix { return Matrix(); }";

    /// Each function's instructions, by their opcodes, and its words.
    fn functions(words: &[u32]) -> Vec<(Vec<Op>, Vec<u32>)> {
        let mut functions = Vec::new();
        for instruction in instructions(&words[5..]) {
            let (op, _, whole) = instruction.expect("whole");
            let op = op.expect("known");
            if op == Op::Function {
                functions.push((Vec::new(), Vec::new()));
            }
            if let Some((ops, words)) = functions.last_mut() {
                ops.push(op);
                words.extend_from_slice(whole);
            }
        }
        functions
    }

    #[test]
    fn functions_of_components_are_filled_in_and_no_others() -> Result<()> {
        let other = "fn third(x: array<f32, 8>) -> f32 { var y = x; return y[3] / 3.0; }";
        let words = translate(&module(&format!("{other}{APART}{TOGETHER}")), "test")?;
        let filled = fill(&words).expect("as expected");
        let (before, after) = (functions(&words), functions(&filled));
        assert_eq!((before.len(), after.len()), (4, 4));
        let mut bodies = Vec::new();
        for ((ops, words), (filled_ops, filled)) in before.iter().zip(&after) {
            if filled_ops.contains(&Op::CompositeConstruct) {
                assert!(!ops.contains(&Op::CompositeConstruct));
                bodies.push(filled_ops.clone());
            } else {
                assert_eq!(words, filled);
            }
        }
        let begin = [Op::Function, Op::FunctionParameter, Op::Label];
        let end = [Op::ReturnValue, Op::FunctionEnd];
        let body = |inserts| [vec![Op::CompositeExtract; 8], vec![Op::CompositeConstruct], inserts].concat();
        let expected = |inserts| [&begin[..], &body(inserts), &end].concat();
        assert_eq!(bodies, [expected(Vec::new()), expected(vec![Op::CompositeInsert; 7])]);
        // What comes before the functions, but for the bound.
        let globals = |words: &[u32]| {
            let of_functions: usize = functions(words).iter().map(|(_, words)| words.len()).sum();
            [&words[..3], &words[4..words.len() - of_functions]].concat()
        };
        assert_eq!(globals(&words), globals(&filled));
        Ok(())
    }

    #[test]
    fn new_ids_are_fresh_and_below_the_bound() -> Result<()> {
        let filled = to_spirv(module(&format!("{APART}{TOGETHER}")), "test")?;
        let mut results = HashSet::new();
        for instruction in instructions(&filled[5..]) {
            let (op, operands, _) = instruction.expect("whole");
            let (result, others) = match op.expect("known") {
                Op::Label => (operands[0], &[][..]),
                Op::CompositeExtract => (operands[1], &operands[2..3]),
                Op::CompositeInsert => (operands[1], &operands[2..4]),
                Op::CompositeConstruct => (operands[1], &operands[2..]),
                Op::FunctionParameter => (operands[1], &[][..]),
                _ => continue,
            };
            assert!(others.iter().all(|id| results.contains(id)), "an operand before its definition");
            assert!(results.insert(result), "a result twice");
        }
        // Two labels, eight components out and one array, eight components out, one matrix and seven more.
        let most = results.into_iter().max().expect("some");
        assert_eq!(most + 1, filled[3]);
        assert_eq!(filled[3], translate(&module(&format!("{APART}{TOGETHER}")), "test")?[3] + 2 + 9 + 16);
        Ok(())
    }

    /// wgpu gives the bindings 1 and 3 the numbers 0 and 1.
    #[test]
    fn bindings_are_numbered_as_wgpu_does() -> Result<()> {
        let words = to_spirv(module(&format!("{APART}{TOGETHER}")), "test")?;
        let mut names = HashMap::new();
        let mut bindings = Vec::new();
        for instruction in instructions(&words[5..]) {
            match instruction.expect("whole") {
                (Some(Op::Name), [id, name], _) => drop(names.insert(*id, name.to_le_bytes()[0])),
                (Some(Op::Decorate), [id, decoration, number], _)
                    if *decoration == spirv::Decoration::Binding as u32 =>
                {
                    bindings.push((names[id], *number));
                }
                _ => {}
            }
        }
        bindings.sort_unstable();
        assert_eq!(bindings, [(b'a', 0), (b'b', 1)]);
        Ok(())
    }

    #[test]
    fn barriers_order_workgroup_memory() -> Result<()> {
        let barriers = "fn barriers(n: u32) {
            subgroupBarrier();
            workgroupBarrier();
            if (n > 1u) { if (n > 2u) { subgroupBarrier(); } else { subgroupBarrier(); } }
            for (var i = 0u; i < n; i += 1u) { { subgroupBarrier(); } }
            switch (n) { case 3u: { subgroupBarrier(); } default: { subgroupBarrier(); } }
        }";
        let words = to_spirv(module(&format!("{barriers}{APART}{TOGETHER}")), "test")?;
        let mut constants = HashMap::new();
        let mut scopes = Vec::new();
        for instruction in instructions(&words[5..]) {
            match instruction.expect("whole") {
                (Some(Op::Constant), [_, id, value], _) => drop(constants.insert(*id, *value)),
                (Some(Op::ControlBarrier), [execution, memory, semantics], _) => {
                    assert_eq!(execution, memory);
                    let semantics = spirv::MemorySemantics::from_bits_retain(constants[semantics]);
                    assert!(semantics.contains(spirv::MemorySemantics::WORKGROUP_MEMORY));
                    assert!(semantics.contains(spirv::MemorySemantics::ACQUIRE_RELEASE));
                    scopes.push(constants[execution]);
                }
                _ => {}
            }
        }
        let count = |scope: spirv::Scope| scopes.iter().filter(|of| **of == scope as u32).count();
        assert_eq!((count(spirv::Scope::Subgroup), count(spirv::Scope::Workgroup)), (6, 1));
        Ok(())
    }

    #[test]
    fn another_form_is_an_error() -> Result<()> {
        for (function, problem) in [
            ("fn m_of_components(c: array<f32, 8>) -> Matrix { var m: Matrix; return m; }", "with a body"),
            ("fn m_of_components(c: array<vec4<f32>, 2>) -> Matrix { return Matrix(); }", "no array"),
            ("fn m_of_components(c: f32) -> Matrix { return Matrix(); }", "no array"),
            ("fn m_of_components() -> Matrix { return Matrix(); }", "without an argument"),
            ("fn m_of_components(c: array<f32, 8>, d: f32) -> Matrix { return Matrix(); }", "second argument"),
            ("fn components_of_m(m: Matrix) -> array<u32, 8> { return array<u32, 8>(); }", "no array"),
            ("fn components_of_v(v: vec4<f32>) -> array<f32, 4> { return array<f32, 4>(); }", "no cooperative matrix"),
        ] {
            let error = to_spirv(module(&format!("{APART}{TOGETHER}{function}")), "test").expect_err(function);
            assert!(error.to_string().contains(problem), "{function}: {error}");
        }
        let words = translate(&module(&format!("{APART}{TOGETHER}")), "test")?;
        assert!(fill(&words[..4]).is_err());
        // The last instructions are two of one word each.
        assert!(fill(&words[..words.len() - 3]).is_err(), "cut within an instruction");
        assert!(fill(&[&words[..], &[0]].concat()).is_err());
        Ok(())
    }
}
