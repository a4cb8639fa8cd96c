//! Components in WebAssembly text, each made for one test.

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
