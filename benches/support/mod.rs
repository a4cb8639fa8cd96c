//! What the benches share: sides measured in turn, what they are measured against, and the table of what was reached.

#![allow(dead_code, unreachable_pub)] // each bench uses its own part of it
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a bench that cannot go on says where, and prints its tables

pub mod figures;
pub mod floor;
pub mod launches;
pub mod load;
pub mod obedient;
pub mod peers;
pub mod proc;
pub mod programs;
pub mod server;
pub mod times;

/// A number that an environment variable changes, or what it is without.
pub fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
