//! Holm: an HTTP server that hosts functions for many tenants, each job in a process of its own.
//!
//! See `host/ARCHITECTURE.md` for the map. Imports point one way:
//! `cli → server → job → upload → admission, store → plugin, tenant → limit`, with `launcher` at hand for those that run
//! sandboxes; only [`inside`] sees both the sandbox and the runtimes from within.

#![forbid(unsafe_code)]

pub mod admission;
pub mod bundled;
pub mod cli;
pub mod config;
pub mod inside;
pub mod job;
pub mod launcher;
pub mod limit;
pub mod plugin;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod tenant;
pub mod upload;
