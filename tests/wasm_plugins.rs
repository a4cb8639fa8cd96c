//! The repository carries its plugins' WebAssembly, because not every machine can build it. This holds it to account.
//!
//! `plugins/wasm.json` records the digest of each `.wasm`, of the source that it was built from, and the toolchain.
//! Where a wasm target is installed the plugins are built again: byte for byte the same with the recorded toolchain,
//! else the same in imports, exports and behaviour. `HOLM_UPDATE_WASM=1 cargo test --test wasm_plugins` builds and
//! records anew (`rustup target add wasm32-wasip1` first).

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::Server;
use wasmparser::{Parser, Payload};

const TARGET: &str = "wasm32-wasip1";
const PLUGINS: [&str; 2] = ["echo", "word-count"];
const INPUT: &str = include_str!("../host/LICENSE");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn committed(plugin: &str) -> PathBuf {
    root().join(format!("plugins/{plugin}/{plugin}.wasm"))
}

fn record_path() -> PathBuf {
    root().join("plugins/wasm.json")
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The digest of everything that a plugin is built from in this repository.
fn source_digest(plugin: &str) -> String {
    let mut files = Vec::new();
    for dir in ["guest-sdk", &format!("plugins/{plugin}")] {
        list_sources(&root().join(dir), &mut files);
    }
    files.sort();
    let mut hasher = Sha256::new();
    for file in files {
        hasher.update(file.strip_prefix(root()).unwrap().to_string_lossy().as_bytes());
        hasher.update(fs::read(&file).unwrap());
    }
    hex::encode(hasher.finalize())
}

fn list_sources(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list_sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension != "wasm") {
            files.push(path);
        }
    }
}

fn rustc(args: &[&str]) -> String {
    let output = Command::new("rustc").args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The compiler, and the standard library for the target as it is installed. `None` without the target.
fn toolchain() -> Option<Value> {
    let library = PathBuf::from(rustc(&["--print", "target-libdir", "--target", TARGET]));
    let mut parts: Vec<PathBuf> = fs::read_dir(library).ok()?.map(|entry| entry.unwrap().path()).collect();
    parts.retain(|path| path.extension().is_some_and(|extension| extension == "rlib"));
    parts.sort();
    let mut hasher = Sha256::new();
    for part in &parts {
        hasher.update(fs::read(part).unwrap());
    }
    (!parts.is_empty()).then(|| json!({"rustc": rustc(&["-V"]), "std": hex::encode(hasher.finalize())}))
}

/// Builds every plugin, with the paths of this machine's toolchain taken out.
fn build() -> Vec<(&'static str, Vec<u8>)> {
    let version = rustc(&["-Vv"]);
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: ")).unwrap_or("unknown");
    let sources = format!("{}/lib/rustlib/src/rust", rustc(&["--print", "sysroot"]));
    let out = root().join("target/wasm-plugins");
    let status = Command::new("cargo")
        .current_dir(root())
        .args(["build", "--quiet", "--locked", "--profile", "plugin", "--target", TARGET, "--target-dir"])
        .arg(&out)
        .args(PLUGINS.iter().flat_map(|plugin| ["--package", plugin]))
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--remap-path-prefix={sources}=/rustc/{commit}"))
        .env_remove("RUSTC")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    assert!(status.unwrap().success());
    let read = |plugin| fs::read(out.join(TARGET).join("plugin").join(format!("{plugin}.wasm"))).unwrap();
    PLUGINS.map(|plugin| (plugin, read(plugin))).into()
}

/// Imports and exports, by name and kind.
fn interface(wasm: &[u8]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for payload in Parser::new(0).parse_all(wasm) {
        match payload.unwrap() {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import.unwrap();
                    names.insert(format!("import {}.{}", import.module, import.name));
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export.unwrap();
                    names.insert(format!("export {} {:?}", export.name, export.kind));
                }
            }
            _ => {}
        }
    }
    names
}

#[test]
fn committed_wasm_is_that_of_the_committed_source() {
    if std::env::var_os("HOLM_UPDATE_WASM").is_some() {
        update();
    }
    let record: Value = serde_json::from_slice(&fs::read(record_path()).unwrap()).unwrap();
    for plugin in PLUGINS {
        let recorded = &record["plugins"][plugin];
        let wasm = digest(&fs::read(committed(plugin)).unwrap());
        assert_eq!(recorded["wasm"], wasm, "{plugin}.wasm is not the file that was recorded");
        let source = source_digest(plugin);
        assert_eq!(
            recorded["source"], source,
            "{plugin} has changed since its .wasm was built; see the top of this test"
        );
    }
}

fn update() {
    let toolchain = toolchain().expect("the target wasm32-wasip1 is not installed");
    let mut plugins = serde_json::Map::new();
    for (plugin, wasm) in build() {
        plugins.insert(plugin.to_owned(), json!({"source": source_digest(plugin), "wasm": digest(&wasm)}));
        fs::write(committed(plugin), wasm).unwrap();
    }
    let record = json!({"toolchain": toolchain, "plugins": plugins});
    fs::write(record_path(), serde_json::to_string_pretty(&record).unwrap() + "\n").unwrap();
}

#[test]
fn a_rebuild_is_the_same() {
    let Some(toolchain) = toolchain() else {
        println!("SKIPPED a_rebuild_is_the_same: no target wasm32-wasip1; the digests were compared all the same");
        return;
    };
    let record: Value = serde_json::from_slice(&fs::read(record_path()).unwrap()).unwrap();
    for (plugin, rebuilt) in build() {
        let carried = fs::read(committed(plugin)).unwrap();
        if record["toolchain"] == toolchain {
            assert!(carried == rebuilt, "{plugin}: the recorded toolchain gives other bytes");
            continue;
        }
        assert_eq!(interface(&carried), interface(&rebuilt), "{plugin}");
        assert_eq!(behaviour(&carried), behaviour(&rebuilt), "{plugin}");
    }
}

fn behaviour(wasm: &[u8]) -> Value {
    let server = Server::start();
    server.tenant("t", &json!({}));
    server.upload("t", "p", wasm);
    let record = server.job("t", "p", &json!([]), &json!({}), INPUT.as_bytes());
    json!([record["outcome"], record["output"], record["stderr_tail"]])
}
