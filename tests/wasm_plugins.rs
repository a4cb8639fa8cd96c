//! The repository carries its plugins' WebAssembly, because not every machine can build it. This holds it to account.
//!
//! `plugins/wasm.json` records the digest of each `.wasm`, of the source that it was built from, and the toolchain of its
//! target. Where a wasm target is installed its plugins are built again: byte for byte the same with the recorded
//! toolchain, else the same in imports, exports and behaviour. `HOLM_UPDATE_WASM=1 cargo test --test wasm_plugins` builds
//! and records anew (`rustup target add wasm32-wasip1 wasm32-wasip2` first).

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use support::Server;
use wasmparser::{Parser, Payload};

/// A package whose WebAssembly is carried.
struct Carried {
    name: &'static str,
    target: &'static str,
    /// Its own directory, where the `.wasm` is, and what else of this repository it is built from.
    sources: &'static [&'static str],
    /// Its file as the compiler names it.
    built: &'static str,
}

const COMMAND: &str = "wasm32-wasip1";
const COMPONENT: &str = "wasm32-wasip2";
const CARRIED: [Carried; 4] = [
    Carried { name: "echo", target: COMMAND, sources: &["plugins/echo", "guest-sdk"], built: "echo.wasm" },
    Carried {
        name: "word-count",
        target: COMMAND,
        sources: &["plugins/word-count", "guest-sdk"],
        built: "word-count.wasm",
    },
    Carried { name: "http-hello", target: COMPONENT, sources: &["plugins/http-hello"], built: "http_hello.wasm" },
    Carried {
        name: "http-guest",
        target: COMPONENT,
        sources: &["tests/fixtures/http-guest"],
        built: "http_guest.wasm",
    },
];
const INPUT: &str = include_str!("../host/LICENSE");

impl Carried {
    fn committed(&self) -> PathBuf {
        root().join(self.sources[0]).join(format!("{}.wasm", self.name))
    }

    /// The digest of everything that it is built from in this repository.
    fn source_digest(&self) -> String {
        let mut files = Vec::new();
        self.sources.iter().for_each(|dir| list_sources(&root().join(dir), &mut files));
        files.sort();
        let mut hasher = Sha256::new();
        for file in files {
            hasher.update(file.strip_prefix(root()).unwrap().to_string_lossy().as_bytes());
            hasher.update(fs::read(&file).unwrap());
        }
        hex::encode(hasher.finalize())
    }

    fn behaviour(&self, wasm: &[u8]) -> Value {
        let server = Server::start();
        server.tenant("t", &json!({}));
        if server.upload("t", "p", wasm)["interface"] == "command" {
            let record = server.job("t", "p", &json!([]), &json!({}), INPUT.as_bytes());
            return json!([record["outcome"], record["output"], record["stderr_tail"]]);
        }
        let answers = ["/", "/headers", "/echo", "/nowhere"].map(|path| {
            let answer = server.operator("POST", &format!("/fn/t/p{path}"), &[("x-a", "1")], INPUT.as_bytes());
            json!([answer.status, answer.header("content-type"), answer.text()])
        });
        json!(answers)
    }
}

fn targets() -> BTreeSet<&'static str> {
    CARRIED.iter().map(|carried| carried.target).collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn record_path() -> PathBuf {
    root().join("plugins/wasm.json")
}

/// What is recorded, after it has been recorded anew if that is asked for.
static RECORD: LazyLock<Value> = LazyLock::new(|| {
    if std::env::var_os("HOLM_UPDATE_WASM").is_some() {
        update();
    }
    serde_json::from_slice(&fs::read(record_path()).unwrap()).unwrap()
});

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
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
fn toolchain(target: &str) -> Option<Value> {
    let library = PathBuf::from(rustc(&["--print", "target-libdir", "--target", target]));
    let mut parts: Vec<PathBuf> = fs::read_dir(library).ok()?.map(|entry| entry.unwrap().path()).collect();
    parts.retain(|path| path.extension().is_some_and(|extension| extension == "rlib"));
    parts.sort();
    let mut hasher = Sha256::new();
    for part in &parts {
        hasher.update(fs::read(part).unwrap());
    }
    (!parts.is_empty()).then(|| json!({"rustc": rustc(&["-V"]), "std": hex::encode(hasher.finalize())}))
}

