//! What runs inside a sandbox: native programs, and WebAssembly by wasmtime.
//!
//! This crate knows artifacts, engines and the guest's world, and nothing of namespaces, cgroups, HTTP or tenants.
//! [`artifact`] runs in the unprivileged server and only looks at bytes; everything that gives an uploaded byte a
//! meaning (compiling it, mapping it, running it) runs in a sandbox.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod artifact;
pub mod invocation;
pub mod native;
#[cfg(feature = "wasm")]
pub mod wasm;
