//! WebAssembly modules made for one test each: text around a few lines, and bytes that take long to compile.

/// A complete command that imports these functions of `wasi_snapshot_preview1`, each as `$name`. It has two pages of
/// memory and `$out`, which writes `len` bytes from `at` to standard output; the first 16 bytes of memory are its own.
pub fn command(imports: &[&str], fields: &str, start: &str) -> String {
    let mut needed = vec!["fd_write"];
    needed.extend(imports.iter().filter(|name| **name != "fd_write"));
    let imports: String = needed
        .into_iter()
        .map(|name| format!("(import \"wasi_snapshot_preview1\" \"{name}\" (func ${name} {}))\n", signature(name)))
        .collect();
    format!(
        r#"(module
            {imports}
            (memory (export "memory") 2)
            (func $out (param $at i32) (param $len i32)
                (i32.store (i32.const 0) (local.get $at))
                (i32.store (i32.const 4) (local.get $len))
                (if (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)) (then unreachable)))
            {fields}
            (func (export "_start") {start}))"#
    )
}

fn signature(name: &str) -> String {
    let (params, result) = match name {
        "proc_exit" => ("i32", false),
        "fd_close" => ("i32", true),
        "args_get" | "args_sizes_get" | "fd_renumber" | "environ_get" | "environ_sizes_get" | "fd_prestat_get"
        | "random_get" | "sock_shutdown" => ("i32 i32", true),
        "fd_prestat_dir_name" | "path_unlink_file" | "path_create_directory" | "sock_accept" => ("i32 i32 i32", true),
        "fd_read" | "fd_write" | "poll_oneoff" => ("i32 i32 i32 i32", true),
        "fd_readdir" | "fd_pread" => ("i32 i32 i32 i64 i32", true),
        "fd_seek" => ("i32 i64 i32 i32", true),
        "clock_time_get" => ("i32 i64 i32", true),
        "path_symlink" | "sock_send" => ("i32 i32 i32 i32 i32", true),
        "path_rename" | "sock_recv" => ("i32 i32 i32 i32 i32 i32", true),
        "path_link" => ("i32 i32 i32 i32 i32 i32 i32", true),
        "path_open" => ("i32 i32 i32 i32 i32 i64 i64 i32 i32", true),
        other => panic!("no signature for {other}"),
    };
    format!("(param {params}){}", if result { " (result i32)" } else { "" })
}

/// A command that reads its input to the end and then goes on with `then`.
pub fn after_input(imports: &[&str], fields: &str, then: &str) -> String {
    let mut all = vec!["fd_read"];
    all.extend(imports);
    let drain = r"
        (func $drain
            (i32.store (i32.const 0) (i32.const 65536))
            (i32.store (i32.const 4) (i32.const 65536))
            (loop $more
                (if (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)) (then unreachable))
                (br_if $more (i32.load (i32.const 8)))))";
    command(&all, &format!("{drain} {fields}"), &format!("(call $drain) {then}"))
}

/// A valid binary module of so many functions, each long enough to keep a compiler busy for a millisecond or so.
pub fn slow_to_compile(functions: u32) -> Vec<u8> {
    let mut code = leb(functions + 1);
    code.extend([2, 0, 0x0b]); // `_start` does nothing
    for seed in 0..functions {
        let mut body = vec![1, 4, 0x7f]; // four locals of type i32
        for i in 0..400_u32 {
            // local[a] = (local[b] + constant) xor local[c]
            let [a, b, c] = [i, i / 3, seed + i / 7].map(|n| (n % 4) as u8);
            body.extend([0x20, b, 0x41]);
            body.extend(leb((seed * 31 + i) & 0x3f)); // small enough to be read as not negative
            body.extend([0x6a, 0x20, c, 0x73, 0x21, a]);
        }
        body.push(0x0b);
        code.extend(leb(u32::try_from(body.len()).unwrap()));
        code.extend(body);
    }
    let mut types = leb(functions + 1);
    types.extend(std::iter::repeat_n(0, functions as usize + 1));
    let mut module = b"\0asm\x01\0\0\0".to_vec();
    for (id, content) in [
        (1, vec![1, 0x60, 0, 0]), // one type: no parameters, no results
        (3, types),
        (5, vec![1, 0, 1]), // a memory, as the contract of a command asks
        (7, [&[2, 6][..], b"_start", &[0, 0, 6], b"memory", &[2, 0]].concat()),
        (10, code),
    ] {
        module.push(id);
        module.extend(leb(u32::try_from(content.len()).unwrap()));
        module.extend(content);
    }
    module
}

fn leb(mut number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = (number & 0x7f) as u8;
        number >>= 7;
        if number == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}