/// Builds everything of a target, with the paths of this machine's toolchain taken out.
fn build(target: &str) -> Vec<(&'static Carried, Vec<u8>)> {
    let version = rustc(&["-Vv"]);
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: ")).unwrap_or("unknown");
    let sources = format!("{}/lib/rustlib/src/rust", rustc(&["--print", "sysroot"]));
    let out = root().join("target/wasm-plugins");
    let carried: Vec<&Carried> = CARRIED.iter().filter(|carried| carried.target == target).collect();
    let status = Command::new("cargo")
        .current_dir(root())
        .args(["build", "--quiet", "--locked", "--profile", "plugin", "--target", target, "--target-dir"])
        .arg(&out)
        .args(carried.iter().flat_map(|carried| ["--package", carried.name]))
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--remap-path-prefix={sources}=/rustc/{commit}"))
        .env_remove("RUSTC")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    assert!(status.unwrap().success());
    let read = |carried: &Carried| fs::read(out.join(target).join("plugin").join(carried.built)).unwrap();
    carried.into_iter().map(|carried| (carried, read(carried))).collect()
}

/// Imports and exports, by name and kind, of a component those of the component itself.
fn interface(wasm: &[u8]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(wasm) {
        match payload.unwrap() {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth -= 1,
            Payload::ImportSection(section) if depth == 0 => {
                for import in section.into_imports() {
                    let import = import.unwrap();
                    names.insert(format!("import {}.{}", import.module, import.name));
                }
            }
            Payload::ExportSection(section) if depth == 0 => {
                for export in section {
                    let export = export.unwrap();
                    names.insert(format!("export {} {:?}", export.name, export.kind));
                }
            }
            Payload::ComponentImportSection(section) if depth == 0 => {
                names.extend(section.into_iter().map(|import| format!("import {}", import.unwrap().name.name)));
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                names.extend(section.into_iter().map(|export| format!("export {}", export.unwrap().name.name)));
            }
            _ => {}
        }
    }
    names
}

#[test]
fn interfaces_are_read_of_modules_and_of_components() {
    LazyLock::force(&RECORD);
    let names = |name: &str| {
        let carried = CARRIED.iter().find(|carried| carried.name == name).unwrap();
        interface(&fs::read(carried.committed()).unwrap())
    };
    let echo = names("echo");
    assert!(echo.contains("import wasi_snapshot_preview1.fd_read") && echo.contains("export _start Func"), "{echo:?}");
    let hello = names("http-hello");
    let exports: Vec<&String> = hello.iter().filter(|name| name.starts_with("export")).collect();
    assert_eq!(exports, ["export wasi:http/incoming-handler@0.2.12"]);
    assert!(hello.contains("import wasi:http/types@0.2.12"), "{hello:?}");
}

#[test]
fn committed_wasm_is_that_of_the_committed_source() {
    for carried in &CARRIED {
        let (name, recorded) = (carried.name, &RECORD["plugins"][carried.name]);
        let wasm = digest(&fs::read(carried.committed()).unwrap());
        assert_eq!(recorded["wasm"], wasm, "{name}.wasm is not the file that was recorded");
        let source = carried.source_digest();
        assert_eq!(
            recorded["source"], source,
            "{name} has changed since its .wasm was built; see the top of this test"
        );
    }
}

fn update() {
    let (mut toolchains, mut plugins) = (Map::new(), Map::new());
    for target in targets() {
        let toolchain = toolchain(target).unwrap_or_else(|| panic!("the target {target} is not installed"));
        toolchains.insert(target.to_owned(), toolchain);
        for (carried, wasm) in build(target) {
            let digests = json!({"source": carried.source_digest(), "wasm": digest(&wasm)});
            plugins.insert(carried.name.to_owned(), digests);
            fs::write(carried.committed(), wasm).unwrap();
        }
    }
    let record = json!({"toolchains": toolchains, "plugins": plugins});
    fs::write(record_path(), serde_json::to_string_pretty(&record).unwrap() + "\n").unwrap();
}

#[test]
fn a_rebuild_is_the_same() {
    for target in targets() {
        let Some(toolchain) = toolchain(target) else {
            println!("SKIPPED a_rebuild_is_the_same: no target {target}; the digests were compared all the same");
            continue;
        };
        for (carried, rebuilt) in build(target) {
            let (name, committed) = (carried.name, fs::read(carried.committed()).unwrap());
            if RECORD["toolchains"][target] == toolchain {
                assert!(committed == rebuilt, "{name}: the recorded toolchain gives other bytes");
                continue;
            }
            assert_eq!(interface(&committed), interface(&rebuilt), "{name}");
            assert_eq!(carried.behaviour(&committed), carried.behaviour(&rebuilt), "{name}");
        }
    }
}
