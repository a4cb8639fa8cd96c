//! Builds this repository's plugins as static native programs, so that one `cargo` command is all the set-up there is.
//!
//! They are built by a `cargo` of their own: a static program needs another linkage than the host's own tools, and
//! `RUSTFLAGS` cannot be set for single packages. `BUNDLED_PLUGINS` names the directory with the programs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PLUGINS: [&str; 3] = ["word-count", "echo", "probe"];

fn main() {
    let target = env::var("TARGET").expect("cargo sets TARGET");
    assert_eq!(target, TARGET, "holm runs on x86-64 Linux: its system call filter is for that machine alone");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for source in ["plugins", "guest-sdk", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("plugins");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .current_dir(&workspace)
        .args(["build", "--locked", "--profile", "plugin", "--target", TARGET, "--target-dir"])
        .arg(&out)
        .args(PLUGINS.iter().flat_map(|plugin| ["--package", plugin]))
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // what the outer build is wrapped in (clippy, a compiler cache of another sysroot) is not for the inner one
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER");
    // each part of the program in huge pages of its own: see `sys::text` of `holm-sandbox`
    println!("cargo::rustc-link-arg-bins=-Wl,-z,max-page-size=0x200000");
    let status = cargo.status().expect("start cargo for the plugins");
    assert!(status.success(), "the plugins could not be built; is a C library for static linking there (libc6-dev)?");
    println!("cargo::rustc-env=BUNDLED_PLUGINS={}", out.join(TARGET).join("plugin").display());
}
