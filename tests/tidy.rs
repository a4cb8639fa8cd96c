//! The repository's own rules, as a test: which way imports point, how modules begin, how long files are.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Every Rust file below `dir`, with its text.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![root().join(dir)];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
        }
    }
    found.sort();
    found
}

fn all_sources() -> Vec<(PathBuf, String)> {
    ["host", "guest-sdk", "plugins", "tests", "benches"].into_iter().flat_map(sources).collect()
}

/// The part of a file before its unit tests.
fn product(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests {").next().unwrap()
}

/// The modules of `host/src`, lowest first, each with those that it may import. All of them stand above it, so that
/// imports point one way.
const LAYERS: [(&str, &[&str]); 14] = [
    ("limit", &[]),
    ("launcher", &[]),
    ("inside", &[]),
    ("bundled", &[]),
    ("telemetry", &[]),
    ("config", &["limit", "telemetry"]),
    ("tenant", &["limit"]),
    ("plugin", &["limit"]),
    ("store", &["limit", "plugin", "tenant"]),
    ("admission", &["tenant"]),
    ("upload", &["admission", "launcher", "limit", "plugin", "store", "tenant"]),
    ("job", &["admission", "launcher", "limit", "plugin", "store", "tenant", "upload"]),
    ("server", &["admission", "job", "launcher", "limit", "plugin", "store", "tenant", "upload"]),
    (
        "cli",
        &[
            "admission",
            "bundled",
            "config",
            "inside",
            "job",
            "launcher",
            "limit",
            "plugin",
            "server",
            "store",
            "telemetry",
            "tenant",
            "upload",
        ],
    ),
];

#[test]
fn layers_only_build_on_lower_ones() {
    for (i, (name, allowed)) in LAYERS.iter().enumerate() {
        for below in *allowed {
            let position = LAYERS.iter().position(|(other, _)| other == below);
            assert!(position.is_some_and(|position| position < i), "`{name}` may not build on `{below}`");
        }
    }
}

#[test]
fn imports_point_one_way() {
    for (path, text) in sources("host/src") {
        let inside = path.strip_prefix("host/src").unwrap();
        let module = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
        let module = module.trim_end_matches(".rs");
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            assert!(["lib", "main"].contains(&module), "{}: `{module}` is in no layer", path.display());
            continue;
        };
        for line in product(&text).lines() {
            for (other, _) in LAYERS.iter().filter(|(other, _)| *other != module) {
                let imports = line.contains(&format!("crate::{other}::"));
                assert!(!imports || allowed.contains(other), "{}: `{module}` imports `{other}`", path.display());
            }
        }
    }
}

#[test]
fn only_inside_sees_sandbox_and_runtime_from_within() {
    for (path, text) in sources("host/src") {
        let workload = text.contains("holm_sandbox::workload::{");
        assert!(!workload || path.ends_with("inside.rs"), "{} runs things inside sandboxes", path.display());
    }
    for (path, text) in sources("host/runtime") {
        assert!(!text.contains("holm_sandbox"), "{} knows of sandboxes", path.display());
    }
    for (path, text) in sources("host/sandbox") {
        assert!(!text.contains("holm_runtime") && !text.contains("wasmtime"), "{} knows of Wasm", path.display());
    }
}

#[test]
fn unsafe_stands_behind_its_fences() {
    let fences = [
        "host/sandbox/src/sys",
        "host/runtime/src/wasm/load.rs",
        "plugins/probe/src",
        "tests",
        "host/sandbox/tests",
        "benches",
    ];
    for (path, text) in all_sources() {
        let outside = !fences.iter().any(|fence| path.starts_with(fence));
        let uses = text.lines().any(|line| line.contains("unsafe {") || line.contains("unsafe fn"));
        assert!(!(outside && uses), "{} has unsafe code", path.display());
    }
}

#[test]
fn nothing_that_starts_threads_is_in_the_launcher_s_graph() {
    let tree = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["tree", "--package", "holm-sandbox", "--edges", "normal", "--prefix", "none", "--offline", "--locked"])
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.contains("nix "), "the tree was not read: {tree}");
    for banned in ["tokio", "hyper", "tracing", "wasmtime", "rayon", "async-io", "zbus", "crossbeam-deque"] {
        let found = tree.lines().find(|line| line.split(' ').next() == Some(banned));
        assert_eq!(found, None, "{banned} is in the graph of holm-sandbox");
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in all_sources() {
        let first = text.lines().find(|line| !line.starts_with("#!")).unwrap_or_default();
        assert!(first.starts_with("//! "), "{} does not open with `//!`", path.display());
    }
}

#[test]
fn files_hold_one_concept() {
    // unit tests at the end of a file do not count: they are about the one concept
    const MOST_LINES: usize = 450;
    for (path, text) in sources("host") {
        let lines = product(&text).lines().count();
        assert!(lines <= MOST_LINES, "{} has {lines} lines: is it one concept?", path.display());
    }
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!(", "unimplemented!(", "FIXME", "XXX", "#[ignore", "dbg!("];
    for (path, text) in all_sources().into_iter().filter(|(path, _)| !path.ends_with("tidy.rs")) {
        for word in words {
            assert!(!text.contains(word), "{} has `{word}`", path.display());
        }
    }
}

#[test]
fn architecture_names_every_module_and_stays_short() {
    let text = fs::read_to_string(root().join("host/ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= 200, "it is a map, not the territory");
    for (module, _) in LAYERS {
        assert!(text.contains(&format!("`{module}")), "`{module}` is not on the map");
    }
    let homes = ["", "tests", "host", "host/src", "host/sandbox/src", "host/runtime/src"];
    for path in text.split(['`', ' ', ',', ';', '(', ')']).filter(|word| word.ends_with(".rs")) {
        let found = homes.iter().any(|home| root().join(home).join(path).exists());
        assert!(found, "`{path}` is on the map, and nowhere else");
    }
}

#[test]
fn the_top_level_is_as_agreed() {
    let agreed =
        ["Cargo.toml", "Cargo.lock", "host", "guest-sdk", "plugins", "tests", "benches", "README.md", "target"];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(name.starts_with('.') || agreed.contains(&name.as_str()), "`{name}` stands at the top level");
    }
}

/// The rows of `host/SECURITY.md`: how many of each letter, and those that are not defended against yet.
const ROWS: [(char, u32, &[u32]); 9] = [
    ('e', 12, &[]),
    ('s', 17, &[]),
    ('x', 12, &[8, 10]),
    ('r', 16, &[4, 11, 12, 13, 14, 15]),
    ('l', 12, &[9, 10, 12]),
    ('w', 13, &[]),
    ('h', 8, &[7, 8]),
    ('i', 3, &[3]),
    ('t', 1, &[]),
];

#[test]
fn every_attack_has_a_test_that_one_search_finds() {
    let text: String = all_sources().into_iter().map(|(_, text)| text).collect();
    let comments: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once("// ")?.1)).collect();
    for (letter, count, later) in ROWS {
        for number in (1..=count).filter(|number| !later.contains(number)) {
            let row = format!("{}{number}", letter.to_ascii_uppercase());
            let named = text.contains(&format!("fn {letter}{number}_"));
            let noted =
                comments.iter().any(|comment| comment.split(|c: char| !c.is_alphanumeric()).any(|word| word == row));
            assert!(named || noted, "no test carries the row {row}");
        }
    }
}
