//! One confined process: namespaces, cgroup, private root, empty capabilities, Landlock, seccomp.
//!
//! This crate knows Linux and nothing of HTTP, tenants' plugins or WebAssembly. The server side is a [`protocol`] over
//! [`wire::Packets`]; the other side is [`launcher::launcher_main`], which runs a [`workload::Workload`] in each
//! sandbox. There is no async, no thread, no lock and no log between the clone and the workload, and no crate in this
//! crate's graph that would bring one: a process cloned without exec may rely on nothing else.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod ceiling;
pub mod cgroup;
pub mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod init;
pub mod launcher;
pub mod limits;
pub mod name;
pub mod paths;
pub mod policy;
pub mod probe;
pub mod protocol;
pub mod rootless;
mod spawn;
pub mod spec;
#[allow(unsafe_code)]
mod sys;
pub mod uids;
pub mod usage;
pub mod wire;
pub mod workload;

pub use crate::error::{LaunchError, Step};
pub use crate::sys::arena::Allocator;
