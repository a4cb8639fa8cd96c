//! Components in WebAssembly text, each made for one test, and one as large as language runtimes are.

use wasmparser::{Parser, Payload};

/// A component that exports `wasi:cli/run` of this version. `fields` are those of its core module, whose `run` has
/// `body` for a body, which leaves 0 for success or 1 for failure.
pub fn command(version: &str, fields: &str, body: &str) -> String {
    around("", version, fields, body)
}

/// The same with definitions before the core module, such as imports.
pub fn around(before: &str, version: &str, fields: &str, body: &str) -> String {
    format!(
        r#"(component
            {before}
            (core module $m {fields} (func (export "run") (result i32) {body}))
            (core instance $i (instantiate $m))
            (func $run (result (result)) (canon lift (core func $i "run")))
            (instance $cli (export "run" (func $run)))
            (export "wasi:cli/run@{version}" (instance $cli)))"#
    )
}

/// A core function's body that counts down from `turns` and succeeds.
pub fn countdown(turns: u32) -> String {
    format!(
        "(local $n i32) (local.set $n (i32.const {turns}))
         (loop $more (br_if $more (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
         i32.const 0"
    )
}

/// A component whose command is in a part of its own and calls another part, with a string that has to be copied from one
/// memory to the other. Ends well if that counts `length` bytes.
pub fn of_two_parts(text: &str, length: usize) -> String {
    format!(
        r#"(component
            (component $callee
                (core module $m
                    (memory (export "memory") 1)
                    (func (export "realloc") (param i32 i32 i32 i32) (result i32) i32.const 1024)
                    (func (export "length") (param i32 i32) (result i32) local.get 1))
                (core instance $i (instantiate $m))
                (func (export "length") (param "text" string) (result u32)
                    (canon lift (core func $i "length") (memory (core memory $i "memory")) (realloc (core func $i "realloc")))))
            (component $caller
                (import "length" (func $length (param "text" string) (result u32)))
                (core module $data (memory (export "memory") 1) (data (i32.const 0) "{text}"))
                (core instance $data (instantiate $data))
                (core func $length (canon lower (func $length) (memory (core memory $data "memory"))))
                (core module $m
                    (import "" "length" (func $length (param i32 i32) (result i32)))
                    (func (export "run") (result i32)
                        (i32.ne (call $length (i32.const 0) (i32.const {})) (i32.const {length}))))
                (core instance $m (instantiate $m (with "" (instance (export "length" (func $length))))))
                (func (export "run") (result (result)) (canon lift (core func $m "run"))))
            (instance $callee (instantiate $callee))
            (instance $caller (instantiate $caller (with "length" (func $callee "length"))))
            (alias export $caller "run" (func $run))
            (instance $cli (export "run" (func $run)))
            (export "wasi:cli/run@0.2.0" (instance $cli)))"#,
        text.len()
    )
}

/// A binary component with a further core module that is instantiated with it: so many bytes of code and of data.
pub fn enlarged(component: &[u8], code_bytes: usize, data_bytes: usize) -> Vec<u8> {
    let mut depth = 0_usize;
    let mut modules = 0;
    for payload in Parser::new(0).parse_all(component) {
        match payload.unwrap() {
            Payload::ModuleSection { .. } => {
                modules += u32::from(depth == 0);
                depth += 1;
            }
            Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    let mut bytes = component.to_vec();
    section(&mut bytes, 1, &large_module(code_bytes, data_bytes));
    // one core instance, of that module, with no arguments
    let mut instance = vec![1, 0];
    number(&mut instance, modules);
    instance.push(0);
    section(&mut bytes, 2, &instance);
    bytes
}

fn large_module(code_bytes: usize, data_bytes: usize) -> Vec<u8> {
    const FUNCTION_BYTES: usize = 400;
    let functions = u32::try_from(code_bytes / FUNCTION_BYTES).unwrap();
    let pages = u32::try_from(data_bytes.div_ceil(1 << 16)).unwrap();
    let mut module = b"\0asm\x01\0\0\0".to_vec();
    section(&mut module, 1, &[1, 0x60, 0, 1, 0x7f]); // () -> i32
    let mut types = Vec::new();
    number(&mut types, functions);
    types.resize(types.len() + functions as usize, 0);
    section(&mut module, 3, &types);
    let mut memory = vec![1, 0];
    number(&mut memory, pages);
    section(&mut module, 5, &memory);
    let mut code = Vec::new();
    number(&mut code, functions);
    let mut random = 1_u64;
    for _ in 0..functions {
        let body = body(FUNCTION_BYTES, &mut random);
        number(&mut code, u32::try_from(body.len()).unwrap());
        code.extend(body);
    }
    section(&mut module, 10, &code);
    let mut data = vec![1, 0, 0x41, 0, 0x0b]; // at 0 of memory 0
    number(&mut data, u32::try_from(data_bytes).unwrap());
    data.extend((0..data_bytes).map(|i| ((i * 31) >> 3) as u8));
    section(&mut module, 11, &data);
    module
}

/// Arithmetic, memory accesses and branches on eight locals.
fn body(bytes: usize, random: &mut u64) -> Vec<u8> {
    let mut next = |below: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % below
    };
    let mut body = vec![1, 8, 0x7f]; // eight i32
    while body.len() < bytes {
        let (from, to) = (next(8) as u8, next(8) as u8);
        match next(4) {
            0 => body.extend([0x20, from, 0x28, 2, next(64) as u8, 0x21, to]), // to = memory[from + …]
            1 => body.extend([0x20, from, 0x20, to, 0x36, 2, next(64) as u8]), // memory[from + …] = to
            2 => body.extend([0x20, from, 0x04, 0x40, 0x20, to, 0x21, from, 0x0b]), // if from, from = to
            _ => {
                let operation = [0x6a, 0x6b, 0x6c, 0x71, 0x72, 0x73, 0x74, 0x76][next(8) as usize];
                body.extend([0x20, from, 0x41, next(64) as u8, operation, 0x21, to]); // to = from … constant
            }
        }
    }
    body.extend([0x20, 0, 0x0b]);
    body
}

fn section(bytes: &mut Vec<u8>, id: u8, content: &[u8]) {
    bytes.push(id);
    number(bytes, u32::try_from(content.len()).unwrap());
    bytes.extend_from_slice(content);
}

/// An unsigned number in LEB128.
fn number(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}
